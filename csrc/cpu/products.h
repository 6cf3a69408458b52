// The products of the host kernels on weights, as tiles that stay in registers:
//
//     row_products      out[n, j] = sum_k x[n, k] * y[j, k]        both are walked along their rows
//     self_products     out[i, j] = sum_k x[i, k] * x[j, k]        the upper half
//     outer_products    d[j, k] gets sum_n left[n, j] * x[n, k]    lanes are columns of x
//
//     x [rows, K], y [J, K], left [rows, J] of any strides, out [rows, J]
//
// Neither repacks an operand: bf16 becomes float32 in registers, and where both are bf16 the first
// takes pairs of exact products (VDPBF16PS).  Sums are float32, and their order depends on nothing
// but the shape of what one call covers.

#pragma once

#include "simd.h"

namespace decomp_kernels::cpu::DK_LEVEL {

#if defined(__AVX512F__)
inline constexpr int kDotRows = 6, kOuterRows = 8;  // of 32 registers 24 and 16 are sums
#else
inline constexpr int kDotRows = 3, kOuterRows = 4;  // of 16 registers 12 and 8 are sums
#endif
inline constexpr int kDotCols = 4, kOuterVectors = 2;

DK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// All lanes, or the first n: a tile is written once for both.
struct Whole {};
struct Part {
  int64_t n;
};
template <typename T>
DK_INLINE Floats take(const T* p, Whole) {
  return load(p);
}
template <typename T>
DK_INLINE Floats take(const T* p, Part part) {
  return load(p, part.n);
}
template <typename T>
DK_INLINE void put(T* p, Floats a, Whole) {
  store(p, a);
}
template <typename T>
DK_INLINE void put(T* p, Floats a, Part part) {
  store(p, a, part.n);
}

// What one step of row_products reads of an operand: kLanes elements, or as many pairs of bf16.
template <typename TX, typename TY>
struct Step {
  static constexpr int kElements = kLanes;
  DK_INLINE static Floats x(const TX* p) { return load(p); }
  DK_INLINE static Floats y(const TY* p) { return load(p); }
  DK_INLINE static Floats x(const TX* p, int64_t n) { return load(p, n); }
  DK_INLINE static Floats y(const TY* p, int64_t n) { return load(p, n); }
  DK_INLINE static Floats add(Floats a, Floats b, Floats sum) { return fma(a, b, sum); }
};

#if defined(__AVX512BF16__)
template <>
struct Step<bf16, bf16> {
  static constexpr int kElements = 2 * kLanes;
  DK_INLINE static Floats x(const bf16* p) { return _mm512_loadu_ps(p); }
  DK_INLINE static Floats y(const bf16* p) { return x(p); }
  DK_INLINE static Floats x(const bf16* p, int64_t n) {
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16((__mmask32(1) << n) - 1u, p));
  }
  DK_INLINE static Floats y(const bf16* p, int64_t n) { return x(p, n); }
  DK_INLINE static Floats add(Floats a, Floats b, Floats sum) { return dot_pairs(a, b, sum); }
};
#endif

// The sums of four vectors, side by side; kAdd: on top of what is there.
template <bool kAdd>
DK_INLINE void store_four_sums(float* out, Floats a, Floats b, Floats c, Floats d) {
#if defined(__AVX512F__)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 low = _mm512_shuffle_ps(ab, cd, 0x44), high = _mm512_shuffle_ps(ab, cd, 0xEE);
  const __m512 wide = _mm512_add_ps(low, high);
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(wide), _mm512_extractf32x8_ps(wide, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  _mm_storeu_ps(out, kAdd ? _mm_add_ps(_mm_loadu_ps(out), four) : four);
#elif defined(__AVX2__)
  const __m256 half = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  _mm_storeu_ps(out, kAdd ? _mm_add_ps(_mm_loadu_ps(out), four) : four);
#else
  const float sums[4] = {reduce_add(a), reduce_add(b), reduce_add(c), reduce_add(d)};
  for (int i = 0; i < 4; ++i) out[i] = kAdd ? out[i] + sums[i] : sums[i];
#endif
}

template <bool kAdd, int R, int J, typename TX, typename TY>
DK_INLINE void dot_tile(const TX* x, int64_t ldx, const TY* y, int64_t ldy, int64_t K, float* out,
                        int64_t ldo) {
  using S = Step<TX, TY>;
  Floats sums[R][J], a[R];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) sums[i][j] = zero();

  int64_t k = 0;
  for (; k + S::kElements <= K; k += S::kElements) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) a[i] = S::x(x + i * ldx + k);
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      const Floats b = S::y(y + j * ldy + k);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) sums[i][j] = S::add(a[i], b, sums[i][j]);
    }
  }
  if (const int64_t rest = K - k) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) a[i] = S::x(x + i * ldx + k, rest);
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      const Floats b = S::y(y + j * ldy + k, rest);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) sums[i][j] = S::add(a[i], b, sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    if constexpr (J == 4) {
      store_four_sums<kAdd>(out + i * ldo, sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
    } else {
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) {
        float* o = out + i * ldo + j;
        *o = (kAdd ? *o : 0.0f) + reduce_add(sums[i][j]);
      }
    }
  }
}

