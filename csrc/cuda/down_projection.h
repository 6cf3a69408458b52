// t = drop(x) (down * in_scale)^T / kept fraction        v = phi(t) * core * scale
//
//     x [M, K]    down [R, K], x's type or float32    in_scale [K]    core [R]    t, v [M, R]
//
// t, v or both: no data where one is not asked for.  v is made from t as rounded to its type, as a
// backward that is given t sees it (t's type counts where t itself is not stored).  Sums are
// float32; with down in float32 they keep its precision, and x is not converted in memory.

#pragma once

#include "arguments.h"

namespace decomp_kernels::cuda {

struct DownProjection {
  Matrix x = {}, down = {};
  int64_t M = 0, K = 0, R = 0;
  Vector in_scale = {};
  Mask mask = {};
  Vector core = {};
  float scale = 1.0f;
  Activation activation = Activation::kIdentity;
  Output t = {}, v = {};
};

// nullptr, or why there is no kernel for it.  arch: 10 * major + minor of the compute capability.
const char* why_not(const DownProjection& args, int arch);

// Few rows leave multiprocessors idle, so K is split among blocks, and their sums pass through
// here.  How many there are depends on device_sms: the same bits each time are those of one device.
// For the arguments of the launch, results included.
size_t workspace_bytes(const DownProjection& args, int device_sms);

cudaError_t launch(const DownProjection& args, void* workspace, int device_sms,
                   cudaStream_t stream);

}  // namespace decomp_kernels::cuda
