// How operators on a weight are shared out among threads.  Results do not depend on it.

#pragma once

#include <cstdint>

namespace decomp_kernels {

inline constexpr int64_t kElementsPerThread = 1 << 16;  // fewer are not worth another thread

// Blocks that cover ``size``, without a sum that could pass 2^63.
inline int64_t blocks(int64_t size, int64_t block) { return size / block + (size % block != 0); }

// Units of work that a thread takes at least, where a unit reads ``elements``.
inline int64_t grain(int64_t elements) {
  return elements < 1 ? kElementsPerThread : blocks(kElementsPerThread, elements);
}

}  // namespace decomp_kernels
