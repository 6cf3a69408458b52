// A panel: kPanelRows x kPanelCols of a large matrix as one side of a tile product.
//
//     rows      the broadcast side, a(i, k) = (row i, column k):    [kPanelRows, kLine / kPer]
//     columns   the side of vectors, b(k, j) = (row k, column j):   [kPanelRows / kPer, kLine]
//
// Each comes as floats or as bf16 pairs along k (tile_product.h), through the dropout mask or not.
// Small operands are laid out to match: [count, padded rank], zeros in the padding.

#pragma once

#include "panel_sizes.h"
#include "tile_product.h"

namespace decomp_kernels::cpu::DK_LEVEL {

inline constexpr int kLine = kPanelCols + 16;  // of a panel: neighbouring rows in different sets

// Rows of a panel: as many bytes of it for pairs as for floats.
template <typename Kind>
inline constexpr int64_t kHigh = kPanelRows * Kind::kPer;

// The mask of a panel, one bit an element; ``bits`` is null where nothing is dropped.
struct PanelMask {
  uint64_t bits[2 * kPanelRows][kPanelCols / 64];
};

inline void draw(uint64_t seed, uint32_t threshold, int64_t row, int64_t column, int64_t width,
                 int64_t rows, int64_t cols, PanelMask* mask) {
  for (int64_t i = 0; i < rows; ++i)
    kept_bits(seed, uint64_t(row + i) * uint64_t(width) + uint64_t(column), cols, threshold,
              mask->bits[i]);
}

DK_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t up_to(int64_t n, int64_t part) { return (n + part - 1) / part * part; }

// A row's vector of floats at column j, zeros past the last column.
template <typename T>
DK_INLINE Floats floats_at(const T* line, int64_t j, int64_t cols) {
  if (j + kLanes <= cols) return load(line + j);
  return j < cols ? load(line + j, cols - j) : zero();
}

template <typename T>
DK_INLINE void store_at(T* line, int64_t j, int64_t cols, Floats x) {
  if (j + kLanes <= cols) store(line + j, x);
  else store(line + j, x, cols - j);
}

DK_INLINE void clear(float* p, int64_t n) { memset(p, 0, size_t(n) * sizeof(float)); }

// The next address that is a multiple of 64 bytes.
DK_INLINE float* aligned(float* p) {
  return p + (64 - reinterpret_cast<uintptr_t>(p) % 64) % 64 / sizeof(float);
}

// Floats serve both as rows and as columns.
template <typename T>
inline void panel_of_floats(const T* big, int64_t width, int64_t rows, int64_t cols,
                            const PanelMask* mask, float* panel) {
  const int64_t whole = up_to(cols, kTileRows);
  for (int64_t i = 0; i < rows; ++i, big += width, panel += kLine)
    for (int64_t j = 0; j < whole; j += kLanes) {
      const Floats x = floats_at(big, j, cols);
      store(panel + j, mask ? keep(kept_lanes(mask->bits[i], j), x) : x);
    }
  for (int64_t i = rows; i < up_to(rows, kTileRows); ++i, panel += kLine)
    for (int64_t j = 0; j < whole; j += kLanes) store(panel + j, zero());
}

// [count, r] of a small operand, whose rows are ``stride`` apart, as floats [count, padded].
template <typename T>
inline void small_floats(const T* small, int64_t stride, int64_t count, int64_t r, int64_t padded,
                         float* out) {
  for (int64_t k = 0; k < count; ++k, small += stride, out += padded)
    for (int64_t j = 0; j < padded; j += kLanes)
      store(out + j, floats_at(small, j, r));
}

// from [rows, from_row] transposed: to [cols up to kLanes, to_row], whole vectors at both.
inline void transpose_out(const float* from, int64_t from_row, int64_t rows, int64_t cols,
                          float* to, int64_t to_row) {
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t j = 0; j < cols; j += kLanes) {
      Floats square[kLanes];
      for (int l = 0; l < kLanes; ++l)
        square[l] = i + l < rows ? load(from + (i + l) * from_row + j) : zero();
      transpose(square);
      for (int l = 0; l < kLanes; ++l) store(to + (j + l) * to_row + i, square[l]);
    }
}

