// w = level[code] * absmax, or code * (absmax / 127) (decomp_kernels/reference/dequantize.py).
//
//     codes: nf4 [ceil(rows * cols / 2)] bytes, int8 [rows, cols]     out [rows, cols]
//     absmax: nf4 [ceil(rows * cols / block)], int8 [rows]

#pragma once

#include <cstdint>

#include "dtype.h"
#include "levels.h"

namespace decomp_kernels::cpu {

inline constexpr int64_t kSmallestBlock = 32;      // of nf4, a power of two as all are
inline constexpr int64_t kNf4Elements = 1 << 12;  // in a unit of work

struct DequantizeArgs {
  const void* codes;
  const float* absmax;
  void* out;
  Dtype dtype;  // of out: float32 or bfloat16
  int64_t rows, cols;
  int64_t block;  // nf4
};

// Over ranges of kNf4Elements, and of rows.
DK_DECLARE_AT_LEVELS(void dequantize_nf4(const DequantizeArgs&, int64_t begin, int64_t end))
DK_DECLARE_AT_LEVELS(void dequantize_int8(const DequantizeArgs&, int64_t begin, int64_t end))

}  // namespace decomp_kernels::cpu
