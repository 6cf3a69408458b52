// Launches of the mma.sync forms of the decomposed linear: arguments and maths in mma_arguments.h.
//
// sm_80 and later; bf16 and fp16; any sizes, ranks and strides between rows.  Rows that begin at
// multiples of 16 bytes are read by cp.async, others element by element.

#pragma once

#include <cuda_runtime_api.h>

#include "mma_arguments.h"

namespace decomp_kernels::cuda {

// device_sms chooses the tile.  workspace: workspace_bytes(arguments) bytes, used in the stream's
// order; null where that is 0.  Arguments that why_not refuses give cudaErrorInvalidValue.
cudaError_t launch(const MmaForward& arguments, void* workspace, int device_sms,
                   cudaStream_t stream);
cudaError_t launch(const MmaInputGradient& arguments, void* workspace, int device_sms,
                   cudaStream_t stream);

inline size_t workspace_bytes(const MmaForward&) { return 0; }

}  // namespace decomp_kernels::cuda
