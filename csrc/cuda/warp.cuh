// A thread's place in its block of one dimension, and the sum over a warp.

#pragma once

#include "intrinsics.cuh"

namespace decomp_kernels::cuda {

__device__ __forceinline__ int lane_id() { return int(threadIdx.x) % 32; }
__device__ __forceinline__ int warp_id() { return int(threadIdx.x) / 32; }

// The sum over a warp, the same bits in every lane: addition commutes.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2)
    value += __shfl_xor_sync(0xFFFFFFFFu, value, distance);
  return value;
}

}  // namespace decomp_kernels::cuda
