// E = M M^T or M^T M, minus I or minus its diagonal; ||E||_F^2; factor * E M or factor * M E
//
// One matrix is one unit of work.  Only the upper half of E is computed.

#include "gram.h"

#include "products.h"

namespace decomp_kernels::cpu::DK_LEVEL {
namespace {

// Rows of M in float32: M's own, or a copy in ``block``.
const float* wide_rows(const float* M, int64_t, int64_t, float*) { return M; }

const float* wide_rows(const bf16* M, int64_t rows, int64_t r, float* block) {
  for (int64_t i = 0; i < rows * r; i += kLanes) {
    const Part some{smaller(rows * r - i, kLanes)};
    put(block + i, take(M + i, some), some);
  }
  return block;
}

// The upper half of M^T M, and what the tiles hold beyond it.
template <typename T>
void columns_by_columns(const T* M, int64_t N, int64_t r, float* E, float* block) {
  if (N == 0)
    for (int64_t i = 0; i < r * r; ++i) E[i] = 0.0f;
  for (int64_t n = 0; n < N; n += kGramBlock) {
    const int64_t rows = smaller(kGramBlock, N - n);
    const Left left{wide_rows(M + n * r, rows, r, block), r, 1};
    for (int64_t i = 0; i < r; i += kOuterRows)
      outer_products(left.from(i), smaller(kOuterRows, r - i), left.p, r, rows, i, r,
                     [&](int64_t j, int64_t k, Floats sum, auto lanes) {
                       float* e = E + (i + j) * r + k;
                       put(e, n == 0 ? sum : take(e, lanes) + sum, lanes);
                     });
  }
}

// Completes E, and its sum of squares.
float finished(float* E, int64_t r, bool identity) {
  for (int64_t i = 0; i < r; ++i) {
    E[i * r + i] = identity ? E[i * r + i] - 1.0f : 0.0f;
    for (int64_t j = i + 1; j < r; ++j) E[j * r + i] = E[i * r + j];
  }
  Floats sum = zero();
  for (int64_t i = 0; i < r * r; i += kLanes) {
    const Floats e = load(E + i, smaller(r * r - i, kLanes));
    sum = fma(e, e, sum);
  }
  return reduce_add(sum);
}

template <typename T>
void forward_of(const GramArgs& a, int64_t g) {
  const int64_t r = a.r;
  const T* M = static_cast<const T*>(a.matrices[g]);
  float* E = a.residual + g * r * r;
  if (a.of_rows)
    self_products(M, a.length, r, 0, r, E);
  else
    columns_by_columns(M, a.length, r, E, a.block + g * kGramBlock * r);
  a.squared[g] = finished(E, r, a.identity);
}

template <typename T>
void backward_of(const GramArgs& a, int64_t g) {
  const int64_t r = a.r, length = a.length;
  const T* M = static_cast<const T*>(a.matrices[g]);
  T* out = static_cast<T*>(a.out) + g * r * length;
  float* slope = a.slope + g * r * r;
  const float* E = a.residual + g * r * r;
  for (int64_t i = 0; i < r * r; ++i) slope[i] = a.factor[g] * E[i];
  if (a.of_rows) {  // E is symmetric
    outer_products(Left{slope, r, 1}, r, M, length, r, 0, length,
                   [&](int64_t j, int64_t k, Floats sum, auto lanes) {
                     put(out + j * length + k, sum, lanes);
                   });
    return;
  }
  for (int64_t n = 0; n < length; n += kGramBlock) {
    const int64_t rows = smaller(kGramBlock, length - n);
    const float* some = wide_rows(M + n * r, rows, r, a.block + g * kGramBlock * r);
    outer_products(Left{some, 1, r}, rows, slope, r, r, 0, r,
                   [&](int64_t m, int64_t j, Floats sum, auto lanes) {
                     put(out + (n + m) * r + j, sum, lanes);
                   });
  }
}

}  // namespace

void gram_forward(const GramArgs& a, int64_t begin, int64_t end) {
  for (int64_t g = begin; g < end; ++g)
    a.dtype == Dtype::kFloat ? forward_of<float>(a, g) : forward_of<bf16>(a, g);
}

void gram_backward(const GramArgs& a, int64_t begin, int64_t end) {
  for (int64_t g = begin; g < end; ++g)
    a.dtype == Dtype::kFloat ? backward_of<float>(a, g) : backward_of<bf16>(a, g);
}

}  // namespace decomp_kernels::cpu::DK_LEVEL
