// bfloat16 and IEEE half as bits, with the conversions that both sides share.
// Rounding is to nearest, ties to even; a NaN stays a NaN; half overflows to infinity.

#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace decomp_kernels {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

DK_HOST_DEVICE float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

DK_HOST_DEVICE uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

DK_HOST_DEVICE float to_float(float x) { return x; }
DK_HOST_DEVICE float to_float(bf16 x) { return float_of_bits(uint32_t(x.bits) << 16); }

DK_HOST_DEVICE float to_float(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return float_of_bits(sign | 0x7F800000u | ((magnitude & 0x3FFu) << 13));
  // The exponent field moves from 5 bits to 8 in a product, which is exact for subnormals too.
  const float scaled = float_of_bits(magnitude << 13) * 0x1p112f;
  return float_of_bits(sign | bits_of_float(scaled));
}

// value rounded to T: from_float<bf16>(x).
template <typename T>
DK_HOST_DEVICE T from_float(float value);

template <>
DK_HOST_DEVICE float from_float<float>(float value) {
  return value;
}

template <>
DK_HOST_DEVICE bf16 from_float<bf16>(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return bf16{uint16_t((bits >> 16) | 0x40u)};
  return bf16{uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
DK_HOST_DEVICE fp16 from_float<fp16>(float value) {
  const uint32_t bits = bits_of_float(value), sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return fp16{uint16_t(sign | 0x7E00u)};
  if (magnitude >= 0x477FF000u) return fp16{uint16_t(sign | 0x7C00u)};  // 65,520 and above
  if (magnitude < 0x38800000u) {  // subnormal: the sum's own rounding drops what half has no place for
    const float sum = float_of_bits(magnitude) + 0.5f;
    return fp16{uint16_t(sign | (bits_of_float(sum) - 0x3F000000u))};
  }
  magnitude += 0xC8000FFFu + ((magnitude >> 13) & 1u);  // exponent bias 127 to 15, and the rounding
  return fp16{uint16_t(sign | (magnitude >> 13))};
}

}  // namespace decomp_kernels
