// Where each block, step and 16-byte chunk of the mma.sync product belongs.
//
//     C [rows, cols] = rank pair, then base pair   a block: a tile of C   a step: kDepth of a pair
//
// Pure index arithmetic, for host and device alike.

#pragma once

#include <cstdint>

#include "host_device.h"

namespace decomp_kernels::cuda {

inline constexpr int kDepth = 32;      // of the inner dimension, a step
inline constexpr int kChunk = 8;       // 16-bit elements in 16 bytes
inline constexpr int kWarpCols = 64;   // of C, a warp
inline constexpr int kTileGroup = 8;   // rows of tiles that go together

// A tile of C, its warps, and the steps that are in shared memory at once.
template <int rows, int cols, int warp_rows, int stages, int blocks_a_processor>
struct MmaTile {
  static constexpr int kRows = rows, kCols = cols, kWarpRows = warp_rows, kStages = stages;
  static constexpr int kWarpsDown = rows / warp_rows, kWarpsAcross = cols / kWarpCols;
  static constexpr int kThreads = 32 * kWarpsDown * kWarpsAcross;
  static constexpr int kMinBlocks = blocks_a_processor;
  static constexpr int kLeft = rows * kDepth, kRight = cols * kDepth;  // elements of a stage
  static constexpr int kSharedBytes = stages * (kLeft + kRight) * 2;
};

// 227 KiB is a block's limit on sm_90, 99 KiB on sm_86, sm_89 and sm_120: the largest is 96.
using SmallTile = MmaTile<64, 128, 32, 4, 3>;
using SquareTile = MmaTile<128, 128, 64, 4, 2>;
using WideTile = MmaTile<128, 256, 64, 4, 1>;

enum class TileChoice : int { kSmall, kSquare, kWide };

DK_HOST_DEVICE int64_t tiles_over(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// The largest tile of which there is one for each processor; a guess, measured on nothing.
inline TileChoice choose_tile(int64_t rows, int64_t cols, int processors) {
  auto count = [&](int64_t r, int64_t c) { return tiles_over(rows, r) * tiles_over(cols, c); };
  if (rows > 64 && count(128, 256) >= processors) return TileChoice::kWide;
  if (rows > 64 && count(128, 128) >= processors) return TileChoice::kSquare;
  return TileChoice::kSmall;
}

struct Place {
  int row, col;
};

// Row and column of a tile.  kTileGroup rows of tiles go together: they share what is in the L2.
DK_HOST_DEVICE Place tile_place(int64_t tile, int64_t row_tiles, int64_t col_tiles) {
  const int64_t first = tile / (kTileGroup * col_tiles) * kTileGroup;
  const int64_t within = tile % (kTileGroup * col_tiles);
  const int64_t left = row_tiles - first, rows = left < kTileGroup ? left : kTileGroup;
  return {int(first + within % rows), int(within / rows)};
}

struct Step {
  int pair;   // 0 the rank pair, 1 the base pair
  int first;  // of the pair's inner dimension
};

DK_HOST_DEVICE Step step_place(int step, int rank_steps) {
  return step < rank_steps ? Step{0, step * kDepth} : Step{1, (step - rank_steps) * kDepth};
}

// The element of a shared tile [.., kChunks * 8] at which a chunk of a row begins.  Eight rows at
// one chunk, which ldmatrix reads at once, lie in eight different groups of four banks.
template <int kChunks>
DK_HOST_DEVICE int swizzled(int row, int chunk) {
  static_assert(kChunks == 4 || kChunks % 8 == 0);
  const int turn = kChunks == 4 ? row / 2 % 4 : row % 8;
  return (row * kChunks + (chunk ^ turn)) * kChunk;
}

// Where a lane's row of an ldmatrix.x4 begins: row and chunk in a 16 x 16 block of a shared tile.
// Left operand: matrices (0, 0) (8, 0) (0, 8) (8, 8); the same for a right operand [inner, cols],
// transposed as it is read.
DK_HOST_DEVICE Place left_fragment(int lane) { return {lane % 16, lane / 16}; }

// Right operand [cols, inner]: matrices (0, 0) (0, 8) (8, 0) (8, 8), two columns of tiles at once.
DK_HOST_DEVICE Place right_fragment(int lane) { return {lane % 8 + lane / 16 * 8, lane / 8 % 2}; }

// Where a lane's first two sums of a [16, 8] tile are; the other two are eight rows below.
DK_HOST_DEVICE Place sum_fragment(int lane) { return {lane / 4, lane % 4 * 2}; }

}  // namespace decomp_kernels::cuda
