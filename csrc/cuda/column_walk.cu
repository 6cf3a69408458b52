// Plan and launches of the column walk (interface and formulas: column_walk.h).

#include "column_walk.cuh"

namespace decomp_kernels::cuda {

namespace {

// The larger rank of what is asked for; 1 without u and c.
int64_t walk_rank(const ColumnWalk& args) {
  const int64_t of_u = args.u ? args.R : 0, of_c = args.c ? args.L : 0;
  return of_u > of_c ? of_u : of_c > 0 ? of_c : 1;
}

ColumnWalkPlan walk_plan(const ColumnWalk& args, int BR, int cols, int device_sms) {
  const int64_t rank_blocks = ceil_div(walk_rank(args), BR);
  const int64_t strips = ceil_div(args.N, cols), steps = ceil_div(args.M, kWalkRows);
  int64_t shares = ceil_div(int64_t(kWalkBlocks) * device_sms, rank_blocks * strips);
  shares = shares > steps ? steps : shares;
  const int64_t m_share = ceil_div(steps, shares) * kWalkRows;
  shares = ceil_div(args.M, m_share);  // whole steps a share, none empty
  return {int(rank_blocks), int(strips), int(shares), m_share};
}

Dtype walk_small(const ColumnWalk& args) {
  return args.u ? args.right.dtype : args.c ? args.left.dtype : args.big.dtype;
}

// f<T, S, BR>() for the types and ranks of ``args``.
template <typename F>
auto with_walk(const ColumnWalk& args, F f) {
  return with_types(args.big.dtype, walk_small(args), [&]<typename T, typename S>() {
    return with_rank_tile(walk_rank(args),
                          [&]<int BR>() { return f.template operator()<T, S, BR>(); });
  });
}

// Columns of a strip.
int64_t walk_strip(const ColumnWalk& args) {
  return with_walk(args, [&]<typename T, typename S, int BR>() {
    return int64_t(WalkShared<T, S, BR>::kCols);
  });
}

// The pieces of the workspace; a result of one partial is written at once.
struct WalkRoom {
  float *u, *c, *s, *p;
  size_t bytes;

  WalkRoom(const ColumnWalk& args, const ColumnWalkPlan& plan, void* workspace) {
    Room room(workspace);
    const auto partials = [&](float* out, int64_t parts, int64_t count) {
      return out && parts > 1 ? room.take<float>(parts * count) : out;
    };
    u = partials(args.u, plan.strips, args.M * args.R);
    c = partials(args.c, plan.shares, args.L * args.N);
    s = partials(args.s, plan.shares, args.N);
    p = partials(args.p, plan.shares, args.N);
    bytes = room.bytes();
  }
};

// Sums over nothing.
cudaError_t zero_sums(const ColumnWalk& args, cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
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

}  // namespace

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
  const bool any = args.M && args.N;  // a tensor of no elements may have no data
  const bool no_other = any && (args.p || args.scaled_other.data) && !args.other.data;
  const bool no_scale = any && scales && !args.scale.data;
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
  if (args.M == 0 || args.N == 0) return 0;
  return with_walk(args, [&]<typename T, typename S, int BR>() {
    const auto planned = walk_plan(args, BR, WalkShared<T, S, BR>::kCols, device_sms);
    return WalkRoom(args, planned, nullptr).bytes;
  });
}

cudaError_t launch(const ColumnWalk& args, void* workspace, int device_sms, cudaStream_t stream) {
  if (args.M == 0 || args.N == 0) return zero_sums(args, stream);
  return with_walk(args, [&]<typename T, typename S, int BR>() {
    using Shared = WalkShared<T, S, BR>;
    const ColumnWalkPlan planned = walk_plan(args, BR, Shared::kCols, device_sms);
    const WalkRoom room(args, planned, workspace);
    const ColumnWalkCall<T, S> call{
        .big = view<T>(args.big, args.M, args.N),
        .other = view<T>(args.other, args.M, args.N),
        .right = view<S>(args.right, args.N, args.R),
        .left = view<S>(args.left, args.M, args.L),
        .M = args.M,
        .N = int(args.N),
        .R = int(args.R),
        .L = int(args.L),
        .mask = args.mask,
        .scale = args.scale,
        .u = room.u,
        .c = room.c,
        .s = room.s,
        .p = room.p,
        .scaled_big = static_cast<T*>(args.scaled_big.data),
        .scaled_other = static_cast<T*>(args.scaled_other.data),
        .plan = planned,
    };
    const size_t shared = sizeof(Shared) - (args.u ? 0 : sizeof(Shared::right));
    const cudaError_t status =
        enqueue(&column_walk<T, S, BR>, planned.blocks(), kWalkThreads, shared, stream, call);
    OrderedSums sums;
    if (room.u != args.u) sums.add(room.u, args.u, args.M * args.R, planned.strips);
    if (room.c != args.c) sums.add(room.c, args.c, args.L * args.N, planned.shares);
    if (room.s != args.s) sums.add(room.s, args.s, args.N, planned.shares);
    if (room.p != args.p) sums.add(room.p, args.p, args.N, planned.shares);
    if (status != cudaSuccess || !sums.blocks()) return status;
    return enqueue(&ordered_sums, sums.blocks(), OrderedSums::kThreads, 0, stream, sums);
  });
}

bool u_is_cheap(const ColumnWalk& args) {
  return walk_strip(args) * int64_t(size_of(args.big.dtype)) >= 2 * 4 * args.R;
}

}  // namespace decomp_kernels::cuda
