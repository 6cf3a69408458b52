// out[i, :] += sum_k a(i, k) * b[k, :]     the product that all walks over a large matrix end in
//
// a: read one element at a time and broadcast, a(i, k) = a[i * A_ROW + k * A_K].
// b: [count, kLanes * vectors], read in vectors.
//
// Either of them is a panel of the large matrix in the level-1 cache, the other a small operand.
//
// Two kinds of elements, both four bytes, both passed as float*: a float, or a pair of bf16 that
// are neighbours along k.  There are no tails: panels are padded with zeros to kTileRows rows and
// whole vectors, and what comes of the padding is not copied out.

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

// R x J accumulators: few enough for the 32 or 16 registers of the level, and where it matters
// eight at least, so that the latency of one step is hidden by the others.  A stride of 0 among the
// template's arguments is the one among the function's.
template <typename Kind, int A_ROW, int A_K, int R, int J>
DK_INLINE void accumulate(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_row,
                          int64_t count, Floats (&acc)[R][J]) {
  const int64_t row = A_ROW ? A_ROW : a_row, next = A_K ? A_K : a_k;
#pragma GCC unroll 2
  for (int64_t k = 0; k < count; ++k) {
    Floats vectors[J];
    for (int j = 0; j < J; ++j) vectors[j] = load(b + j * kLanes);
    for (int i = 0; i < R; ++i) {
      const Floats one = set1(a[i * row]);
      for (int j = 0; j < J; ++j) acc[i][j] = Kind::step(one, vectors[j], acc[i][j]);
    }
    a += next;
    b += b_row;
  }
}

// The sum over one panel is made first and then added: long sums in two steps lose fewer digits.
template <typename Kind, int A_ROW, int A_K, int R, int J>
inline void tile(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_row,
                 int64_t count, float* out, int64_t out_row) {
  Floats acc[R][J];
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < J; ++j) acc[i][j] = zero();
  accumulate<Kind, A_ROW, A_K>(a, a_row, a_k, b, b_row, count, acc);
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < J; ++j) {
      float* to = out + i * out_row + j * kLanes;
      store(to, load(to) + acc[i][j]);
    }
}

inline constexpr int kWide = kLanes == 16 ? 4 : 2;  // vectors of a tile of four rows

// rows: rounded up to kTileRows here; ``a`` and ``out`` have that many.
template <typename Kind, int A_ROW, int A_K>
inline void product(const float* a, int64_t a_row, int64_t a_k, int64_t rows, const float* b,
                    int64_t b_row, int64_t vectors, int64_t count, float* out, int64_t out_row) {
  const int64_t row = A_ROW ? A_ROW : a_row;
  for (int64_t j = 0; j < vectors;) {
    const int64_t left = vectors - j, taken = left >= kWide ? kWide : left >= 2 ? 2 : 1;
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const float* from = a + i * row;
      float* to = out + i * out_row + j * kLanes;
      const float* small = b + j * kLanes;
      if (taken == kWide) {
        tile<Kind, A_ROW, A_K, 4, kWide>(from, a_row, a_k, small, b_row, count, to, out_row);
        tile<Kind, A_ROW, A_K, 4, kWide>(from + 4 * row, a_row, a_k, small, b_row, count,
                                         to + 4 * out_row, out_row);
      } else if (taken == 2) {
        tile<Kind, A_ROW, A_K, kTileRows, 2>(from, a_row, a_k, small, b_row, count, to, out_row);
      } else {
        tile<Kind, A_ROW, A_K, kTileRows, 1>(from, a_row, a_k, small, b_row, count, to, out_row);
      }
    }
    j += taken;
  }
}

}  // namespace decomp_kernels::cpu::DK_LEVEL
