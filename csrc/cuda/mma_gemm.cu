// Launches of the mma.sync kernels: the forward, and the input gradient with and without dropout,
// for bf16 and fp16 and three tiles.

#include "mma_gemm.h"

#include <type_traits>

#include "mma_gemm.cuh"

namespace decomp_kernels::cuda {
namespace {

struct Launcher {
  cudaStream_t stream;

  template <typename... Arguments>
  int operator()(void (*kernel)(Arguments...), int64_t blocks, int threads, int shared_bytes,
                 const std::type_identity_t<Arguments>&... arguments) const {
    const cudaError_t allowed = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (allowed != cudaSuccess) return int(allowed);
    kernel<<<unsigned(blocks), threads, shared_bytes, stream>>>(arguments...);
    return int(cudaGetLastError());
  }
};

template <typename Arguments>
cudaError_t launch_any(const Arguments& a, int64_t cols, void* workspace, int device_sms,
                       cudaStream_t stream) {
  // What why_not says of the device is for the caller to ask: on an older one the launch fails.
  const bool refused = why_not(a, 80), lacks_memory = workspace_bytes(a) && !workspace;
  if (refused || lacks_memory) return cudaErrorInvalidValue;
  return cudaError_t(with_launches(a, choose_tile(a.M, cols, device_sms),
                                   static_cast<float*>(workspace), Launcher{stream}));
}

}  // namespace

cudaError_t launch(const MmaForward& a, void* workspace, int device_sms, cudaStream_t stream) {
  return launch_any(a, a.N, workspace, device_sms, stream);
}

cudaError_t launch(const MmaInputGradient& a, void* workspace, int device_sms,
                   cudaStream_t stream) {
  return launch_any(a, a.K, workspace, device_sms, stream);
}

}  // namespace decomp_kernels::cuda