template <bool kAdd, int R, typename TX, typename TY>
DK_INLINE void dot_rows(const TX* x, int64_t ldx, const TY* y, int64_t ldy, int64_t J, int64_t K,
                        float* out, int64_t ldo) {
  int64_t j = 0;
  for (; j + kDotCols <= J; j += kDotCols)
    dot_tile<kAdd, R, kDotCols>(x, ldx, y + j * ldy, ldy, K, out + j, ldo);
  for (; j < J; ++j) dot_tile<kAdd, R, 1>(x, ldx, y + j * ldy, ldy, K, out + j, ldo);
}

// out[n, j] = sum_k x[n, k] * y[j, k] for n < rows, j < J; kAdd: on top of what is there.
template <bool kAdd = false, typename TX, typename TY>
void row_products(const TX* x, int64_t ldx, int64_t rows, const TY* y, int64_t ldy, int64_t J,
                  int64_t K, float* out, int64_t ldo) {
  int64_t n = 0;
  for (; n + kDotRows <= rows; n += kDotRows)
    dot_rows<kAdd, kDotRows>(x + n * ldx, ldx, y, ldy, J, K, out + n * ldo, ldo);
  for (; n < rows; ++n) dot_rows<kAdd, 1>(x + n * ldx, ldx, y, ldy, J, K, out + n * ldo, ldo);
}

// out[i, j] = sum_k x[i, k] * x[j, k] for i from ``begin`` to ``end`` and j from i to r, and more
// below the diagonal.  The diagonal's terms all have one sign, so that the errors of a long sum do
// not cancel: short sums are added.
template <typename TX>
void self_products(const TX* x, int64_t K, int64_t r, int64_t begin, int64_t end, float* out) {
  constexpr int64_t kShort = 512;
  for (int64_t i = begin; i < end; i += kDotRows) {
    const int64_t rows = smaller(end - i, kDotRows);
    const TX* from = x + i * K;
    float* o = out + i * r + i;
    row_products(from, K, rows, from, K, r - i, smaller(K, kShort), o, r);
    for (int64_t k = kShort; k < K; k += kShort)
      row_products<true>(from + k, K, rows, from + k, K, r - i, smaller(K - k, kShort), o, r);
  }
}

// left[n * row_step + j * col_step]
struct Left {
  const float* p;
  int64_t row_step, col_step;
  DK_INLINE Left from(int64_t j) const { return {p + j * col_step, row_step, col_step}; }
};

template <int J, int V, typename TX, typename Lanes, typename Finish>
DK_INLINE void outer_tile(Left left, const TX* x, int64_t ldx, int64_t rows, Lanes lanes,
                          const Finish& finish) {
  Floats sums[J][V], b[V];
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[j][v] = zero();

  const float* a = left.p;
  for (int64_t n = 0; n < rows; ++n, a += left.row_step, x += ldx) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) b[v] = take(x + v * kLanes, lanes);
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      const Floats one = set1(a[j * left.col_step]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[j][v] = fma(one, b[v], sums[j][v]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) finish(j, v * kLanes, sums[j][v], lanes);
}

template <int V, typename TX, typename Lanes, typename Finish>
DK_INLINE void outer_strip(Left left, int64_t J, const TX* x, int64_t ldx, int64_t rows, int64_t k,
                           Lanes lanes, const Finish& finish) {
  int64_t j = 0;
  const auto from_here = [&](int i, int64_t c, Floats sum, Lanes some) {
    finish(j + i, k + c, sum, some);
  };
  for (; j + kOuterRows <= J; j += kOuterRows)
    outer_tile<kOuterRows, V>(left.from(j), x + k, ldx, rows, lanes, from_here);
  for (; j + 2 <= J; j += 2) outer_tile<2, V>(left.from(j), x + k, ldx, rows, lanes, from_here);
  if (j < J) outer_tile<1, V>(left.from(j), x + k, ldx, rows, lanes, from_here);
}

// finish(j, k, sums, lanes) for all j < J and the vectors of columns k from ``begin`` to ``end``;
// lanes is Whole or Part, and sums are over n < rows of left[n, j] * x[n, k].
template <typename TX, typename Finish>
DK_INLINE void outer_products(Left left, int64_t J, const TX* x, int64_t ldx, int64_t rows,
                              int64_t begin, int64_t end, const Finish& finish) {
  constexpr int64_t kStrip = kOuterVectors * kLanes;
  int64_t k = begin;
  for (; k + kStrip <= end; k += kStrip)
    outer_strip<kOuterVectors>(left, J, x, ldx, rows, k, Whole{}, finish);
  for (; k + kLanes <= end; k += kLanes)
    outer_strip<1>(left, J, x, ldx, rows, k, Whole{}, finish);
  if (k < end) outer_strip<1>(left, J, x, ldx, rows, k, Part{end - k}, finish);
}

}  // namespace decomp_kernels::cpu::DK_LEVEL
