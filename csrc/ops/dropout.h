// Dropout's arguments as the kernels take them (definition: decomp_kernels/reference/dropout.py).
//
//     threshold = round(p * 65536)    kept fraction = 1 - threshold / 65536

#pragma once

#include <cmath>

#include "checks.h"

namespace decomp_kernels {

struct Dropout {
  uint32_t threshold = 0;  // 0: nothing is dropped
  bool on() const { return threshold != 0; }
  float over_kept() const { return float(1.0 / (1.0 - threshold / 65536.0)); }
};

// Without a seed nothing is dropped.  seed: one int64 on the operator's device.
inline Dropout checked_dropout(const Checks& checks, const OptionalTensor& seed, double p) {
  checks.that(p >= 0.0 && p < 1.0, "dropout must be in [0, 1), got ", p);
  const double threshold = std::nearbyint(p * 65536.0);  // ties to even, as in Python
  checks.that(threshold < 65536.0, "dropout must keep something, got ", p);
  if (!seed) return {};
  checks.that(seed->numel() == 1, "seed must hold one element, got shape ", shape_text(*seed));
  checks.dtype(*seed, "seed", ScalarType::Long);
  checks.that(seed->is_cuda() == checks.on_cuda(), "seed must be on the operator's device");
  return {uint32_t(threshold)};
}

inline uint64_t host_seed(const OptionalTensor& seed) {
  return seed ? uint64_t(*static_cast<const int64_t*>(seed->const_data_ptr())) : 0;
}

}  // namespace decomp_kernels
