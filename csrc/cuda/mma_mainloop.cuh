// acc = left_0 right_0 (masked), + left_1 right_1, one tile of C in registers.
//
//     left_p [rows, inner_p]     right_p [cols, inner_p], or [inner_p, cols] where kTransposed
//
// kStages steps are in shared memory, kStages - 1 of them under way while one is multiplied.  The
// rank pair is step 0 on; its last step is followed by the dropout mask, on float32 sums in
// registers, before the base pair is added on top.  Chunks that reach past a matrix are filled with
// zeros, so any rank is padded in shared memory only.

#pragma once

#include "intrinsics.cuh"
#include "mask.h"
#include "mma_tiles.h"

namespace decomp_kernels::cuda {

// A row-major operand; ``chunks``: base and stride are multiples of 16 bytes.
template <typename T>
struct MmaOperand {
  const T* data;
  int64_t stride;
  int rows, cols;
  bool chunks;
};

template <typename T>
struct MmaProduct {
  MmaOperand<T> left[2], right[2];  // 0 the rank pair, 1 the base pair
  int rank_steps, steps;            // of the rank pair; of both
  int rows, cols, row_tiles, col_tiles;
};

struct NoMask {
  static constexpr bool kMasks = false;
};

struct DropoutMask {
  static constexpr bool kMasks = true;
  const int64_t* seed;
  uint32_t threshold;
};

// A warp's sums: [16, 8] tiles down and across.
template <typename Tile>
struct Sums {
  static constexpr int kDown = Tile::kWarpRows / 16, kAcross = kWarpCols / 8;
  float of[kDown][kAcross][4];
};

template <typename Tile>
struct Fragments {
  uint32_t left[Tile::kWarpRows / 16][4], right[kWarpCols / 16][4];
};

// One chunk from rows that are not aligned: element by element, zeros outside.
template <typename T>
__device__ __forceinline__ void copy_elements(T* shared, const T* source, int count) {
  uint32_t pairs[kChunk / 2] = {};
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    if (i < count) pairs[i / 2] |= uint32_t(source[i].bits) << (i % 2 * 16);
  *reinterpret_cast<uint4*>(shared) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// Rows first_row on and columns first_col on of an operand into a swizzled shared tile.  A thread
// keeps to one column of chunks, so that one row's place gives the others'.
template <int kRows, int kCols, int kThreads, typename T>
__device__ __forceinline__ void load_tile(T* shared, const MmaOperand<T>& from, int first_row,
                                          int first_col) {
  constexpr int kChunks = kCols / kChunk, kApart = kThreads / kChunks, kLoads = kRows / kApart;
  static_assert(kThreads % kChunks == 0 && kRows % kApart == 0 && kApart % 8 == 0);
  const int row = int(threadIdx.x) / kChunks, chunk = int(threadIdx.x) % kChunks;
  const int source_col = first_col + chunk * kChunk, source_row = first_row + row;
  const int inside = max(0, min(kChunk, from.cols - source_col));
  T* target = shared + swizzled<kChunks>(row, chunk);  // kApart rows on, the swizzle is the same
  // An address outside the matrix is formed below but not read.
  const T* source = from.data + (int64_t(source_row) * from.stride + source_col);
  const int64_t apart = kApart * from.stride;
  if (from.chunks) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int count = source_row + i * kApart < from.rows ? inside : 0;
      cp_async_16(target + i * kApart * kCols, source, count * int(sizeof(T)));
      source += apart;
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kLoads; ++i) {
      copy_elements(target + i * kApart * kCols, source,
                    source_row + i * kApart < from.rows ? inside : 0);
      source += apart;
    }
  }
}

template <typename Tile, bool kTransposed, typename T>
__device__ __forceinline__ void load_step(T* stage, const MmaProduct<T>& product, int step,
                                          Place corner) {
  const Step at = step_place(step, product.rank_steps);
  const MmaOperand<T>&left = product.left[at.pair], &right = product.right[at.pair];
  T* right_tile = stage + Tile::kLeft;
  load_tile<Tile::kRows, kDepth, Tile::kThreads>(stage, left, corner.row, at.first);
  if constexpr (kTransposed)
    load_tile<kDepth, Tile::kCols, Tile::kThreads>(right_tile, right, at.first, corner.col);
  else
    load_tile<Tile::kCols, kDepth, Tile::kThreads>(right_tile, right, corner.col, at.first);
}

// The sixteen of a stage's depth from ``depth`` on, for the warp whose corner in the tile this is.
template <typename Tile, bool kTransposed, typename T>
__device__ __forceinline__ void load_fragments(Fragments<Tile>& fragments, const T* stage,
                                               int depth, Place corner) {
  constexpr int kInner = kDepth / kChunk, kOuter = Tile::kCols / kChunk;
  const int lane = int(threadIdx.x) % 32;
  const Place left = left_fragment(lane), right = right_fragment(lane);
  const T* right_tile = stage + Tile::kLeft;
#pragma unroll
  for (int i = 0; i < Tile::kWarpRows / 16; ++i)
    ldmatrix_x4(fragments.left[i], stage + swizzled<kInner>(corner.row + i * 16 + left.row,
                                                            depth / kChunk + left.col));
#pragma unroll
  for (int j = 0; j < kWarpCols / 16; ++j) {
    const int col = corner.col + j * 16;
    if constexpr (kTransposed)
      ldmatrix_x4_trans(fragments.right[j],
                        right_tile + swizzled<kOuter>(depth + left.row, col / kChunk + left.col));
    else
      ldmatrix_x4(fragments.right[j], right_tile + swizzled<kInner>(col + right.row,
                                                                    depth / kChunk + right.col));
  }
}

