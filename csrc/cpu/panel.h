// A panel: kPanelRows x kPanelCols of a large matrix as the broadcast side of a tile product.
//
//     rows      element (i, k) is (row i, column k) of the matrix:    [kPanelRows, kLine / kPer]
//     columns   element (k, i) is (row k, column i):                  [kPanelRows / kPer, kLine]
//
// Each comes as floats or as bf16 pairs along k (tile_product.h), through the dropout mask or not.
// Small operands are laid out to match: [count, padded rank], zeros in the padding.

#pragma once

#include "panel_sizes.h"
#include "tile_product.h"

namespace decomp_kernels::cpu::DK_LEVEL {

inline constexpr int kLine = kPanelCols + 16;  // of a panel: neighbouring rows in different sets

// The mask of a panel, one bit an element; ``bits`` is null where nothing is dropped.
struct PanelMask {
  uint64_t bits[kPanelRows][kPanelCols / 64];
};

inline void draw(uint64_t seed, uint32_t threshold, int64_t row, int64_t column, int64_t width,
                 int64_t rows, int64_t cols, PanelMask* mask) {
  for (int64_t i = 0; i < rows; ++i)
    kept_bits(seed, uint64_t(row + i) * uint64_t(width) + uint64_t(column), cols, threshold,
              mask->bits[i]);
}

DK_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

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

// columns [r, count] of a small operand whose rows are ``stride`` apart, transposed: floats
// [count, padded].
template <typename T>
inline void transposed_floats(const T* small, int64_t stride, int64_t r, int64_t count,
                              int64_t padded, float* out) {
  for (int64_t j = 0; j < r; ++j)
    for (int64_t k = 0; k < count; ++k) out[k * padded + j] = to_float(small[j * stride + k]);
  for (int64_t k = 0; k < count; ++k) clear(out + k * padded + r, padded - r);
}

// [rows, count] of a small operand as the broadcast side: [rows up to kTileRows, line].
template <typename T>
inline void small_rows(const T* small, int64_t rows, int64_t count, int64_t line, float* out) {
  small_floats(small, count, rows, count, line, out);
  clear(out + rows * line, (up_to(rows, kTileRows) - rows) * line);
}

#ifdef DK_PAIRS

// 16 elements in the low halves of 32-bit lanes; zeros past the last column and where the mask is 0.
DK_INLINE __m512i halves_at(const bf16* line, int64_t j, int64_t cols, uint32_t bits = 0xFFFFu) {
  const uint32_t there = j + 16 <= cols ? 0xFFFFu : (1u << (cols - j)) - 1u;
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16(there & bits), line + j));
}

DK_INLINE uint32_t bits_at(const PanelMask* mask, int64_t i, int64_t j) {
  return mask ? uint32_t(mask->bits[i][j / 64] >> (j % 64)) & 0xFFFFu : 0xFFFFu;
}

// Pairs of neighbouring columns: what lies in memory.
inline void panel_of_row_pairs(const bf16* big, int64_t width, int64_t rows, int64_t cols,
                               const PanelMask* mask, float* panel) {
  for (int64_t i = 0; i < up_to(rows, kTileRows); ++i, big += width, panel += kLine / 2)
    for (int64_t j = 0; j < cols; j += 32) {
      uint32_t there = i < rows ? ~0u : 0u;
      if (j + 32 > cols) there &= (1u << (cols - j)) - 1u;
      if (mask && i < rows) there &= uint32_t(mask->bits[i][j / 64] >> (j % 64));
      const __m512i pairs = there == ~0u ? _mm512_loadu_si512(big + j)
                            : there      ? _mm512_maskz_loadu_epi16(there, big + j)
                                         : _mm512_setzero_si512();
      _mm512_storeu_si512(panel + j / 2, pairs);
    }
}

// Pairs of neighbouring rows, interleaved.
inline void panel_of_column_pairs(const bf16* big, int64_t width, int64_t rows, int64_t cols,
                                  const PanelMask* mask, float* panel) {
  for (int64_t i = 0; i < rows; i += 2, big += 2 * width, panel += kLine)
    for (int64_t j = 0; j < cols; j += 16) {
      const __m512i low = halves_at(big, j, cols, bits_at(mask, i, j));
      __m512i pairs = low;
      if (i + 1 < rows) {
        const __m512i high = halves_at(big + width, j, cols, bits_at(mask, i + 1, j));
        pairs = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
      }
      _mm512_storeu_si512(panel + j, pairs);
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

// Transposed, as pairs along count: [ceil(count / 2), padded].
inline void transposed_pairs(const bf16* small, int64_t stride, int64_t r, int64_t count,
                             int64_t padded, float* out) {
  for (int64_t j = 0; j < r; ++j)
    for (int64_t k = 0; k < count; k += 2) {
      const uint32_t high = k + 1 < count ? small[j * stride + k + 1].bits : 0;
      const uint32_t pair = high << 16 | small[j * stride + k].bits;
      memcpy(out + k / 2 * padded + j, &pair, sizeof pair);
    }
  for (int64_t k = 0; k < count; k += 2) clear(out + k / 2 * padded + r, padded - r);
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
  static void transposed(const bf16* small, int64_t stride, int64_t r, int64_t count, int64_t padded,
                         float* out) {
    transposed_pairs(small, stride, r, count, padded, out);
  }
  static void small_as_rows(const bf16* small, int64_t rows, int64_t count, int64_t line,
                            float* out) {
    small_row_pairs(small, rows, count, line, out);
  }
};
#endif

}  // namespace decomp_kernels::cpu::DK_LEVEL
