// Sums of the partial results of blocks, in a fixed order.
//
//     out[i] = sum_p parts[p, i]        parts [P, count] float32, p = 0 first
//
// No atomics, so that the same partial results give the same bits.

#pragma once

#include "launch.cuh"

namespace decomp_kernels::cuda {

struct Partials {
  const float* parts;
  float* out;
  int64_t count;
  int P;
};

// Several sums in one launch; those of no elements take no blocks.
struct OrderedSums {
  static constexpr int kMost = 4, kThreads = 256;
  Partials sums[kMost] = {};
  int used = 0;

  void add(const float* parts, float* out, int64_t count, int P) {
    sums[used++] = {parts, out, count, P};
  }

  int64_t blocks() const {
    int64_t total = 0;
    for (int i = 0; i < used; ++i) total += ceil_div(sums[i].count, kThreads);
    return total;
  }
};

static __global__ __launch_bounds__(OrderedSums::kThreads) void ordered_sums(OrderedSums all) {
  int64_t block = blockIdx.x;
#pragma unroll
  for (int i = 0; i < OrderedSums::kMost; ++i) {
    if (i >= all.used) return;
    const Partials& one = all.sums[i];
    const int64_t blocks = (one.count + OrderedSums::kThreads - 1) / OrderedSums::kThreads;
    if (block < blocks) {
      const int64_t at = block * OrderedSums::kThreads + threadIdx.x;
      if (at >= one.count) return;
      float total = 0.0f;
#pragma unroll 4
      for (int p = 0; p < one.P; ++p) total += one.parts[p * one.count + at];
      one.out[at] = total;
      return;
    }
    block -= blocks;
  }
}

}  // namespace decomp_kernels::cuda