template <typename T, typename Tile>
__device__ __forceinline__ void multiply(Sums<Tile>& sums, const Fragments<Tile>& fragments) {
#pragma unroll
  for (int i = 0; i < Sums<Tile>::kDown; ++i)
#pragma unroll
    for (int j = 0; j < Sums<Tile>::kAcross; ++j)
      mma_m16n8k16<T>(sums.of[i][j], fragments.left[i], fragments.right[j / 2][j % 2 * 2],
                      fragments.right[j / 2][j % 2 * 2 + 1]);
}

// Two bits, for the elements first and first + 1.
__device__ __forceinline__ uint32_t kept_two(uint64_t seed, uint64_t first, uint32_t threshold) {
  const int lane = int(first % 4);
  const uint64_t word = mask_word(seed, first / 4);
  // They are in one word unless the number of columns is odd.
  const uint64_t next = lane == 3 ? mask_word(seed, first / 4 + 1) : word;
  return uint32_t(lane_kept(word, lane, threshold)) |
         uint32_t(lane_kept(next, (lane + 1) % 4, threshold)) << 1;
}

// Zero where the mask of C's element row * cols + col is.  corner: of the warp's part in C.
template <typename Tile>
__device__ __forceinline__ void apply_mask(Sums<Tile>& sums, const DropoutMask& mask, Place corner,
                                           int cols) {
  constexpr int kAcross = Sums<Tile>::kAcross;
  const uint64_t seed = uint64_t(*mask.seed);
  const Place own = sum_fragment(int(threadIdx.x) % 32);
#pragma unroll
  for (int i = 0; i < Sums<Tile>::kDown; ++i) {
    // Bits first, in a loop that is not unrolled: beside the sums there are few registers for it.
    static_assert(kAcross * 4 == 32);
    uint32_t kept = 0;
#pragma unroll 1
    for (int pair = 0; pair < 2 * kAcross; ++pair) {
      const int row = corner.row + i * 16 + pair % 2 * 8 + own.row;
      const int col = corner.col + pair / 2 * 8 + own.col;
      const uint64_t element = uint64_t(row) * uint64_t(cols) + uint64_t(col);
      kept |= kept_two(seed, element, mask.threshold) << (2 * pair);
    }
#pragma unroll
    for (int j = 0; j < kAcross; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (!(kept >> (4 * j + c) & 1)) sums.of[i][j][c] = 0.0f;
  }
}

// corner: of the block's tile in C; warp: of the warp's part in the tile.
template <typename Tile, bool kTransposed, typename Mask, typename T>
__device__ __forceinline__ void multiply_tile(Sums<Tile>& sums, T* shared,
                                              const MmaProduct<T>& product, const Mask& mask,
                                              Place corner, Place warp) {
  constexpr int kStage = Tile::kLeft + Tile::kRight, kHalves = kDepth / 16;
  static_assert(kHalves == 2 && Tile::kStages >= 3);
  auto stage = [&](int step) { return shared + step % Tile::kStages * kStage; };
#pragma unroll
  for (int i = 0; i < Sums<Tile>::kDown; ++i)
#pragma unroll
    for (int j = 0; j < Sums<Tile>::kAcross; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c) sums.of[i][j][c] = 0.0f;

  for (int step = 0; step < Tile::kStages - 1; ++step) {
    if (step < product.steps)
      load_step<Tile, kTransposed>(stage(step), product, step, corner);
    cp_async_commit();  // an empty group too: the waits count groups
  }
  cp_async_wait<Tile::kStages - 2>();
  __syncthreads();
  // Fragments are read one half of a step ahead of their products.
  Fragments<Tile> fragments[2];
  if (product.steps > 0)
    load_fragments<Tile, kTransposed>(fragments[0], stage(0), 0, warp);

  for (int step = 0; step < product.steps; ++step) {
    // Into the stage of step - 1: the barrier below was after every warp's last read of it.
    const int ahead = step + Tile::kStages - 1;
    if (ahead < product.steps)
      load_step<Tile, kTransposed>(stage(ahead), product, ahead, corner);
    cp_async_commit();
    load_fragments<Tile, kTransposed>(fragments[1], stage(step), 16, warp);
    multiply<T>(sums, fragments[0]);

    cp_async_wait<Tile::kStages - 2>();
    __syncthreads();
    const bool more = step + 1 < product.steps;
    const bool masked = Mask::kMasks && step + 1 == product.rank_steps;
    if (more && !masked) load_fragments<Tile, kTransposed>(fragments[0], stage(step + 1), 0, warp);
    multiply<T>(sums, fragments[1]);
    if constexpr (Mask::kMasks)
      if (masked) {  // with no fragments in registers, which it has none to spare for
        apply_mask(sums, mask, {corner.row + warp.row, corner.col + warp.col}, product.cols);
        if (more) load_fragments<Tile, kTransposed>(fragments[0], stage(step + 1), 0, warp);
      }
  }
  cp_async_wait<0>();
}

}  // namespace decomp_kernels::cuda
