// The decomposed linear by mma.sync: forward and input gradient, one block a tile of y or d_x.
//
//     C = left_0 right_0 (masked) + left_1 right_1, then the epilogue        maths: mma_arguments.h
//
// From arguments to kernels: ``with_launches`` chooses the instances and hands them to a launcher,
// which is CUDA's in mma_gemm.cu.

#pragma once

#include "mma_arguments.h"
#include "mma_epilogue.cuh"
#include "mma_mainloop.cuh"

namespace decomp_kernels::cuda {

template <typename Tile, bool kTransposed, typename T, typename Mask, typename Epilogue>
__global__ __launch_bounds__(Tile::kThreads, Tile::kMinBlocks) void mma_kernel(
    const __grid_constant__ MmaProduct<T> product, const __grid_constant__ Mask mask,
    const __grid_constant__ Epilogue epilogue) {
  const Place tile = tile_place(blockIdx.x, product.row_tiles, product.col_tiles);
  const Place corner{tile.row * Tile::kRows, tile.col * Tile::kCols};
  const int index = int(threadIdx.x) / 32;
  const Place warp{index / Tile::kWarpsAcross * Tile::kWarpRows,
                   index % Tile::kWarpsAcross * kWarpCols};
  Sums<Tile> sums;
  multiply_tile<Tile, kTransposed>(sums, reinterpret_cast<T*>(dynamic_shared()), product, mask,
                                   corner, warp);
  finish_tile(sums, reinterpret_cast<float*>(dynamic_shared()), epilogue, corner, warp, tile.row,
              product.rows, product.cols);
}

inline constexpr int kSumThreads = 128;

static_assert(SquareTile::kRows == WideTile::kRows);

// d_in_scale[k] = parts[0, k] + parts[1, k] + ..., in that order.
static __global__ __launch_bounds__(kSumThreads) void sum_parts_kernel(
    const float* __restrict__ parts,   // [row_tiles, cols]
    float* __restrict__ d_in_scale,    // [cols]
    int row_tiles, int cols) {
  const int col = int(blockIdx.x) * kSumThreads + int(threadIdx.x);
  if (col >= cols) return;
  float sum = 0.0f;
  for (int tile = 0; tile < row_tiles; ++tile) sum += parts[int64_t(tile) * cols + col];
  d_in_scale[col] = sum;
}

inline bool in_chunks(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % kChunk == 0;
}

template <typename T>
MmaOperand<T> operand_of(const MmaMatrix& m, int64_t rows, int64_t cols) {
  return {static_cast<const T*>(m.data), m.stride, int(rows), int(cols),
          in_chunks(m.data, m.stride)};
}

template <typename T>
MmaRows<const T> rows_of(const MmaMatrix& m) {
  return {static_cast<const T*>(m.data), m.stride, in_chunks(m.data, m.stride)};
}

template <typename T>
MmaRows<T> rows_of(const MmaOutput& m) {
  return {static_cast<T*>(m.data), m.stride, in_chunks(m.data, m.stride)};
}

template <typename T>
MmaColumns<T> columns_of(const MmaVector& v) {
  return {v.data, v.dtype == Dtype::kFloat};
}

// The product of a pair of any rank and a base pair, for C [rows, cols].
template <typename T>
MmaProduct<T> product_of(MmaOperand<T> rank_left, MmaOperand<T> rank_right, MmaOperand<T> base_left,
                         MmaOperand<T> base_right, int64_t rows, int64_t cols, int64_t rank,
                         int64_t inner) {
  const int rank_steps = int(tiles_over(rank, kDepth));
  return {{rank_left, base_left},
          {rank_right, base_right},
          rank_steps,
          rank_steps + int(tiles_over(inner, kDepth)),
          int(rows), int(cols), 0, 0};
}

// launch(kernel, blocks, threads, shared bytes, the kernel's arguments...) returns an error or 0.
template <bool kTransposed, typename T, typename Mask, typename Epilogue, typename Launch>
int with_tile(TileChoice choice, MmaProduct<T> product, const Mask& mask, const Epilogue& epilogue,
              const Launch& launch) {
  auto of = [&](auto tile) {
    using Tile = decltype(tile);
    product.row_tiles = int(tiles_over(product.rows, Tile::kRows));
    product.col_tiles = int(tiles_over(product.cols, Tile::kCols));
    return launch(mma_kernel<Tile, kTransposed, T, Mask, Epilogue>,
                  int64_t(product.row_tiles) * product.col_tiles, Tile::kThreads,
                  Tile::kSharedBytes, product, mask, epilogue);
  };
  if (choice == TileChoice::kWide) return of(WideTile{});
  if (choice == TileChoice::kSquare) return of(SquareTile{});
  return of(SmallTile{});
}

template <typename T, typename Launch>
int forward_of(const MmaForward& a, TileChoice choice, const Launch& launch) {
  const auto product =
      product_of(operand_of<T>(a.v, a.M, a.r), operand_of<T>(a.up, a.N, a.r),
                 operand_of<T>(a.x, a.M, a.K), operand_of<T>(a.weight, a.N, a.K),
                 a.M, a.N, a.r, a.K);
  const ForwardEpilogue<T> epilogue{rows_of<T>(a.addend), columns_of<T>(a.out_scale),
                                    columns_of<T>(a.bias), rows_of<T>(a.y), rows_of<T>(a.z)};
  return with_tile<false>(choice, product, NoMask{}, epilogue, launch);
}

template <typename T, typename Launch>
int input_gradient_of(const MmaInputGradient& a, TileChoice choice, float* parts,
                      const Launch& launch) {
  const auto product = product_of(operand_of<T>(a.dt, a.M, a.r), operand_of<T>(a.down, a.r, a.K),
                                  operand_of<T>(a.g, a.M, a.N), operand_of<T>(a.weight, a.N, a.K),
                                  a.M, a.K, a.r, a.N);
  const InputGradientEpilogue<T> epilogue{rows_of<T>(a.x), columns_of<T>(a.in_scale),
                                          rows_of<T>(a.d_x), a.d_in_scale ? parts : nullptr};
  if (a.seed && a.dropout_threshold && product.rank_steps)
    return with_tile<true>(choice, product, DropoutMask{a.seed, a.dropout_threshold}, epilogue,
                           launch);
  return with_tile<true>(choice, product, NoMask{}, epilogue, launch);
}

// Every launch of the forward: none where y is empty, since a grid of no blocks is an error.
template <typename Launch>
int with_launches(const MmaForward& a, TileChoice choice, float*, const Launch& launch) {
  if (a.M == 0 || a.N == 0) return 0;
  return a.dtype == Dtype::kHalf ? forward_of<fp16>(a, choice, launch)
                                 : forward_of<bf16>(a, choice, launch);
}

// Every launch of the input gradient.  parts: workspace_bytes(a) of memory, null where that is 0.
template <typename Launch>
int with_launches(const MmaInputGradient& a, TileChoice choice, float* parts,
                  const Launch& launch) {
  if (a.K == 0) return 0;
  if (a.M > 0) {
    const int failed = a.dtype == Dtype::kHalf ? input_gradient_of<fp16>(a, choice, parts, launch)
                                               : input_gradient_of<bf16>(a, choice, parts, launch);
    if (failed) return failed;
  }
  if (!a.d_in_scale) return 0;
  // Of no rows the sums are zeros.  A row of parts for each row of tiles, as with_tile has them.
  const int tile_rows = choice == TileChoice::kSmall ? SmallTile::kRows : SquareTile::kRows;
  return launch(sum_parts_kernel, tiles_over(a.K, kSumThreads), kSumThreads, 0,
                static_cast<const float*>(parts), a.d_in_scale, int(tiles_over(a.M, tile_rows)),
                int(a.K));
}

}  // namespace decomp_kernels::cuda
