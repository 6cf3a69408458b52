// Launches of the down projection (interface and formula: down_projection.h).

#include "down_projection.cuh"

namespace decomp_kernels::cuda {

const char* why_not(const DownProjection& args, int arch) {
  const bool old_device = arch < 80;
  const bool other_types = !paired(args.x.dtype, args.down.dtype);
  const bool too_large = args.K > INT32_MAX || args.R > 65536 ||
                         ceil_div(args.M, kDownRows) * ceil_div(args.R, 16) > kMostBlocks;
  const bool all_dropped = args.mask.seed && args.mask.threshold >= 65536;
  if (old_device) return "it needs compute capability 8.0 or newer";
  if (other_types) return "down must be of x's dtype or float32";
  if (too_large) return "K must be below 2^31, r at most 65536, and the grid below 2^31 blocks";
  if (all_dropped) return "dropout must be below 1";
  return nullptr;
}

size_t workspace_bytes(const DownProjection& args, int device_sms) {
  return down_projection_workspace(args, device_sms);
}

cudaError_t launch(const DownProjection& args, void* workspace, int device_sms,
                   cudaStream_t stream) {
  return cudaError_t(run(args, workspace, device_sms, OnStream{stream}));
}

}  // namespace decomp_kernels::cuda
