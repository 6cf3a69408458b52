// What a launch of the Hopper product hands to the device, and the list of what is linked.

#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <type_traits>

#include "../common/hopper_epilogue.h"

namespace decomp_kernels::cuda {

struct HopperMaps {
  CUtensorMap left, right, small_left, small_right, out, z;
};

template <HopperOp op>
struct HopperProblem {
  int rows, cols, inner, rank;
  TileGrid grid;
  const int64_t* seed;  // null: no mask
  uint32_t threshold;
  std::conditional_t<op == HopperOp::kForward, ForwardEnd, GradientEnd> end;
};

// problem: a HopperProblem of the instance's operation.
using HopperLaunch = cudaError_t (*)(
    const HopperMaps& maps, const void* problem, int device_sms, cudaStream_t stream);

// Each compiled instance enters itself as the library loads; null: not linked.
extern HopperLaunch hopper_launches[kHopperInstances];

}  // namespace decomp_kernels::cuda
