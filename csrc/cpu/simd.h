// Vectors of floats at the level that a file is compiled for, and what host kernels do with them.
//
//     Floats        kLanes floats: 16 (AVX-512), 8 (AVX2) or 4 (the compiler's own vectors)
//     Mask          one truth value for each lane
//     load, store   float or bf16 memory, whole or the first n lanes; nothing after them is touched
//     dot_pairs     acc + a0 * b0 + a1 * b1 of bf16 pairs (VDPBF16PS), where kDots says so
//     kept_bits     the dropout mask of consecutive elements, one bit each
//
//     transpose     kLanes vectors as the rows of a square
//
// Operators +, -, * and / work on Floats.  Rounding to bf16 is that of common/narrow.h bit for bit,
// but for subnormal numbers at avx512_bf16: VCVTNEPS2BF16 makes them 0, and is one instruction
// where their exact rounding takes ten.  A file that makes weights defines DK_EXACT_SUBNORMALS.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)  // GCC 12 warns of its own header's undefined vectors
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

#include "levels.h"
#include "mask.h"
#include "narrow.h"

#define DK_INLINE inline __attribute__((always_inline))

namespace decomp_kernels::cpu::DK_LEVEL {

#if defined(__AVX512F__)

inline constexpr int kLanes = 16;
using Floats = __m512;
using Mask = __mmask16;

DK_INLINE Floats set1(float value) { return _mm512_set1_ps(value); }
DK_INLINE Floats zero() { return _mm512_setzero_ps(); }
DK_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
DK_INLINE Floats sqrt(Floats a) { return _mm512_sqrt_ps(a); }

DK_INLINE Mask first_lanes(int64_t n) { return Mask((1u << n) - 1u); }  // 0 <= n <= kLanes
DK_INLINE Mask lanes_of_bits(uint32_t bits) { return Mask(bits); }      // bit l: lane l
DK_INLINE Floats keep(Mask mask, Floats a) { return _mm512_maskz_mov_ps(mask, a); }

DK_INLINE Floats load(const float* p) { return _mm512_loadu_ps(p); }
DK_INLINE Floats load(const bf16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
DK_INLINE Floats load(const float* p, Mask mask) { return _mm512_maskz_loadu_ps(mask, p); }
DK_INLINE Floats load(const bf16* p, Mask mask) {
  const __m256i half = _mm256_maskz_loadu_epi16(mask, p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

#if defined(__AVX512BF16__) && !defined(DK_EXACT_SUBNORMALS)
DK_INLINE __m256i rounded(Floats a) { return (__m256i)_mm512_cvtneps_pbh(a); }
#else
DK_INLINE __m256i rounded(Floats a) {
  const __m512i bits = _mm512_castps_si512(a), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  sum = _mm512_mask_or_epi32(sum, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16));
}
#endif
DK_INLINE void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
DK_INLINE void store(bf16* p, Floats a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded(a));
}
DK_INLINE void store(float* p, Floats a, Mask mask) { _mm512_mask_storeu_ps(p, mask, a); }
DK_INLINE void store(bf16* p, Floats a, Mask mask) {
  _mm256_mask_storeu_epi16(p, mask, rounded(a));
}

// The sum of the lanes, in the same order at every call.
DK_INLINE float reduce_add(Floats a) {
  const __m256 low = _mm512_castps512_ps256(a), high = _mm512_extractf32x8_ps(a, 1);
  const __m256 eight = _mm256_add_ps(low, high);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

DK_INLINE void transpose(Floats (&row)[kLanes]) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_castps_si512(row[i]);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // a[4 g + c]: in its quarter q, column 4 q + c of rows 4 g to 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i even01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88);
    const __m512i odd01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xDD);
    const __m512i even23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xDD);
    row[c] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(even01, even23, 0x88));
    row[4 + c] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(odd01, odd23, 0x88));
    row[8 + c] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(even01, even23, 0xDD));
    row[12 + c] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(odd01, odd23, 0xDD));
  }
}

// 64 bits: the mask of the elements of words index to index + 15.
DK_INLINE uint64_t kept_64(uint64_t seed, uint64_t index, uint32_t threshold) {
  const __m512i lanes = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i golden = _mm512_set1_epi64(int64_t(kGolden));
  const __m512i lowest_kept = _mm512_set1_epi16(int16_t(threshold));
  const __m512i steps = _mm512_mullo_epi64(lanes, golden);
  uint64_t bits = 0;
  for (int half = 0; half < 2; ++half) {
    const uint64_t first = seed + (index + uint64_t(8 * half) + 1) * kGolden;
    __m512i z = _mm512_add_epi64(_mm512_set1_epi64(int64_t(first)), steps);
    z = _mm512_xor_si512(z, _mm512_srli_epi64(z, 30));
    z = _mm512_mullo_epi64(z, _mm512_set1_epi64(int64_t(kMix1)));
    z = _mm512_xor_si512(z, _mm512_srli_epi64(z, 27));
    z = _mm512_mullo_epi64(z, _mm512_set1_epi64(int64_t(kMix2)));
    z = _mm512_xor_si512(z, _mm512_srli_epi64(z, 31));
    bits |= uint64_t(_mm512_cmpge_epu16_mask(z, lowest_kept)) << (32 * half);
  }
  return bits;
}