// Columns [r, count] of a small operand, whose rows are ``stride`` apart, as floats [count up to
// kLanes, padded].
template <typename T>
inline void transposed_floats(const T* small, int64_t stride, int64_t r, int64_t count,
                              int64_t padded, float* out) {
  for (int64_t j = 0; j < padded; j += kLanes)
    for (int64_t k = 0; k < count; k += kLanes) {
      Floats square[kLanes];
      for (int l = 0; l < kLanes; ++l)
        square[l] = j + l < r ? floats_at(small + (j + l) * stride, k, count) : zero();
      transpose(square);
      for (int l = 0; l < kLanes; ++l) store(out + (k + l) * padded + j, square[l]);
    }
}

// [rows, count] of a small operand as the broadcast side: [rows up to kTileRows, line].
template <typename T>
inline void small_rows(const T* small, int64_t rows, int64_t count, int64_t line, float* out) {
  small_floats(small, count, rows, count, line, out);
  clear(out + rows * line, (up_to(rows, kTileRows) - rows) * line);
}

#ifdef DK_PAIRS

// 16 elements in the low halves of 32-bit lanes; zeros past the last column.
DK_INLINE __m512i halves_at(const bf16* line, int64_t j, int64_t cols) {
  const uint32_t there = j + 16 <= cols ? 0xFFFFu : (1u << (cols - j)) - 1u;
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16(there), line + j));
}

// 32 elements; zeros past the last column and where the mask is 0.
DK_INLINE __m512i narrow_at(const bf16* line, int64_t i, int64_t j, int64_t cols,
                            const PanelMask* mask) {
  uint32_t there = j + 32 <= cols ? ~0u : (1u << (cols - j)) - 1u;
  if (mask) there &= uint32_t(mask->bits[i][j / 64] >> (j % 64));
  return there == ~0u ? _mm512_loadu_si512(line + j)
                      : _mm512_maskz_loadu_epi16(__mmask32(there), line + j);
}

// Pairs of neighbouring columns: what lies in memory.
inline void panel_of_row_pairs(const bf16* big, int64_t width, int64_t rows, int64_t cols,
                               const PanelMask* mask, float* panel) {
  for (int64_t i = 0; i < rows; ++i, big += width, panel += kLine / 2)
    for (int64_t j = 0; j < cols; j += 32)
      _mm512_storeu_si512(panel + j / 2, narrow_at(big, i, j, cols, mask));
  for (int64_t i = rows; i < up_to(rows, kTileRows); ++i, panel += kLine / 2)
    clear(panel, kLine / 2);
}

// Pairs of neighbouring rows, interleaved.
inline void panel_of_column_pairs(const bf16* big, int64_t width, int64_t rows, int64_t cols,
                                  const PanelMask* mask, float* panel) {
  alignas(64) uint16_t order[2][32];  // element p of row 0 is p, of row 1 is 32 + p
  for (int p = 0; p < 32; ++p) {
    order[0][p] = uint16_t(p / 2 + 32 * (p % 2));
    order[1][p] = uint16_t(16 + order[0][p]);
  }
  const __m512i first = _mm512_load_si512(order[0]), second = _mm512_load_si512(order[1]);
  for (int64_t i = 0; i < rows; i += 2, big += 2 * width, panel += kLine)
    for (int64_t j = 0; j < cols; j += 32) {
      const __m512i low = narrow_at(big, i, j, cols, mask);
      const __m512i high =
          i + 1 < rows ? narrow_at(big + width, i + 1, j, cols, mask) : _mm512_setzero_si512();
      _mm512_storeu_si512(panel + j, _mm512_permutex2var_epi16(low, first, high));
      _mm512_storeu_si512(panel + j + 16, _mm512_permutex2var_epi16(low, second, high));
    }
}

