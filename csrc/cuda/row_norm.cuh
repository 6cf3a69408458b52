// Kernels of the row norms and their gradients (interface and formulas: row_norm.h).
//
// W is read by the passes that read any tall matrix: the down projection gives U for the norms, the
// column walk U and L^T W together for the gradients.  What is left is rank-r work, one warp a row.

#pragma once

#include "launch.cuh"
#include "row_norm.h"
#include "tile.cuh"
#include "warp.cuh"

namespace decomp_kernels::cuda {

inline constexpr int kRowThreads = 256, kRowsABlock = kRowThreads / 32;

template <typename T>
struct SquaredRowsCall {
  View<T> weight;
  float* squares;
};

// One warp a row.
template <typename T>
__global__ __launch_bounds__(kRowThreads) void squared_rows(SquaredRowsCall<T> call) {
  const int64_t row = int64_t(blockIdx.x) * kRowsABlock + threadIdx.x / 32;
  if (row >= call.weight.rows) return;
  float sum = 0.0f;
  for (int64_t col = lane_id() * Vec<T>::kSize; col < call.weight.cols;
       col += 32 * Vec<T>::kSize) {
    const Vec<T> vec = load(call.weight, row, col);
#pragma unroll
    for (int j = 0; j < Vec<T>::kSize; ++j) sum += to_float(vec.at[j]) * to_float(vec.at[j]);
  }
  sum = warp_sum(sum);
  if (lane_id() == 0) call.squares[row] = sum;
}

template <typename S>
struct RowNormCall {
  View<S> up;
  int64_t N;
  int R;
  float scale;
  const float *U, *G, *squares;
  float* norm;
};

template <typename S>
struct RowNormGradientsCall {
  View<S> up, down;
  int64_t N, K;
  int R;
  float scale;
  const float *d_norm, *norm;
  const float *U, *G, *left_up;  // left_up = L^T B, [R, R]
  float *left, *right, *d_down, *d_up;
};

// (B G)[row, rank].
template <typename S>
__device__ __forceinline__ float up_gram(const S* up_row, const float* G, int R, int rank) {
  float sum = 0.0f;
  for (int q = 0; q < R; ++q) sum += to_float(up_row[q]) * G[int64_t(q) * R + rank];
  return sum;
}

// scale * d_n / n of a row.
template <typename S>
__device__ __forceinline__ float row_factor(const RowNormGradientsCall<S>& call, int64_t row) {
  return call.scale * (call.d_norm[row] / call.norm[row]);
}

// n of one row a warp.  Where B is zero n is the root of ||W||^2 to the bit.
template <typename S>
__global__ __launch_bounds__(kRowThreads) void row_norm(RowNormCall<S> call) {
  const int64_t row = int64_t(blockIdx.x) * kRowsABlock + threadIdx.x / 32;
  if (row >= call.N) return;
  const S* up = call.up.data + row * call.up.stride;
  float sum = 0.0f;
  for (int rank = lane_id(); rank < call.R; rank += 32)
    sum += to_float(up[rank]) *
           (2.0f * call.U[row * call.R + rank] + call.scale * up_gram(up, call.G, call.R, rank));
  const float squared = call.squares[row] + call.scale * warp_sum(sum);
  if (lane_id() == 0) call.norm[row] = sqrtf(squared < 0.0f ? 0.0f : squared);  // a NaN stays one
}

// L, one thread an element.
template <typename S>
__global__ __launch_bounds__(kRowThreads) void row_norm_left(RowNormGradientsCall<S> call) {
  const int64_t place = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (place >= call.N * call.R) return;
  const int64_t row = place / call.R;
  const float up = to_float(call.up.data[row * call.up.stride + place % call.R]);
  call.left[place] = row_factor(call, row) * up;
}

// A^T as the column walk takes it, [K, R] float32; one thread an element.
template <typename S>
__global__ __launch_bounds__(kRowThreads) void row_norm_right(RowNormGradientsCall<S> call) {
  const int64_t place = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (place >= call.K * call.R) return;
  const int64_t col = place / call.R;
  call.right[place] = to_float(call.down.data[place % call.R * call.down.stride + col]);
}

// dB, one warp a row.
template <typename S>
__global__ __launch_bounds__(kRowThreads) void row_norm_d_up(RowNormGradientsCall<S> call) {
  const int64_t row = int64_t(blockIdx.x) * kRowsABlock + threadIdx.x / 32;
  if (row >= call.N) return;
  const S* up = call.up.data + row * call.up.stride;
  const float factor = row_factor(call, row);
  for (int rank = lane_id(); rank < call.R; rank += 32) {
    const int64_t place = row * call.R + rank;
    call.d_up[place] = factor * (call.U[place] + call.scale * up_gram(up, call.G, call.R, rank));
  }
}

// dA on top of L^T W, one thread an element.
template <typename S>
__global__ __launch_bounds__(kRowThreads) void row_norm_d_down(RowNormGradientsCall<S> call) {
  const int64_t place = int64_t(blockIdx.x) * kRowThreads + threadIdx.x;
  if (place >= call.K * call.R) return;
  const int64_t rank = place / call.K, col = place % call.K;
  float sum = 0.0f;
  for (int q = 0; q < call.R; ++q)
    sum += call.left_up[rank * call.R + q] * to_float(call.down.data[q * call.down.stride + col]);
  call.d_down[place] += call.scale * sum;
}

}  // namespace decomp_kernels::cuda
