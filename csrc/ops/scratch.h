// Memory that one thread of a host kernel works in.

#pragma once

#include <cstdint>
#include <memory>

namespace decomp_kernels {

inline std::unique_ptr<float[]> scratch_floats(int64_t count) {
  return std::make_unique_for_overwrite<float[]>(size_t(count));
}

}  // namespace decomp_kernels
