// out = out_scale * (W + scale * (up * core) down) * in_scale, float32 inside, one rounding.
//
//     W, out [N, K]    up [N, R]    down [R, K]    core [R]    in_scale [K]    out_scale [N]
//
// up and down are of W's type or float32, both of one, or both absent; so may core and the scales
// be. W has any stride between columns too.  out may be W where W is contiguous.

#pragma once

#include "arguments.h"

namespace decomp_kernels::cuda {

struct MergedWeight {
  Matrix weight = {};
  int64_t weight_column_stride = 1;
  Matrix up = {}, down = {};
  int64_t N = 0, K = 0, R = 0;
  Vector core = {}, in_scale = {}, out_scale = {};
  float scale = 1.0f;
  Output out = {};
};

// nullptr, or why there is no kernel for it.  arch: 10 * major + minor of the compute capability.
const char* why_not(const MergedWeight& args, int arch);

cudaError_t launch(const MergedWeight& args, void* workspace, int device_sms, cudaStream_t stream);

}  // namespace decomp_kernels::cuda
