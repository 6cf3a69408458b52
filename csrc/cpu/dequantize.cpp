// w = level[code] * absmax, or code * (absmax / 127), rounded once to out's dtype
//
// A block of nf4 has one absmax, so 16 products: they are made and rounded once, and each code then
// picks one from registers, two codes a byte and 16 bytes at a time.

#define DK_EXACT_SUBNORMALS
#include "dequantize.h"

#include "quantized.h"
#include "simd.h"

namespace decomp_kernels::cpu::DK_LEVEL {
namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T>
struct Table {
  alignas(64) T values[16];

  explicit Table(float absmax) {
    alignas(64) static constexpr float levels[16] = DK_NF4_LEVELS;
    for (int i = 0; i < 16; i += kLanes) store(values + i, load(levels + i) * set1(absmax));
  }
};

// The values of ``count`` codes, which begin at a whole byte.
template <typename T>
DK_INLINE void look_up(const Table<T>& table, const uint8_t* bytes, T* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = table.values[nf4_code(bytes[i / 2], int(i % 2))];
}

#if defined(__AVX2__)
// 32 codes in order, from 16 bytes.
DK_INLINE void unpack(const uint8_t* bytes, __m128i codes[2]) {
  const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  const __m128i low_bits = _mm_set1_epi8(15);
  const __m128i first = _mm_and_si128(_mm_srli_epi16(both, 4), low_bits);
  const __m128i second = _mm_and_si128(both, low_bits);
  codes[0] = _mm_unpacklo_epi8(first, second);
  codes[1] = _mm_unpackhi_epi8(first, second);
}
#endif

#if defined(__AVX512F__)
DK_INLINE void look_up_32(const Table<float>& table, const uint8_t* bytes, float* out) {
  __m128i codes[2];
  unpack(bytes, codes);
  const __m512 values = _mm512_load_ps(table.values);
  for (int half = 0; half < 2; ++half)
    store(out + 16 * half, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(codes[half]), values));
}

DK_INLINE void look_up_32(const Table<bf16>& table, const uint8_t* bytes, bf16* out) {
  __m128i codes[2];
  unpack(bytes, codes);
  const __m256i values = _mm256_load_si256(reinterpret_cast<const __m256i*>(table.values));
  const __m512i index = _mm512_cvtepu8_epi16(_mm256_set_m128i(codes[1], codes[0]));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, _mm512_castsi256_si512(values)));
}
#elif defined(__AVX2__)
DK_INLINE void look_up_32(const Table<float>& table, const uint8_t* bytes, float* out) {
  __m128i codes[2];
  unpack(bytes, codes);
  const __m256 low = _mm256_load_ps(table.values), high = _mm256_load_ps(table.values + 8);
  for (int part = 0; part < 4; ++part) {
    const __m128i eight = part % 2 ? _mm_srli_si128(codes[part / 2], 8) : codes[part / 2];
    const __m256i index = _mm256_cvtepu8_epi32(eight);
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // its sign: bit 3
    store(out + 8 * part, _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                           _mm256_permutevar8x32_ps(high, index), upper));
  }
}

DK_INLINE void look_up_32(const Table<bf16>& table, const uint8_t* bytes, bf16* out) {
  __m128i codes[2];
  unpack(bytes, codes);
  const __m128i* values = reinterpret_cast<const __m128i*>(table.values);
  const __m128i a = _mm_load_si128(values), b = _mm_load_si128(values + 1);
  const __m128i low_byte = _mm_set1_epi16(0xFF);  // of each value, 16 side by side
  const __m128i low = _mm_packus_epi16(_mm_and_si128(a, low_byte), _mm_and_si128(b, low_byte));
  const __m128i high = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
  __m128i* to = reinterpret_cast<__m128i*>(out);
  for (int half = 0; half < 2; ++half) {
    const __m128i lows = _mm_shuffle_epi8(low, codes[half]);
    const __m128i highs = _mm_shuffle_epi8(high, codes[half]);
    _mm_storeu_si128(to + 2 * half, _mm_unpacklo_epi8(lows, highs));
    _mm_storeu_si128(to + 2 * half + 1, _mm_unpackhi_epi8(lows, highs));
  }
}
#else
template <typename T>
DK_INLINE void look_up_32(const Table<T>& table, const uint8_t* bytes, T* out) {
  look_up(table, bytes, out, 32);
}
#endif

template <typename T>
void nf4_units(const DequantizeArgs& a, int64_t begin, int64_t end) {
  const uint8_t* bytes = static_cast<const uint8_t*>(a.codes);
  T* out = static_cast<T*>(a.out);
  const int64_t last = smaller(end * kNf4Elements, a.rows * a.cols);
  for (int64_t i = begin * kNf4Elements; i < last;) {
    const int64_t stop = smaller(i - i % a.block + a.block, last);
    const Table<T> table(a.absmax[i / a.block]);
    for (; i + 32 <= stop; i += 32) look_up_32(table, bytes + i / 2, out + i);
    look_up(table, bytes + i / 2, out + i, stop - i);
    i = stop;
  }
}

DK_INLINE Floats floats_of(const int8_t* codes) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#else
  return Floats{float(codes[0]), float(codes[1]), float(codes[2]), float(codes[3])};
#endif
}

template <typename T>
void int8_rows(const DequantizeArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int8_t* codes = static_cast<const int8_t*>(a.codes) + row * a.cols;
    T* out = static_cast<T*>(a.out) + row * a.cols;
    const float step = a.absmax[row] / 127.0f;
    int64_t k = 0;
    for (; k + kLanes <= a.cols; k += kLanes) store(out + k, floats_of(codes + k) * set1(step));
    if (k < a.cols) {
      int8_t rest[kLanes] = {};
      for (int64_t j = 0; j < a.cols - k; ++j) rest[j] = codes[k + j];
      store(out + k, floats_of(rest) * set1(step), a.cols - k);
    }
  }
}

}  // namespace

void dequantize_nf4(const DequantizeArgs& a, int64_t begin, int64_t end) {
  a.dtype == Dtype::kFloat ? nf4_units<float>(a, begin, end) : nf4_units<bf16>(a, begin, end);
}

void dequantize_int8(const DequantizeArgs& a, int64_t begin, int64_t end) {
  a.dtype == Dtype::kFloat ? int8_rows<float>(a, begin, end) : int8_rows<bf16>(a, begin, end);
}

}  // namespace decomp_kernels::cpu::DK_LEVEL
