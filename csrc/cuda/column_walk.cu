// Launches of the column walk (interface and formulas: column_walk.h).

#include "column_walk.cuh"

namespace decomp_kernels::cuda {

const char* why_not(const ColumnWalk& args, int arch) {
  const Dtype wide = args.big.dtype;
  const bool scales = args.scaled_big.data || args.scaled_other.data;
  const bool old_device = arch < 80;
  const bool other_types = (args.u && !paired(wide, args.right.dtype)) ||
                           (args.c && !paired(wide, args.left.dtype)) ||
                           (args.u && args.c && args.right.dtype != args.left.dtype);
  const bool other_unlike = (args.other.data && args.other.dtype != wide) ||
                            (args.scaled_big.data && args.scaled_big.dtype != wide) ||
                            (args.scaled_other.data && args.scaled_other.dtype != wide);
  const bool no_other = (args.p || args.scaled_other.data) && !args.other.data;
  const bool no_scale = scales && !args.scale.data;
  const bool in_place = args.scaled_big.data && args.scaled_big.data == args.big.data;
  const bool too_large = args.N > INT32_MAX || args.R > 65536 || args.L > 65536 ||
                         ceil_div(args.N, 128) * 4096 > kMostBlocks;
  const bool all_dropped = args.mask.seed && args.mask.threshold >= 65536;
  if (old_device) return "it needs compute capability 8.0 or newer";
  if (other_types) return "right and left must be of big's dtype or float32, and of one";
  if (other_unlike) return "other and the scaled matrices must be of big's dtype";
  if (no_other) return "p and scaled_other need other";
  if (no_scale) return "a scaled matrix needs scale";
  if (in_place) return "scaled_big must not be big itself";
  if (too_large) return "N must be below 2^26 and the ranks at most 65536";
  if (all_dropped) return "dropout must be below 1";
  return nullptr;
}

size_t workspace_bytes(const ColumnWalk& args, int device_sms) {
  return column_walk_workspace(args, device_sms);
}

cudaError_t launch(const ColumnWalk& args, void* workspace, int device_sms, cudaStream_t stream) {
  if (args.M && args.N) return cudaError_t(run(args, workspace, device_sms, OnStream{stream}));
  cudaError_t status = cudaSuccess;  // sums over nothing are zero
  const auto zero = [&](float* out, int64_t count) {
    if (status == cudaSuccess && out && count)
      status = cudaMemsetAsync(out, 0, size_t(count) * sizeof(float), stream);
  };
  zero(args.u, args.M * args.R);
  zero(args.c, args.L * args.N);
  zero(args.s, args.N);
  zero(args.p, args.N);
  return status;
}

bool u_is_cheap(const ColumnWalk& args) {
  return walk_strip(args) * int64_t(size_of(args.big.dtype)) >= 2 * 4 * args.R;
}

}  // namespace decomp_kernels::cuda