#elif defined(__AVX2__)

inline constexpr int kLanes = 8;
using Floats = __m256;
using Mask = __m256i;

DK_INLINE Floats set1(float value) { return _mm256_set1_ps(value); }
DK_INLINE Floats zero() { return _mm256_setzero_ps(); }
DK_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
DK_INLINE Floats sqrt(Floats a) { return _mm256_sqrt_ps(a); }

DK_INLINE Mask first_lanes(int64_t n) {  // 0 <= n <= kLanes
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
DK_INLINE Mask lanes_of_bits(uint32_t bits) {  // bit l: lane l
  const __m256i one_each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), one_each), one_each);
}
DK_INLINE Floats keep(Mask mask, Floats a) { return _mm256_and_ps(_mm256_castsi256_ps(mask), a); }

DK_INLINE Floats widened(__m128i half) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
DK_INLINE Floats load(const float* p) { return _mm256_loadu_ps(p); }
DK_INLINE Floats load(const bf16* p) {
  return widened(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
DK_INLINE Floats load(const float* p, Mask mask) { return _mm256_maskload_ps(p, mask); }
DK_INLINE Floats load(const bf16* p, Mask mask) {
  const uint32_t bits = uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(mask)));
  alignas(16) uint16_t half[kLanes] = {};
  for (int l = 0; l < kLanes; ++l)
    if (bits >> l & 1u) half[l] = p[l].bits;
  return widened(_mm_load_si128(reinterpret_cast<const __m128i*>(half)));
}

DK_INLINE __m128i rounded(Floats a) {
  const __m256i bits = _mm256_castps_si256(a), one = _mm256_set1_epi32(1);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
  const __m256 chosen = _mm256_blendv_ps(_mm256_castsi256_ps(sum), _mm256_castsi256_ps(quiet), nan);
  const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(chosen), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
DK_INLINE void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }
DK_INLINE void store(bf16* p, Floats a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), rounded(a));
}
DK_INLINE void store(float* p, Floats a, Mask mask) { _mm256_maskstore_ps(p, mask, a); }
DK_INLINE void store(bf16* p, Floats a, Mask mask) {
  const uint32_t bits = uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(mask)));
  alignas(16) uint16_t half[kLanes];
  _mm_store_si128(reinterpret_cast<__m128i*>(half), rounded(a));
  for (int l = 0; l < kLanes; ++l)
    if (bits >> l & 1u) p[l].bits = half[l];
}

// The sum of the lanes, in the same order at every call.
DK_INLINE float reduce_add(Floats a) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

DK_INLINE void transpose(Floats (&row)[kLanes]) {
  Floats a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xEE);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xEE);
  }
  for (int c = 0; c < 4; ++c) {
    row[c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
    row[4 + c] = _mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
  }
}

// The low 64 bits of each product, of three 32-bit products.
DK_INLINE __m256i times_64(__m256i a, uint64_t constant) {
  const __m256i b = _mm256_set1_epi64x(int64_t(constant));
  const __m256i low = _mm256_mul_epu32(a, b);
  const __m256i cross = _mm256_add_epi64(_mm256_mul_epu32(_mm256_srli_epi64(a, 32), b),
                                         _mm256_mul_epu32(a, _mm256_srli_epi64(b, 32)));
  return _mm256_add_epi64(low, _mm256_slli_epi64(cross, 32));
}

// 64 bits: the mask of the elements of words index to index + 15.
DK_INLINE uint64_t kept_64(uint64_t seed, uint64_t index, uint32_t threshold) {
  const __m256i steps = times_64(_mm256_setr_epi64x(0, 1, 2, 3), kGolden);
  const __m256i lowest_kept = _mm256_set1_epi16(int16_t(threshold));
  uint64_t bits = 0;
  for (int part = 0; part < 4; ++part) {
    const uint64_t first = seed + (index + uint64_t(4 * part) + 1) * kGolden;
    __m256i z = _mm256_add_epi64(_mm256_set1_epi64x(int64_t(first)), steps);
    z = times_64(_mm256_xor_si256(z, _mm256_srli_epi64(z, 30)), kMix1);
    z = times_64(_mm256_xor_si256(z, _mm256_srli_epi64(z, 27)), kMix2);
    z = _mm256_xor_si256(z, _mm256_srli_epi64(z, 31));
    const __m256i kept = _mm256_cmpeq_epi16(_mm256_max_epu16(z, lowest_kept), z);
    const __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
    bits |= uint64_t(uint32_t(_mm_movemask_epi8(bytes))) << (16 * part);
  }
  return bits;
}

#else

inline constexpr int kLanes = 4;
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(16)));

