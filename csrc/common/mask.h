// The dropout mask: SplitMix64 read as a counter (definition: decomp_kernels/reference/dropout.py).
//
//     word(i) = mix64(seed + (i / 4 + 1) * golden mod 2^64)     lane(i) = 16 bits of word at 16 * (i % 4)
//     element i = row * K + column is kept iff lane(i) >= threshold = round(p * 65536)

#pragma once

#include <cstdint>

#include "host_device.h"

namespace decomp_kernels {

inline constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;
inline constexpr uint64_t kMix1 = 0xBF58476D1CE4E5B9u;
inline constexpr uint64_t kMix2 = 0x94D049BB133111EBu;

// The word that holds the lanes of elements 4 * index to 4 * index + 3.
DK_HOST_DEVICE uint64_t mask_word(uint64_t seed, uint64_t index) {
  uint64_t z = seed + (index + 1) * kGolden;
  z = (z ^ (z >> 30)) * kMix1;
  z = (z ^ (z >> 27)) * kMix2;
  return z ^ (z >> 31);
}

DK_HOST_DEVICE bool lane_kept(uint64_t word, int lane, uint32_t threshold) {
  return (uint32_t(word >> (16 * lane)) & 0xFFFFu) >= threshold;
}

DK_HOST_DEVICE bool element_kept(uint64_t seed, uint64_t element, uint32_t threshold) {
  return lane_kept(mask_word(seed, element / 4), int(element % 4), threshold);
}

// Four bits, one for each of the elements first to first + 3; first need not be a multiple of 4.
DK_HOST_DEVICE uint32_t kept_four(uint64_t seed, uint64_t first, uint32_t threshold) {
  const int skipped = int(first % 4);
  const uint64_t word = mask_word(seed, first / 4);
  const uint64_t next = skipped ? mask_word(seed, first / 4 + 1) : 0;
  uint32_t bits = 0;
  for (int j = 0; j < 4; ++j) {
    const int lane = skipped + j;
    bits |= uint32_t(lane_kept(lane < 4 ? word : next, lane % 4, threshold)) << j;
  }
  return bits;
}

}  // namespace decomp_kernels
