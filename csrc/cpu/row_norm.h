// n_j = ||(W + scale * B A)_j|| and its gradients (maths: decomp_kernels/reference/row_norm.py).
//
//     W [N, K]   A = down [r, K]   B = up [N, r]   weight_sq, norm, d_norm, out [N]

#pragma once

#include <cstdint>

#include "dtype.h"
#include "levels.h"

namespace decomp_kernels::cpu {

// Units of work, which the shape alone decides, so that no result depends on the threads.
inline constexpr int64_t kGramRows = 6;         // rows of A A^T
inline constexpr int64_t kForwardRows = 24;     // rows of W
inline constexpr int64_t kBackwardRows = 256;   // rows of W, with one partial d_down each
inline constexpr int64_t kFinishColumns = 256;  // columns of d_down

struct RowNormArgs {
  const void* weight;
  const void* down;
  const void* up;
  Dtype weight_dtype, small_dtype;
  int64_t N, K, r;
  float scale;
  float* gram;  // [r, r]  A A^T
  float* wide;  // [N, r]  forward: B in float32; backward: scale * d_norm / norm * B

  const float* weight_sq;  // forward
  float* products;         // forward, [N, r]
  float* out;              // forward, and of squared_rows

  const float* d_norm;  // backward
  const float* norm;
  float* d_up;          // [N, r]
  float* d_down;        // [r, K]
  float* partial;       // [ceil(N / kBackwardRows), r, K]  parts of d_down
  float* partial_gram;  // [ceil(N / kBackwardRows), r, r]  of wide^T B; the first becomes the sum
};

// Each over a range of units: rows, kGramRows, kForwardRows, kBackwardRows, the numbers of
// [r, r], kFinishColumns.  down_gram comes before forward and backward, and gram_sum between
// backward and finish.
DK_DECLARE_AT_LEVELS(void squared_rows(const RowNormArgs&, int64_t begin, int64_t end))
DK_DECLARE_AT_LEVELS(void down_gram(const RowNormArgs&, int64_t begin, int64_t end))
DK_DECLARE_AT_LEVELS(void row_norm_forward(const RowNormArgs&, int64_t begin, int64_t end))
DK_DECLARE_AT_LEVELS(void row_norm_backward(const RowNormArgs&, int64_t begin, int64_t end))
DK_DECLARE_AT_LEVELS(void row_norm_gram_sum(const RowNormArgs&, int64_t begin, int64_t end))
DK_DECLARE_AT_LEVELS(void row_norm_finish(const RowNormArgs&, int64_t begin, int64_t end))

}  // namespace decomp_kernels::cpu
