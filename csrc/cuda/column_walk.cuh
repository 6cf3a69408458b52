// The kernel of the column walk (interface and formulas: column_walk.h).
//
// A block owns a strip of columns, up to 64 of the ranks and a share of the rows.  c, s and p stay in
// registers over the share, and the strip's part of right stays in shared memory; u leaves as one
// partial for each strip.  Blocks of one strip that differ in the rank are neighbours: big comes from
// HBM once and from the level-2 cache after that.  What needs no rank (s, p and the scaled matrices)
// is the first rank block's and is taken from registers, each thread at columns of its own.

#pragma once

#include "column_walk.h"
#include "launch.cuh"
#include "product.cuh"
#include "reduce.cuh"

namespace decomp_kernels::cuda {

inline constexpr int kWalkThreads = 256;

inline constexpr int kWalkRows = 32;  // of a step

template <typename T, typename S, int BR>
struct WalkShared {
  using E = typename Pairing<T, S>::Element;
  static constexpr int kParts = Pairing<T, S>::kParts, kStages = 3;
  // A wide strip means few partials of u; right's part of it, [kCols, BR], must find room.
  static constexpr bool kNarrow = sizeof(E) == 2;
  static constexpr int kCols = BR == 16 && kNarrow ? 256 : BR < 64 || (kNarrow && kParts == 1) ? 128 : 64;
  static constexpr int kGroups = kWalkThreads / (kCols / Vec<T>::kSize);

  union {
    Operand<T, E, kWalkRows, kCols, 1, kStages> big;
    float column_sums[kGroups][kCols];
  };
  Operand<S, E, kWalkRows, BR, kParts, kStages> left;
  float scale[kCols];
  Tile<E, kCols, BR, kParts> right;  // the last: without u there is no room for it
};

struct ColumnWalkPlan {
  int rank_blocks, strips, shares;
  int64_t m_share;

  int64_t blocks() const { return int64_t(rank_blocks) * strips * shares; }
};

template <typename T, typename S>
struct ColumnWalkCall {
  View<T> big, other;
  View<S> right, left;
  int64_t M;
  int N, R, L;
  Mask mask;
  Vector scale;
  float *u, *c, *s, *p;  // [strips, M, R]  [shares, L, N]  [shares, N]  [shares, N]
  T *scaled_big, *scaled_other;
  ColumnWalkPlan plan;
};

inline ColumnWalkPlan walk_plan(const ColumnWalk& args, int BR, int cols, int device_sms) {
  const int64_t ranks = args.R > args.L ? args.R : args.L;
  const int64_t rank_blocks = ranks > BR ? ceil_div(ranks, BR) : 1;
  const int64_t strips = ceil_div(args.N, cols), steps = ceil_div(args.M, kWalkRows);
  int64_t shares = ceil_div(2 * int64_t(device_sms), rank_blocks * strips);
  shares = shares > steps ? steps : shares;
  const int64_t m_share = ceil_div(steps, shares) * kWalkRows;
  shares = ceil_div(args.M, m_share);  // whole steps a share, none empty
  return {int(rank_blocks), int(strips), int(shares), m_share};
}

inline int64_t walk_rank(const ColumnWalk& args) {
  return args.u && args.R > (args.c ? args.L : 0) ? args.R : args.c ? args.L : 1;
}

inline Dtype walk_small(const ColumnWalk& args) {
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
inline int64_t walk_strip(const ColumnWalk& args) {
  return with_walk(args, [&]<typename T, typename S, int BR>() {
    return int64_t(WalkShared<T, S, BR>::kCols);
  });
}

// s, p and the scaled matrices of one piece of big.  scale [columns of the piece].
template <typename T>
struct ColumnSums {
  static constexpr int kSize = Vec<T>::kSize;
  float s[kSize] = {}, p[kSize] = {};

  template <typename S>
  __device__ __forceinline__ void take(const ColumnWalkCall<T, S>& call, int64_t row, int64_t col,
                                       const Vec<T>& big, const float* scale) {
    if (row >= call.M || col >= call.N) return;
    if (call.scaled_big) write_scaled(call, call.scaled_big, row, col, big, scale);
#pragma unroll
    for (int j = 0; j < kSize; ++j) s[j] += to_float(big.at[j]);
    if (!call.other.data) return;
    const Vec<T> other = load(call.other, row, col);
#pragma unroll
    for (int j = 0; j < kSize; ++j) p[j] += to_float(big.at[j]) * to_float(other.at[j]);
    if (call.scaled_other) write_scaled(call, call.scaled_other, row, col, other, scale);
  }

 private:
  template <typename S>
  static __device__ __forceinline__ void write_scaled(const ColumnWalkCall<T, S>& call, T* to,
                                                      int64_t row, int64_t col, Vec<T> vec,
                                                      const float* scale) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) vec.at[j] = from_float<T>(to_float(vec.at[j]) * scale[j]);
    const bool aligned = reinterpret_cast<uintptr_t>(to) % 16 == 0 && call.N % kSize == 0;
    store(to, int64_t(call.N), int64_t(call.N), aligned, row, col, vec);
  }
};

