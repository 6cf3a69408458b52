// Kernels of the down projection (interface and formula: down_projection.h).
//
// A block owns 64 rows of x, up to 64 of the rank and a share of K.  Blocks of one row block that
// differ in the rank are neighbours: x comes from HBM once and from the level-2 cache after that.
// The copies of the next steps are under way while one is multiplied; with four blocks a
// multiprocessor that is some 100 KB.  Mask and in_scale act on the tiles in shared memory.

#pragma once

#include "down_projection.h"
#include "launch.cuh"
#include "product.cuh"

namespace decomp_kernels::cuda {

struct DownProjectionPlan {
  int rank_blocks, shares;
  int64_t row_blocks, k_share;

  int64_t blocks() const { return row_blocks * rank_blocks * shares; }
};

template <typename T, typename S>
struct DownProjectionCall {
  View<T> x;
  View<S> down;
  int64_t M;
  int K, R;
  Vector in_scale;
  Mask mask;
  float after;  // 1 / kept fraction
  Vector core;
  float scale;
  Activation activation;
  Output t, v;
  float* sums;  // [shares, M, R] where K is split
  DownProjectionPlan plan;
};

inline constexpr int kDownThreads = 128, kDownRows = 64;

// Columns of one step, and steps in shared memory.  A float32 down has its parts there too.
template <typename T, typename S, int BR>
struct DownShared {
  using E = typename Pairing<T, S>::Element;
  static constexpr int kParts = Pairing<T, S>::kParts;
  static constexpr int kDepth = sizeof(E) == 4 ? 32 : 64;
  static constexpr int kStages = kParts == 1 ? 4 : BR == 64 ? 2 : 3;

  Operand<T, E, kDownRows, kDepth, 1, kStages> x;
  Operand<S, E, BR, kDepth, kParts, kStages> down;
};

inline int down_depth(const DownProjection& args) {
  return with_types(args.x.dtype, args.down.dtype, [&]<typename T, typename S>() {
    return DownShared<T, S, 16>::kDepth;  // any rank's
  });
}

inline DownProjectionPlan plan(const DownProjection& args, int device_sms) {
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

// t and v of one sum over K.
template <typename T, typename S>
__device__ __forceinline__ void finish(const DownProjectionCall<T, S>& call, int64_t row, int rank,
                                       float sum) {
  const int64_t place = row * call.R + rank;
  const float t = write(call.t, place, sum * call.after);
  if (!call.v.data) return;
  const float phi = activate(t, call.activation);
  write(call.v, place, phi * (call.core.data ? read(call.core, rank) * call.scale : call.scale));
}

template <typename T, typename S, int BR>
__global__ __launch_bounds__(kDownThreads) void down_projection(DownProjectionCall<T, S> call) {
  using Shared = DownShared<T, S, BR>;
  constexpr int kDepth = Shared::kDepth, kStages = Shared::kStages;
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());

  const DownProjectionPlan& plan = call.plan;
  const int rank0 = int(blockIdx.x % plan.rank_blocks) * BR;
  const int64_t row_block = blockIdx.x / plan.rank_blocks % plan.row_blocks;
  const int64_t share = blockIdx.x / plan.rank_blocks / plan.row_blocks;
  const int64_t row0 = row_block * kDownRows;
  const int64_t first = share * plan.k_share;
  const int64_t end = min(first + plan.k_share, int64_t(call.K));
  const uint64_t seed = call.mask.seed ? uint64_t(*call.mask.seed) : 0;

  const auto fetch = [&](int64_t k) {
    if (k < end) {
      const int stage = int((k - first) / kDepth % kStages);
      shared.x.template fetch<kDownThreads>(stage, call.x, row0, k);
      shared.down.template fetch<kDownThreads>(stage, call.down, rank0, k);
    }
    cp_async_commit();  // an empty group too: the waits count groups
  };
  Sum<typename Shared::E, kDownRows, BR, 4, 1> sum;
  sum.clear();
  for (int stage = 0; stage < kStages - 1; ++stage) fetch(first + stage * kDepth);
  for (int64_t k = first; k < end; k += kDepth) {
    const int stage = int((k - first) / kDepth % kStages);
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the product of the step before has read what is filled now
    fetch(k + (kStages - 1) * kDepth);
    shared.x.template prepare<kDownThreads>(
        stage, call.mask.seed, [&](int row, int col, Vec<T>& vec) {
          drop(vec, seed, (row0 + row) * call.K + k + col, call.mask.threshold);
        });
    // in_scale on the small operand, and in its type: x stays as it is.
    shared.down.template prepare<kDownThreads>(
        stage, call.in_scale.data, [&](int, int col, Vec<S>& vec) {
#pragma unroll
          for (int j = 0; j < Vec<S>::kSize; ++j)
            if (k + col + j < call.K)
              vec.at[j] = from_float<S>(to_float(vec.at[j]) * read(call.in_scale, k + col + j));
        });
    __syncthreads();
    sum.template add<Layout::kSummedLast, Layout::kSummedLast>(shared.x.tile(stage),
                                                               shared.down.tile(stage));
  }
  cp_async_wait<0>();  // the last groups, which are empty
  sum.each([&](int i, int j, float value) {
    const int64_t row = row0 + i;
    const int rank = rank0 + j;
    if (row >= call.M || rank >= call.R) return;
    if (call.sums)
      call.sums[(share * call.M + row) * call.R + rank] = value;
    else
      finish(call, row, rank, value);
  });
}

// The shares of K added in order, and t and v of them.  One thread an element.
template <typename T, typename S>
__global__ __launch_bounds__(256) void down_projection_shares(DownProjectionCall<T, S> call) {
  const int64_t count = call.M * call.R;
  const int64_t place = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (place >= count) return;
  float sum = 0.0f;
#pragma unroll 4
  for (int share = 0; share < call.plan.shares; ++share) sum += call.sums[share * count + place];
  finish(call, place / call.R, int(place % call.R), sum);
}

inline size_t down_projection_workspace(const DownProjection& args, int device_sms) {
  const DownProjectionPlan planned = plan(args, device_sms);
  Room room;
  if (planned.shares > 1) room.take<float>(planned.shares * args.M * args.R);
  return room.bytes();
}

template <typename Launcher>
int run(const DownProjection& args, void* workspace, int device_sms, Launcher launcher) {
  if (args.M == 0 || args.R == 0) return 0;
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
    const int status = with_rank_tile(args.R, [&]<int BR>() {
      return int(launcher(&down_projection<T, S, BR>, planned.blocks(), kDownThreads,
                          sizeof(DownShared<T, S, BR>), call));
    });
    if (status || !sums) return status;
    return int(launcher(&down_projection_shares<T, S>, ceil_div(args.M * args.R, 256), 256, 0,
                        call));
  });
}

}  // namespace decomp_kernels::cuda
