// Values at some places of a matrix (reference/scatter.py):
//
//     products   out_j = sum_m left[rows_j, m] * right[cols_j, m], entries of left right^T
//     sum        out = weight, and out[rows_j, cols_j] = weight[rows_j, cols_j] + values_j
//
//     left [N, M], right [K, M] of one dtype     weight, out [N, K]     rows, cols, values [count]

#pragma once

#include <cstdint>

#include "dtype.h"
#include "levels.h"

namespace decomp_kernels::cpu {

struct ProductsArgs {
  const void* left;
  const void* right;
  const int64_t* rows;  // below N, and cols below K: the caller has looked
  const int64_t* cols;
  float* out;
  Dtype dtype;
  int64_t M;
};

struct SumArgs {
  const void* weight;
  const void* values;
  const int64_t* rows;  // no place twice
  const int64_t* cols;
  void* out;
  Dtype weight_dtype, values_dtype;
  int64_t K;
};

// Each over a range of entries; the sum's out holds the weight already.
DK_DECLARE_AT_LEVELS(void sampled_products(const ProductsArgs&, int64_t begin, int64_t end))
DK_DECLARE_AT_LEVELS(void scattered_sum(const SumArgs&, int64_t begin, int64_t end))

}  // namespace decomp_kernels::cpu
