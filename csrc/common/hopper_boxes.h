// What the copy engine (TMA) moves: boxes of two-dimensional tensors, and where they lie in shared
// memory.
//
// A box outside the tensor's extents reads zeros there and writes nothing there; r, K, M and N
// need be multiples of nothing.  Strides between rows are multiples of 16 bytes.
// Shared memory holds rows of 128 bytes whose eight 16-byte pieces are exchanged within themselves
// (piece ^ row % 8), the 128-byte swizzle: columns of pieces then fall on different banks.

#pragma once

#include <cstdint>

#include "hopper_tiles.h"

namespace decomp_kernels {

inline constexpr int kRowElements = 64;   // elements of two bytes in a row of shared memory
inline constexpr int kPieceElements = 8;  // and in a piece of 16 bytes

// Innermost dimension first; all in elements of two bytes.
struct TensorBox {
  const void* base;
  int64_t extent[2];
  int64_t stride;
  int box[2];
};

// Where a box starts in its tensor, and where it goes in the stage's part for that operand.
struct BoxPlace {
  int inner, outer, offset;
};

// left, small_left [rows, inner]
DK_HOST_DEVICE TensorBox left_tensor(
    const HopperTile& tile, const void* base, int64_t rows, int64_t inner, int64_t stride) {
  return {base, {inner, rows}, stride, {kDepth, tile.rows()}};
}
DK_HOST_DEVICE BoxPlace left_box(int first_row, int first_inner) {
  return {first_inner, first_row, 0};
}

// right, small_right: [cols, inner], or [inner, cols] where the tile reads it by columns.  The
// blocks of a cluster fetch a share of it each, for all.
DK_HOST_DEVICE TensorBox right_tensor(
    const HopperTile& tile, const void* base, int64_t cols, int64_t inner, int64_t stride) {
  if (tile.right_by_cols()) return {base, {cols, inner}, stride, {kRowElements, kDepth}};
  return {base, {inner, cols}, stride, {kDepth, tile.cols / tile.cluster}};
}
DK_HOST_DEVICE constexpr int right_boxes(const HopperTile& tile) {
  return tile.right_by_cols() ? tile.cols / kRowElements / tile.cluster : 1;
}
DK_HOST_DEVICE BoxPlace right_box(
    const HopperTile& tile, int rank_in_cluster, int box, int first_col, int first_inner) {
  if (tile.right_by_cols()) {
    const int strip = rank_in_cluster * right_boxes(tile) + box;
    return {first_col + strip * kRowElements, first_inner, strip * kRowElements * kDepth};
  }
  const int share = tile.cols / tile.cluster * rank_in_cluster;
  return {first_inner, first_col + share, share * kDepth};
}

// D and z [rows, cols], stored in chunks of a warpgroup.
DK_HOST_DEVICE TensorBox out_tensor(
    const void* base, int64_t rows, int64_t cols, int64_t stride) {
  return {base, {cols, rows}, stride, {kChunkCols, kGroupRows}};
}

// Element of a row in swizzled shared memory, from the start of its box.
DK_HOST_DEVICE constexpr int swizzled(int row, int element) {
  const int piece = element / kPieceElements ^ row % 8;
  return row * kRowElements + piece * kPieceElements + element % kPieceElements;
}

// Where the matrix instructions find an element of a stage.
DK_HOST_DEVICE constexpr int left_element(int row, int inner) { return swizzled(row, inner); }
DK_HOST_DEVICE constexpr int right_element(const HopperTile& tile, int col, int inner) {
  if (!tile.right_by_cols()) return swizzled(col, inner);
  return col / kRowElements * kRowElements * kDepth + swizzled(inner, col % kRowElements);
}

}  // namespace decomp_kernels
