// What the launching files of csrc/cuda use of CUDA's runtime, on the host: a stream is the seed of
// the order in which blocks and warps run.

#pragma once

#include <cstring>

enum cudaError_t { cudaSuccess, cudaErrorUnknown };

struct EmulatedStream {
  uint64_t seed;
  int64_t bank_conflicts = 0;  // of ldmatrix, in all launches
};
using cudaStream_t = EmulatedStream*;

inline cudaError_t cudaMemsetAsync(void* place, int value, size_t bytes, cudaStream_t) {
  std::memset(place, value, bytes);
  return cudaSuccess;
}

namespace decomp_kernels::cuda {

template <typename Parameters>
cudaError_t enqueue(void (*kernel)(Parameters), int64_t blocks, int threads, size_t shared,
                    cudaStream_t stream, const Parameters& parameters) {
  const cuda_on_host::Launch how{.grid = {unsigned(blocks)},
                                 .block = {unsigned(threads)},
                                 .shared = shared,
                                 .seed = stream->seed};
  const bool ran = cuda_on_host::launch(how, [&] { kernel(parameters); });
  stream->bank_conflicts += cuda_on_host::bank_conflicts;
  return ran ? cudaSuccess : cudaErrorUnknown;
}

}  // namespace decomp_kernels::cuda
