// The decomposed linear's two large products in one kernel each, on sm_90a.
//
//     forward           z = x W^T + v B^T + addend         y = out_scale * z + bias
//     input gradient    dX = undrop(dt A) + g W            d_x = in_scale * dX
//                       d_in_scale = sum_m x * dX
//
// float32 accumulation and epilogue, one rounding at each store; the same bits every time.
// Shapes, strides and conditions: common/hopper_args.h.  With M or the output's columns empty there
// is nothing to do but to write zeros to d_in_scale.

#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "../common/hopper_args.h"

namespace decomp_kernels::cuda {

// Bytes, aligned to 4, for partial sums of d_in_scale; nothing is kept there between calls.
inline size_t workspace_bytes(const HopperForwardArgs&) { return 0; }
size_t workspace_bytes(const HopperInputGradientArgs& args);

// cudaErrorNotSupported: the driver cannot make tensor maps, or no instance for it is linked in.
cudaError_t launch(
    const HopperForwardArgs& args, void* workspace, int device_sms, cudaStream_t stream);
cudaError_t launch(
    const HopperInputGradientArgs& args, void* workspace, int device_sms, cudaStream_t stream);

// The shapes whose instances the library holds, as bits; 0: the operation cannot run in this type.
unsigned hopper_linked(HopperOp op, Dtype dtype);

}  // namespace decomp_kernels::cuda
