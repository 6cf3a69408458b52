// The kernel of the column walk (interface and formulas: column_walk.h).
//
// A block owns a strip of columns, up to 64 of the ranks and a share of the rows.  c, s and p stay
// in registers over the share, and the strip's part of right stays in shared memory; u leaves as
// one partial for each strip.  Blocks of one strip that differ in the rank are neighbours: big
// comes from HBM once and from the level-2 cache after that.  What needs no rank (s, p and the
// scaled matrices) is the first rank block's and is taken from registers, each thread at columns of
// its own.

#pragma once

#include "column_walk.h"
#include "launch.cuh"
#include "product.cuh"
#include "reduce.cuh"

namespace decomp_kernels::cuda {

inline constexpr int kWalkThreads = 256, kWalkBlocks = 2;  // of one block; blocks a multiprocessor

inline constexpr int kWalkRows = 32;  // of a step

template <typename T, typename S, int BR>
struct WalkShared {
  using E = typename Pairing<T, S>::Element;
  static constexpr int kParts = Pairing<T, S>::kParts, kStages = 3;
  // A wide strip means few partials of u; right's part of it, [kCols, BR], must find room.
  static constexpr bool kNarrow = sizeof(E) == 2;
  static constexpr bool kLargeRight = BR == 64 && !(kNarrow && kParts == 1);
  static constexpr int kCols = BR == 16 && kNarrow ? 256 : kLargeRight ? 64 : 128;
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
__global__ __launch_bounds__(kWalkThreads, kWalkBlocks) void column_walk(
    ColumnWalkCall<T, S> call) {
  using Shared = WalkShared<T, S, BR>;
  constexpr int kCols = Shared::kCols, kStages = Shared::kStages;
  static_assert(sizeof(Shared) <= kMostShared);
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
        const T* place = &shared.big.ring[stage].at[0][row][col];
        columns.take(call, m + row, col0 + col, *reinterpret_cast<const Vec<T>*>(place),
                     shared.scale + col);
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

}  // namespace decomp_kernels::cuda
