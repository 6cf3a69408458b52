// Kernels of the down projection (interface and formula: down_projection.h).
//
// A block owns 64 rows of x, up to 64 of the rank and a share of K.  Blocks of one row block that
// differ in the rank are neighbours: x comes from HBM once and from the level-2 cache after that.
// The copies of the next steps are under way while one is multiplied: those of several blocks a
// multiprocessor together hide the latency of memory.  Mask and in_scale act on the tiles in shared
// memory.

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

inline constexpr int kDownBlocks = 4;  // on a multiprocessor, where shared memory has the room

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
__global__ __launch_bounds__(kDownThreads, kDownBlocks) void down_projection(
    DownProjectionCall<T, S> call) {
  using Shared = DownShared<T, S, BR>;
  constexpr int kDepth = Shared::kDepth, kStages = Shared::kStages;
  static_assert(sizeof(Shared) <= kMostShared);
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

}  // namespace decomp_kernels::cuda