DK_INLINE Floats set1(float value) { return Floats{value, value, value, value}; }
DK_INLINE Floats zero() { return Floats{}; }
DK_INLINE Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
DK_INLINE Floats sqrt(Floats a) {
  for (int l = 0; l < kLanes; ++l) a[l] = __builtin_sqrtf(a[l]);
  return a;
}

DK_INLINE Mask first_lanes(int64_t n) {  // 0 <= n <= kLanes
  const int32_t count = int32_t(n);
  return Mask{0, 1, 2, 3} < Mask{count, count, count, count};
}
DK_INLINE Mask lanes_of_bits(uint32_t bits) {  // bit l: lane l
  const int32_t word = int32_t(bits);
  return (Mask{word, word, word, word} & Mask{1, 2, 4, 8}) != Mask{};
}
DK_INLINE Floats keep(Mask mask, Floats a) {
  return reinterpret_cast<Floats>(mask & reinterpret_cast<Mask>(a));
}

DK_INLINE Floats load(const float* p) {
  Floats a;
  memcpy(&a, p, sizeof a);
  return a;
}
DK_INLINE Floats load(const bf16* p) {
  return Floats{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
template <typename T>
DK_INLINE Floats load(const T* p, Mask mask) {
  Floats a = zero();
  for (int l = 0; l < kLanes; ++l)
    if (mask[l]) a[l] = to_float(p[l]);
  return a;
}

DK_INLINE void store(float* p, Floats a) { memcpy(p, &a, sizeof a); }
DK_INLINE void store(bf16* p, Floats a) {
  for (int l = 0; l < kLanes; ++l) p[l] = from_float<bf16>(a[l]);
}
template <typename T>
DK_INLINE void store(T* p, Floats a, Mask mask) {
  for (int l = 0; l < kLanes; ++l)
    if (mask[l]) p[l] = from_float<T>(a[l]);
}

// The sum of the lanes, in the same order at every call.
DK_INLINE float reduce_add(Floats a) { return (a[0] + a[2]) + (a[1] + a[3]); }

DK_INLINE void transpose(Floats (&row)[kLanes]) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < i; ++j) {
      const float above = row[j][i];
      row[j][i] = row[i][j];
      row[i][j] = above;
    }
}

// 64 bits: the mask of the elements of words index to index + 15.
DK_INLINE uint64_t kept_64(uint64_t seed, uint64_t index, uint32_t threshold) {
  uint64_t bits = 0;
  for (int w = 0; w < 16; ++w) {
    const uint64_t word = mask_word(seed, index + uint64_t(w));
    for (int lane = 0; lane < 4; ++lane)
      bits |= uint64_t(lane_kept(word, lane, threshold)) << (4 * w + lane);
  }
  return bits;
}

#endif

template <typename T>
DK_INLINE Floats load(const T* p, int64_t n) {  // lanes n and above are 0
  return load(p, first_lanes(n));
}
template <typename T>
DK_INLINE void store(T* p, Floats a, int64_t n) {
  store(p, a, first_lanes(n));
}

// Two neighbouring vectors.
DK_INLINE void store(float* p, Floats a, Floats b) {
  store(p, a);
  store(p + kLanes, b);
}
DK_INLINE void store(bf16* p, Floats a, Floats b) {
#if defined(__AVX512BF16__) && !defined(DK_EXACT_SUBNORMALS)
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b, a));
#else
  store(p, a);
  store(p + kLanes, b);
#endif
}

// Sums of products of bf16 pairs.  A pair is one 32-bit element, its first half in the low 16 bits.
// Products are exact and sums float32; subnormal inputs and results count as 0 (the instruction's
// own arithmetic), which no sum of ordinary terms can notice.
#if defined(__AVX512BF16__)
inline constexpr bool kDots = true;
DK_INLINE Floats dot_pairs(Floats a, Floats b, Floats acc) {
  return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
}
#else
inline constexpr bool kDots = false;
#endif

// One bit for each of ``count`` consecutive elements from ``first`` on, element j in bit j % 64 of
// bits[j / 64]; the bits after the last are of elements that follow.  threshold <= 65,535.
inline void kept_bits(uint64_t seed, uint64_t first, int64_t count, uint32_t threshold,
                      uint64_t* bits) {
  const int skipped = int(first % 4);  // elements of the first word that come before ``first``
  uint64_t index = first / 4, here = 0;
  if (skipped) here = kept_64(seed, index, threshold);
  for (int64_t j = 0; j < count; j += 64, index += 16) {
    if (!skipped) {
      bits[j / 64] = kept_64(seed, index, threshold);
      continue;
    }
    const uint64_t next = kept_64(seed, index + 16, threshold);
    bits[j / 64] = here >> skipped | next << (64 - skipped);
    here = next;
  }
}

// The bits of elements j to j + kLanes - 1; j a multiple of kLanes.
DK_INLINE Mask kept_lanes(const uint64_t* bits, int64_t j) {
  return lanes_of_bits(uint32_t(bits[j / 64] >> (j % 64)));
}

}  // namespace decomp_kernels::cpu::DK_LEVEL
