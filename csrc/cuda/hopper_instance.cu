// One instance of the Hopper product, the one numbered DK_HOPPER_INSTANCE (common/hopper_tiles.h).
// Each is a translation unit of its own, tens of seconds long, so that a build chooses and runs
// them side by side; what is linked enters itself into the list (hopper_problem.h).
//
//     nvcc -std=c++20 -O3 -DNDEBUG --expt-relaxed-constexpr -gencode arch=compute_90a,code=sm_90a
//          -I<CUTLASS>/include -DDK_HOPPER_INSTANCE=3 -c hopper_instance.cu -o hopper_3.o

#include <algorithm>

#include "hopper_kernel.cuh"

#ifndef DK_HOPPER_INSTANCE
#error "compile with -DDK_HOPPER_INSTANCE=<0 to 15>"
#endif

namespace decomp_kernels::cuda {
namespace {

constexpr int kInstance = DK_HOPPER_INSTANCE;
constexpr HopperTile kTile = instance_tile(kInstance);
static_assert(kInstance >= 0 && kInstance < kHopperInstances);

cudaError_t launch_instance(
    const HopperMaps& maps, const void* problem, int device_sms, cudaStream_t stream) {
  const auto& p = *static_cast<const HopperProblem<kTile.op>*>(problem);
  const auto kernel = hopper_kernel<kInstance>;
  const cudaError_t raised = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kTile.shared_bytes());
  if (raised != cudaSuccess) return raised;

  // One block stays on each processor and takes tile after tile.
  const int clusters = int(std::clamp<int64_t>(device_sms / kTile.cluster, 1, p.grid.units()));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kTile.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(clusters * kTile.cluster);
  config.blockDim = dim3(kHopperThreads);
  config.dynamicSmemBytes = kTile.shared_bytes();
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, maps, p);
}

[[maybe_unused]] const HopperLaunch entered = hopper_launches[kInstance] = launch_instance;

}  // namespace
}  // namespace decomp_kernels::cuda
