// out[i, :] += sum_k a(i, k) * b[k, :]     the product that all walks over a large matrix end in
//
// a: a panel of a large matrix in level-1 cache, read one element at a time and broadcast; with
//    a(i, k) = a[i * A_ROW + k * A_K], either its rows or its columns are the rows of ``out``.
// b: [count, kLanes * vectors], a small operand, the rank (or a strip of columns) in its lanes.
//
// Two kinds of elements, both four bytes, both passed as float*: a float, or a pair of bf16 that are
// neighbours along k.  There are no tails: panels are padded with zeros to kTileRows rows and whole
// vectors, and what comes of the padding is not copied out.

#pragma once

#include "simd.h"

namespace decomp_kernels::cpu::DK_LEVEL {

struct Singles {
  static constexpr int kPer = 1;  // elements of the large matrix in one of the panel
  static DK_INLINE Floats step(Floats a, Floats b, Floats acc) { return fma(a, b, acc); }
};

#if defined(__AVX512BF16__)
#define DK_PAIRS
struct Pairs {
  static constexpr int kPer = 2;
  static DK_INLINE Floats step(Floats a, Floats b, Floats acc) { return dot_pairs(a, b, acc); }
};
#endif

inline constexpr int kTileRows = 8;

// R x J accumulators: eight at least, so that the latency of one step is hidden by the others, and
// few enough for the 32 or 16 registers of the level.
template <typename Kind, bool kAdd, int R, int J, int A_ROW, int A_K>
inline void tile(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t count,
                 float* out, int64_t out_row) {
  const int64_t row = A_ROW ? A_ROW : a_row;
  Floats acc[R][J];
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < J; ++j)
      acc[i][j] = kAdd ? load(out + i * out_row + j * kLanes) : zero();
#pragma GCC unroll 2
  for (int64_t k = 0; k < count; ++k) {
    Floats vectors[J];
    for (int j = 0; j < J; ++j) vectors[j] = load(b + j * kLanes);
    for (int i = 0; i < R; ++i) {
      const Floats one = set1(a[i * row]);
      for (int j = 0; j < J; ++j) acc[i][j] = Kind::step(one, vectors[j], acc[i][j]);
    }
    a += A_K;
    b += b_row;
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < J; ++j) store(out + i * out_row + j * kLanes, acc[i][j]);
}

// kAdd = false: out = instead of out +=.
// rows: rounded up to kTileRows here; ``a`` and ``out`` have that many.  A_ROW = 0: a_row instead.
template <typename Kind, int A_ROW, int A_K, bool kAdd = true>
inline void product(const float* a, int64_t a_row, int64_t rows, const float* b, int64_t b_row,
                    int64_t vectors, int64_t count, float* out, int64_t out_row) {
  constexpr int kWide = kLanes == 16 ? 4 : 2;
  const int64_t row = A_ROW ? A_ROW : a_row;
  for (int64_t j = 0; j < vectors;) {
    const int64_t left = vectors - j, taken = left >= kWide ? kWide : left >= 2 ? 2 : 1;
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const float* from = a + i * row;
      float* to = out + i * out_row + j * kLanes;
      const float* small = b + j * kLanes;
      if (taken == kWide) {
        constexpr int R = 4;
        tile<Kind, kAdd, R, kWide, A_ROW, A_K>(from, a_row, small, b_row, count, to, out_row);
        tile<Kind, kAdd, R, kWide, A_ROW, A_K>(from + R * row, a_row, small, b_row, count,
                                         to + R * out_row, out_row);
      } else if (taken == 2) {
        tile<Kind, kAdd, kTileRows, 2, A_ROW, A_K>(from, a_row, small, b_row, count, to, out_row);
      } else {
        tile<Kind, kAdd, kTileRows, 1, A_ROW, A_K>(from, a_row, small, b_row, count, to, out_row);
      }
    }
    j += taken;
  }
}

}  // namespace decomp_kernels::cpu::DK_LEVEL
