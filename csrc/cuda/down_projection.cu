// Plan and launches of the down projection (interface and formula: down_projection.h).

#include "down_projection.cuh"

namespace decomp_kernels::cuda {

namespace {

int down_depth(const DownProjection& args) {
  return with_types(args.x.dtype, args.down.dtype, [&]<typename T, typename S>() {
    return DownShared<T, S, 16>::kDepth;  // any rank's
  });
}

DownProjectionPlan plan(const DownProjection& args, int device_sms) {
  const int depth = down_depth(args);
  const int64_t row_blocks = ceil_div(args.M, kDownRows);
  const int rank_blocks = int(ceil_div(args.R, rank_tile(args.R)));
  const int64_t steps = ceil_div(args.K, depth), wanted = 4 * int64_t(device_sms);
  const int64_t most = steps < 64 ? steps : 64;
  int64_t shares = ceil_div(wanted, row_blocks * rank_blocks > 0 ? row_blocks * rank_blocks : 1);
  shares = shares > most ? most : shares;
  shares = shares < 1 ? 1 : shares;
  const int64_t k_share = ceil_div(steps, shares) * depth;
  // Whole steps a share: fewer shares may then be enough, and none is empty.
  shares = k_share ? ceil_div(args.K, k_share) : 1;
  return {rank_blocks, int(shares), row_blocks, k_share};
}

}  // namespace

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
  const DownProjectionPlan planned = plan(args, device_sms);
  Room room;
  if (planned.shares > 1) room.take<float>(planned.shares * args.M * args.R);
  return room.bytes();
}

cudaError_t launch(const DownProjection& args, void* workspace, int device_sms,
                   cudaStream_t stream) {
  if (args.M == 0 || args.R == 0) return cudaSuccess;
  const DownProjectionPlan planned = plan(args, device_sms);
  Room room(workspace);
  float* const sums =
      planned.shares > 1 ? room.take<float>(planned.shares * args.M * args.R) : nullptr;
  return with_types(args.x.dtype, args.down.dtype, [&]<typename T, typename S>() {
    const DownProjectionCall<T, S> call{
        .x = view<T>(args.x, args.M, args.K),
        .down = view<S>(args.down, args.R, args.K),
        .M = args.M,
        .K = int(args.K),
        .R = int(args.R),
        .in_scale = args.in_scale,
        .mask = args.mask,
        .after = kept_reciprocal(args.mask),
        .core = args.core,
        .scale = args.scale,
        .activation = args.activation,
        .t = args.t,
        .v = args.v,
        .sums = sums,
        .plan = planned,
    };
    const cudaError_t status = with_rank_tile(args.R, [&]<int BR>() {
      return enqueue(&down_projection<T, S, BR>, planned.blocks(), kDownThreads,
                     sizeof(DownShared<T, S, BR>), stream, call);
    });
    if (status != cudaSuccess || !sums) return status;
    return enqueue(&down_projection_shares<T, S>, ceil_div(args.M * args.R, 256), 256, 0, stream,
                   call);
  });
}

}  // namespace decomp_kernels::cuda
