// t = drop(x) down^T and v = phi(t) * core * scale (formulas: csrc/ops/down_projection.cpp).
//
// First down_projection_pack lays out ``down`` once for all rows, kPanelCols columns at a time.
// Then a unit of work is kProjectRows rows of x.

#pragma once

#include <cstdint>

#include "activation.h"
#include "dtype.h"
#include "levels.h"
#include "panel_sizes.h"

namespace decomp_kernels::cpu {

inline constexpr int64_t kProjectRows = 64;

struct DownProjection {
  const void* x;     // [M, K]
  const void* down;  // [r, K]
  const float* core;  // [r] or null
  float* packed;     // [K and some, padded rank], or half of that in pairs
  void* t;           // [M, r], the dtype of down
  void* v;           // the same, or null
  int64_t M, K, r;
  uint64_t seed;
  uint32_t threshold;  // 0: no mask
  float over_kept, scale;
  Activation activation;
  Dtype x_dtype, small_dtype;

  int64_t packs() const { return parts(K, kPanelCols); }
  int64_t units() const { return parts(M, kProjectRows); }
  int64_t packed_floats() const { return (K + 2 * kRankAlign) * padded_rank(r); }
  int64_t scratch_floats() const { return kProjectRows * padded_rank(r) + 16; }  // of one thread
};

DK_DECLARE_AT_LEVELS(void down_projection_pack(const DownProjection& args, int64_t begin,
                                               int64_t end))
// scratch: scratch_floats() that nobody else uses meanwhile.
DK_DECLARE_AT_LEVELS(void down_projection(const DownProjection& args, int64_t begin, int64_t end,
                                          float* scratch))

}  // namespace decomp_kernels::cpu
