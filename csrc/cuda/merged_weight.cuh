// The kernel of the merged weight (interface and formula: merged_weight.h).
//
// A block owns a tile of out and walks the rank with exact float32 products: a merge is done once,
// and its result is all that is left of the factors.  The sums go through shared memory, so that W
// and out are read and written 16 bytes at a time.

#pragma once

#include "launch.cuh"
#include "merged_weight.h"
#include "product.cuh"

namespace decomp_kernels::cuda {

inline constexpr int kMergeThreads = 256, kMergeRows = 64, kMergeCols = 128, kMergeRank = 16;

struct MergeShared {
  struct Factors {
    Tile<float, kMergeRows, kMergeRank> up;
    Tile<float, kMergeRank, kMergeCols> down;
  };

  union {
    Factors factors;
    float sums[kMergeRows][kMergeCols + 4];
  };
};

template <typename T, typename S>
struct MergedWeightCall {
  View<T> weight;
  int64_t weight_column_stride;
  View<S> up, down;
  int64_t N;
  int K, R;
  Vector core, in_scale, out_scale;
  float scale;
  T* out;
  bool out_aligned;
  int col_blocks;
};

template <typename T, typename S>
__device__ __forceinline__ Vec<T> load_weight(const MergedWeightCall<T, S>& call, int64_t row,
                                              int64_t col) {
  if (call.weight_column_stride == 1) return load(call.weight, row, col);
  const T* start = call.weight.data + row * call.weight.stride;
  Vec<T> vec{};
#pragma unroll
  for (int j = 0; j < Vec<T>::kSize; ++j)
    if (col + j < call.K) vec.at[j] = start[(col + j) * call.weight_column_stride];
  return vec;
}

template <typename T, typename S>
__global__ __launch_bounds__(kMergeThreads) void merged_weight(MergedWeightCall<T, S> call) {
  MergeShared& shared = *reinterpret_cast<MergeShared*>(dynamic_shared());
  auto& [up, down] = shared.factors;
  const int64_t row0 = int64_t(blockIdx.x / call.col_blocks) * kMergeRows;
  const int64_t col0 = int64_t(blockIdx.x % call.col_blocks) * kMergeCols;

  Sum<float, kMergeRows, kMergeCols, 4, 2> sum;
  sum.clear();
  for (int rank = 0; rank < call.R; rank += kMergeRank) {
    __syncthreads();  // the product of the step before has read the tiles
    each_piece<S, kMergeRows, kMergeRank, kMergeThreads>([&](int row, int col) {
      const Vec<S> vec = load(call.up, row0 + row, rank + col);
#pragma unroll
      for (int j = 0; j < Vec<S>::kSize; ++j) {
        const bool has_core = call.core.data && rank + col + j < call.R;
        const float core = has_core ? read(call.core, rank + col + j) : 1.0f;
        up.at[0][row][col + j] = to_float(vec.at[j]) * core;
      }
    });
    each_piece<S, kMergeRank, kMergeCols, kMergeThreads>([&](int row, int col) {
      put(down, row, col, load(call.down, rank + row, col0 + col));
    });
    __syncthreads();
    sum.template add<Layout::kSummedLast, Layout::kSummedFirst>(up, down);
  }
  __syncthreads();  // the sums take the place of the factors
  sum.each([&](int i, int j, float value) { shared.sums[i][j] = value; });
  __syncthreads();
  each_piece<T, kMergeRows, kMergeCols, kMergeThreads, 4>([&](int i, int j) {
    const int64_t row = row0 + i, col = col0 + j;
    if (row >= call.N || col >= call.K) return;
    const Vec<T> weight = load_weight(call, row, col);
    const float out_scale = call.out_scale.data ? read(call.out_scale, row) : 1.0f;
    Vec<T> out;
#pragma unroll
    for (int n = 0; n < Vec<T>::kSize; ++n) {
      float value = to_float(weight.at[n]) + call.scale * shared.sums[i][j + n];
      value *= out_scale;
      if (call.in_scale.data && col + n < call.K) value *= read(call.in_scale, col + n);
      out.at[n] = from_float<T>(value);
    }
    store(call.out, int64_t(call.K), int64_t(call.K), call.out_aligned, row, col, out);
  });
}

}  // namespace decomp_kernels::cuda
