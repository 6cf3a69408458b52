// out = out_scale * (W + scale * B core A) * in_scale (maths: merged_weight of
// decomp_kernels/reference/decomposed_linear.py).
//
//     W, out [N, K]   A = down [r, K]   B = up [N, r]   core [r]   in_scale [K]   out_scale [N]

#pragma once

#include <cstdint>

#include "dtype.h"
#include "levels.h"

namespace decomp_kernels::cpu {

inline constexpr int64_t kMergedRows = 8;  // rows of W in a unit of work

struct MergedWeightArgs {
  const void* weight;
  const void* down;        // null together with up: no low-rank branch, r = 0
  const void* up;
  Dtype weight_dtype, small_dtype;
  const float* core;       // null: ones, as the scales
  const float* in_scale;
  const float* out_scale;
  int64_t N, K, r;
  float scale;
  float* wide;  // [N, r]  scale * B * core
  void* out;    // of weight_dtype
};

DK_DECLARE_AT_LEVELS(void merged_weight(const MergedWeightArgs&, int64_t begin, int64_t end))

}  // namespace decomp_kernels::cpu
