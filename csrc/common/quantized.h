// 4-bit NormalFloat and 8-bit row-wise codes to floats.
//
// NF4 (QLoRA, arXiv 2305.14314, appendix E): 16 levels, two codes a byte, the first in the high four
// bits, one float32 absmax for each block of consecutive elements.   w = level[code] * absmax
// int8 (LLM.int8(), arXiv 2208.07339): one float32 absmax for each row.   w = code * absmax / 127

#pragma once

#include <cstdint>

#include "host_device.h"

namespace decomp_kernels {

#define DK_NF4_LEVELS                                                                              \
  {                                                                                                \
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,                      \
        -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,                 \
        0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,    \
        0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f                       \
  }

DK_HOST_DEVICE float nf4_level(int code) {
  constexpr float levels[16] = DK_NF4_LEVELS;
  return levels[code];
}

// The code of element ``first + lane`` (lane 0 or 1) of the byte that holds both.
DK_HOST_DEVICE int nf4_code(uint8_t byte, int lane) { return lane ? byte & 15 : byte >> 4; }

DK_HOST_DEVICE float int8_value(int8_t code, float absmax) { return float(code) * (absmax / 127.0f); }

}  // namespace decomp_kernels
