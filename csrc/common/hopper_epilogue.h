// From the accumulator's registers to the output: which element each register holds, what becomes
// of it, where it waits in shared memory, and where column sums go.
//
//     forward           z = acc + addend    y = out_scale * z + bias
//     input gradient    dX = acc            d_x = in_scale * dX          d_in_scale = sum_m x * dX
//
// A warpgroup of 128 threads holds [64, cols] of float32: in each block of 8 columns a thread has
// two neighbours of one row and two of the row 8 below.

#pragma once

#include <cstdint>

#include "hopper_boxes.h"
#include "narrow.h"

namespace decomp_kernels {

struct Element {
  int row, col;
};

DK_HOST_DEVICE constexpr Element accumulator_element(int thread, int i) {
  const int warp = thread / 32, lane = thread % 32;
  return {warp * 16 + lane / 4 + 8 * (i / 2 % 2), 8 * (i / 4) + 2 * (lane % 4) + i % 2};
}

inline constexpr int kChunkRegisters = kGroupRows * kChunkCols / 128;  // a thread's, of a chunk

// One matrix store of a warp writes 16 rows by 16 columns as four 8 x 8 matrices; lane l says where
// row l % 8 of matrix l / 8 goes.  Matrices: the rows and those 8 below, then 8 columns on.
// Registers of a thread, two elements each: 8 * store + {0,1}, {2,3}, {4,5}, {6,7} of the chunk.
inline constexpr int kChunkStores = kChunkCols / 16;

DK_HOST_DEVICE constexpr int store_row_offset(int thread, int store) {
  const int warp = thread / 32, matrix = thread % 32 / 8;
  const int row = warp * 16 + matrix % 2 * 8 + thread % 8;
  return swizzled(row, store * 16 + matrix / 2 * 8);
}

// Column sums over the rows leave as one row of partial sums for each 64 rows, added afterwards
// in a fixed order: no atomics, so the same bits every time.
DK_HOST_DEVICE int64_t partial_rows(int64_t rows) { return (rows + kGroupRows - 1) / kGroupRows; }
DK_HOST_DEVICE int partial_row(int first_row) { return first_row / kGroupRows; }

struct Pair {
  float a, b;
};

// Elements col and col + 1 of a row, zero from ``cols`` on.  col and cols are even and the row
// starts at a multiple of two elements, so that both are one load.
template <typename T>
DK_HOST_DEVICE Pair pair_at(const T* row, int col, int cols) {
  if (col >= cols) return {0.0f, 0.0f};
  T both[2];
  memcpy(both, __builtin_assume_aligned(row + col, sizeof both), sizeof both);
  return {to_float(both[0]), to_float(both[1])};
}

// Null pointers stand for terms that are not there.  T: what x, y and the addend are made of.
struct ForwardEnd {
  const void* addend;  // T [rows, cols]
  int64_t addend_stride;
  const float *out_scale, *bias;  // [cols]
  int rows, cols;
  bool keep_z;

  template <typename T>
  DK_HOST_DEVICE Pair z(Pair acc, int row, int col) const {
    if (addend == nullptr || row >= rows) return acc;
    const Pair t = pair_at(static_cast<const T*>(addend) + row * addend_stride, col, cols);
    return {acc.a + t.a, acc.b + t.b};
  }
  DK_HOST_DEVICE Pair y(Pair z, int col) const {
    if (out_scale != nullptr) {
      const Pair s = pair_at(out_scale, col, cols);
      z = {z.a * s.a, z.b * s.b};
    }
    if (bias != nullptr) {
      const Pair b = pair_at(bias, col, cols);
      z = {z.a + b.a, z.b + b.b};
    }
    return z;
  }
};

struct GradientEnd {
  const void* x;  // T [rows, cols]
  int64_t x_stride;
  const float* in_scale;  // [cols]
  float* sums;            // [partial_rows(rows), cols]
  int rows, cols;
  bool keep_d_x;

  // What one row adds to the column sums.  Rows beyond the last count as nothing, not as 0 * dX:
  // a zero times an infinite weight would be NaN.
  template <typename T>
  DK_HOST_DEVICE Pair term(Pair dX, int row, int col) const {
    if (row >= rows) return {0.0f, 0.0f};
    const Pair t = pair_at(static_cast<const T*>(x) + row * x_stride, col, cols);
    return {t.a * dX.a, t.b * dX.b};
  }
  DK_HOST_DEVICE Pair d_x(Pair dX, int col) const {
    if (in_scale == nullptr) return dX;
    const Pair s = pair_at(in_scale, col, cols);
    return {dX.a * s.a, dX.b * s.b};
  }
};

}  // namespace decomp_kernels