// The same as pairs along count, [ceil(count / 2), padded].
inline void small_pairs(const bf16* small, int64_t stride, int64_t count, int64_t r, int64_t padded,
                        float* out) {
  for (int64_t k = 0; k < count; k += 2, small += 2 * stride, out += padded)
    for (int64_t j = 0; j < padded; j += 16) {
      __m512i pairs = _mm512_setzero_si512();
      if (j < r) {
        pairs = halves_at(small, j, r);
        if (k + 1 < count)
          pairs = _mm512_or_si512(pairs, _mm512_slli_epi32(halves_at(small + stride, j, r), 16));
      }
      _mm512_storeu_si512(out + j, pairs);
    }
}

// The broadcast side as pairs along count.
inline void small_row_pairs(const bf16* small, int64_t rows, int64_t count, int64_t line,
                            float* out) {
  for (int64_t i = 0; i < rows; ++i, small += count, out += line)
    for (int64_t j = 0; j < count; j += 32) {
      const __mmask32 there = j + 32 <= count ? ~0u : (1u << (count - j)) - 1u;
      _mm512_storeu_si512(out + j / 2, _mm512_maskz_loadu_epi16(there, small + j));
    }
  clear(out, (up_to(rows, kTileRows) - rows) * line);
}

// Transposed, as pairs along count: [ceil(count / 2) up to kLanes, padded].
inline void transposed_pairs(const bf16* small, int64_t stride, int64_t r, int64_t count,
                             int64_t padded, float* out) {
  for (int64_t j = 0; j < padded; j += 16)
    for (int64_t k = 0; k < count; k += 32) {
      const __mmask32 there = k + 32 <= count ? ~0u : (1u << (count - k)) - 1u;
      Floats square[16];
      for (int l = 0; l < 16; ++l) {
        const __m512i pairs =
            j + l < r ? _mm512_maskz_loadu_epi16(there, small + (j + l) * stride + k)
                      : _mm512_setzero_si512();
        square[l] = _mm512_castsi512_ps(pairs);
      }
      transpose(square);
      for (int l = 0; l < 16; ++l) store(out + (k / 2 + l) * padded + j, square[l]);
    }
}

#endif

// The forms by kind, so that an operator is written once.
template <typename Kind>
struct Panels;

template <>
struct Panels<Singles> {
  template <typename T>
  static void rows(const T* big, int64_t width, int64_t rows, int64_t cols, const PanelMask* mask,
                   float* panel) {
    panel_of_floats(big, width, rows, cols, mask, panel);
  }
  template <typename T>
  static void columns(const T* big, int64_t width, int64_t rows, int64_t cols,
                      const PanelMask* mask, float* panel) {
    panel_of_floats(big, width, rows, cols, mask, panel);
  }
  template <typename S>
  static void small(const S* small, int64_t stride, int64_t count, int64_t r, int64_t padded,
                    float* out) {
    small_floats(small, stride, count, r, padded, out);
  }
  template <typename S>
  static void transposed(const S* small, int64_t stride, int64_t r, int64_t count, int64_t padded,
                         float* out) {
    transposed_floats(small, stride, r, count, padded, out);
  }
  template <typename S>
  static void small_as_rows(const S* small, int64_t rows, int64_t count, int64_t line, float* out) {
    small_rows(small, rows, count, line, out);
  }
};

#ifdef DK_PAIRS
template <>
struct Panels<Pairs> {
  static void rows(const bf16* big, int64_t width, int64_t rows, int64_t cols,
                   const PanelMask* mask, float* panel) {
    panel_of_row_pairs(big, width, rows, cols, mask, panel);
  }
  static void columns(const bf16* big, int64_t width, int64_t rows, int64_t cols,
                      const PanelMask* mask, float* panel) {
    panel_of_column_pairs(big, width, rows, cols, mask, panel);
  }
  static void small(const bf16* small, int64_t stride, int64_t count, int64_t r, int64_t padded,
                    float* out) {
    small_pairs(small, stride, count, r, padded, out);
  }
  static void transposed(const bf16* small, int64_t stride, int64_t r, int64_t count,
                         int64_t padded, float* out) {
    transposed_pairs(small, stride, r, count, padded, out);
  }
  static void small_as_rows(const bf16* small, int64_t rows, int64_t count, int64_t line,
                            float* out) {
    small_row_pairs(small, rows, count, line, out);
  }
};
#endif

}  // namespace decomp_kernels::cpu::DK_LEVEL
