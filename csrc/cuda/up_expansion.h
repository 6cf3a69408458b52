// out = undrop(v small) + bias + addend, one rounding.
//
//     v [M, R]    small [R, C], given as it is (``down``) or transposed (``up``)
//     bias [C]    addend [M, C]    out [M, C]
//
// With a mask this is the branch's part of dX (small = A); without, its part of z (small = B^T).
// The caller divides by the kept fraction.  v and small are of out's type or float32, both of one;
// bias and addend may be absent.  out may be the addend itself.

#pragma once

#include "arguments.h"

namespace decomp_kernels::cuda {

struct UpExpansion {
  Matrix v = {};
  Matrix down = {}, up = {};  // [R, C] or [C, R]: one of them has data
  int64_t M = 0, C = 0, R = 0;
  Mask mask = {};
  Vector bias = {};
  Matrix addend = {};  // of out's type
  Output out = {};
};

// nullptr, or why there is no kernel for it.  arch: 10 * major + minor of the compute capability.
const char* why_not(const UpExpansion& args, int arch);

cudaError_t launch(const UpExpansion& args, void* workspace, int device_sms, cudaStream_t stream);

}  // namespace decomp_kernels::cuda