// The sums of the groups of threads that have the same columns, added in the groups' order.
template <int COLS, int GROUPS, int SIZE>
__device__ __forceinline__ void add_groups(float (&shared)[GROUPS][COLS], const float (&mine)[SIZE],
                                           float* out, int64_t share, int64_t col0, int N) {
  constexpr int kPerRow = COLS / SIZE;
  const int thread = int(threadIdx.x);
  __syncthreads();  // the place was a tile's or the sums' before
#pragma unroll
  for (int j = 0; j < SIZE; ++j)
    shared[thread / kPerRow][thread % kPerRow * SIZE + j] = mine[j];
  __syncthreads();
  if (thread >= COLS || col0 + thread >= N) return;
  float total = 0.0f;
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) total += shared[group][thread];
  out[share * N + col0 + thread] = total;
}

template <typename T, typename S, int BR>
__global__ __launch_bounds__(kWalkThreads) void column_walk(ColumnWalkCall<T, S> call) {
  using Shared = WalkShared<T, S, BR>;
  constexpr int kCols = Shared::kCols, kStages = Shared::kStages;
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());

  const ColumnWalkPlan& plan = call.plan;
  const int rank_block = int(blockIdx.x % plan.rank_blocks);
  const int strip = int(blockIdx.x / plan.rank_blocks % plan.strips);
  const int64_t share = blockIdx.x / plan.rank_blocks / plan.strips;
  const int rank0 = rank_block * BR;
  const int64_t col0 = int64_t(strip) * kCols;
  const int64_t first = share * plan.m_share, end = min(first + plan.m_share, call.M);
  const uint64_t seed = call.mask.seed ? uint64_t(*call.mask.seed) : 0;
  const bool with_u = call.u && rank0 < call.R, with_c = call.c && rank0 < call.L;
  const bool twice = with_u && with_c && call.mask.seed;  // u of big as it is, c of drop(big)

  const bool with_columns = rank_block == 0 && (call.s || call.other.data || call.scaled_big);

  const auto fetch = [&](int64_t m) {
    if (m < end) {
      const int stage = int((m - first) / kWalkRows % kStages);
      shared.big.template fetch<kWalkThreads>(stage, call.big, m, col0);
      if (with_c) shared.left.template fetch<kWalkThreads>(stage, call.left, m, rank0);
    }
    cp_async_commit();  // an empty group too: the waits count groups
  };
  Sum<typename Shared::E, BR, kCols, 1, 8> c;
  ColumnSums<T> columns;
  c.clear();
  for (int stage = 0; stage < kStages - 1; ++stage) fetch(first + stage * kWalkRows);
  if (with_u)
    each_piece<S, kCols, BR, kWalkThreads>([&](int row, int col) {
      put(shared.right, row, col, load(call.right, col0 + row, rank0 + col));
    });
  if (with_columns && call.scale.data) {
    if (int(threadIdx.x) < kCols) {
      const int64_t col = col0 + threadIdx.x;
      shared.scale[threadIdx.x] = col < call.N ? read(call.scale, col) : 0.0f;
    }
    __syncthreads();
  }
  for (int64_t m = first; m < end; m += kWalkRows) {
    const int stage = int((m - first) / kWalkRows % kStages);
    const auto prepare_big = [&](bool masked) {
      shared.big.template prepare<kWalkThreads>(stage, masked, [&](int row, int col, Vec<T>& vec) {
        drop(vec, seed, (m + row) * call.N + col0 + col, call.mask.threshold);
      });
    };
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the products of the step before have read what is filled now
    fetch(m + (kStages - 1) * kWalkRows);
    if (with_columns)
      each_piece<T, kWalkRows, kCols, kWalkThreads>([&](int row, int col) {
        const Vec<T>& vec = *reinterpret_cast<const Vec<T>*>(&shared.big.ring[stage].at[0][row][col]);
        columns.take(call, m + row, col0 + col, vec, shared.scale + col);
      });
    prepare_big(with_c && call.mask.seed && !twice);
    if (with_c)
      shared.left.template prepare<kWalkThreads>(stage, false, [](int, int, Vec<S>&) {});
    __syncthreads();
    if (with_u) {
      Sum<typename Shared::E, kWalkRows, BR, 2, BR == 16 ? 2 : 4> u;
      u.clear();
      u.template add<Layout::kSummedLast, Layout::kSummedFirst>(shared.big.tile(stage),
                                                                shared.right);
      u.each([&](int i, int j, float value) {
        if (m + i < end && rank0 + j < call.R)
          call.u[(strip * call.M + m + i) * call.R + rank0 + j] = value;
      });
    }
    if (twice) {
      __syncthreads();
      prepare_big(true);
      __syncthreads();
    }
    if (with_c)
      c.template add<Layout::kSummedFirst, Layout::kSummedFirst>(shared.left.tile(stage),
                                                                 shared.big.tile(stage));
  }
  cp_async_wait<0>();  // the last groups, which are empty
  if (with_c)
    c.each([&](int i, int j, float value) {
      if (rank0 + i < call.L && col0 + j < call.N)
        call.c[(share * call.L + rank0 + i) * call.N + col0 + j] = value;
    });
  if (rank_block == 0) {
    if (call.s) add_groups<kCols>(shared.column_sums, columns.s, call.s, share, col0, call.N);
    if (call.p) add_groups<kCols>(shared.column_sums, columns.p, call.p, share, col0, call.N);
  }
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

inline size_t column_walk_workspace(const ColumnWalk& args, int device_sms) {
  if (args.M == 0 || args.N == 0) return 0;
  return with_walk(args, [&]<typename T, typename S, int BR>() {
    const auto planned = walk_plan(args, BR, WalkShared<T, S, BR>::kCols, device_sms);
    return WalkRoom(args, planned, nullptr).bytes;
  });
}

// M and N are not 0 here.
template <typename Launcher>
int run(const ColumnWalk& args, void* workspace, int device_sms, Launcher launcher) {
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
    const int status = int(
        launcher(&column_walk<T, S, BR>, planned.blocks(), kWalkThreads, shared, call));
    OrderedSums sums;
    if (room.u != args.u) sums.add(room.u, args.u, args.M * args.R, planned.strips);
    if (room.c != args.c) sums.add(room.c, args.c, args.L * args.N, planned.shares);
    if (room.s != args.s) sums.add(room.s, args.s, args.N, planned.shares);
    if (room.p != args.p) sums.add(room.p, args.p, args.N, planned.shares);
    if (status || !sums.blocks()) return status;
    return int(launcher(&ordered_sums, sums.blocks(), OrderedSums::kThreads, 0, sums));
  });
}

}  // namespace decomp_kernels::cuda
