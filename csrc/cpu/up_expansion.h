// out = bias + addend + mask(v small) (formulas: csrc/ops/up_expansion.cpp).
//
// A unit of work is kExpandRows x kPanelCols of out.

#pragma once

#include <cstdint>

#include "dtype.h"
#include "levels.h"
#include "panel_sizes.h"

namespace decomp_kernels::cpu {

inline constexpr int64_t kExpandRows = 256;

struct UpExpansion {
  const void* v;       // [M, r]
  const void* small;   // [r, N], the dtype of v
  const void* bias;    // [N] or null
  const void* addend;  // [M, N], the dtype of out, or null
  void* out;           // [M, N]
  int64_t M, N, r;
  uint64_t seed;
  uint32_t threshold;  // 0: no mask
  Dtype small_dtype, bias_dtype, out_dtype;

  int64_t strips() const { return parts(N, kPanelCols); }
  int64_t units() const { return parts(M, kExpandRows) * strips(); }
  int64_t scratch_floats() const {  // of one thread
    return (kPanelCols + kExpandRows) * padded_rank(r) + 16;
  }
};

// scratch: scratch_floats() that nobody else uses meanwhile.
DK_DECLARE_AT_LEVELS(void up_expansion(const UpExpansion& args, int64_t begin, int64_t end,
                                       float* scratch))

}  // namespace decomp_kernels::cpu
