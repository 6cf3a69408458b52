// Entries of a product, and sums at some places.
//
// A product is one dot product an entry, of two rows that lie in memory as they are read.  Entries
// in the order of rows share a row, which stays in the level-1 cache.

#include "scatter.h"

#include "products.h"

namespace decomp_kernels::cpu::DK_LEVEL {
namespace {

constexpr int kSums = 4;  // side by side, so that the latency of one is hidden by the others

// Short sums are added to a long one: a step that batches thousands of tokens loses fewer digits.
constexpr int64_t kShort = 2048;

template <typename T>
float dot(const T* a, const T* b, int64_t M) {
  using S = Step<T, T>;
  constexpr int64_t kStep = S::kElements;
  float total = 0.0f;
  for (int64_t first = 0; first < M; first += kShort) {
    const int64_t end = smaller(M, first + kShort);
    Floats sums[kSums];
    for (int i = 0; i < kSums; ++i) sums[i] = zero();
    int64_t m = first;
    for (; m + kSums * kStep <= end; m += kSums * kStep)
#pragma GCC unroll 4
      for (int i = 0; i < kSums; ++i)
        sums[i] = S::add(S::x(a + m + i * kStep), S::y(b + m + i * kStep), sums[i]);
    for (; m + kStep <= end; m += kStep) sums[0] = S::add(S::x(a + m), S::y(b + m), sums[0]);
    if (const int64_t rest = end - m) sums[0] = S::add(S::x(a + m, rest), S::y(b + m, rest), sums[0]);
    total += reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  return total;
}

template <typename T>
void products_of(const ProductsArgs& a, int64_t begin, int64_t end) {
  const T* left = static_cast<const T*>(a.left);
  const T* right = static_cast<const T*>(a.right);
  for (int64_t j = begin; j < end; ++j)
    a.out[j] = dot(left + a.rows[j] * a.M, right + a.cols[j] * a.M, a.M);
}

template <typename T, typename V>
void sums_of(const SumArgs& a, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(a.weight);
  const V* values = static_cast<const V*>(a.values);
  T* out = static_cast<T*>(a.out);
  for (int64_t j = begin; j < end; ++j) {
    const int64_t at = a.rows[j] * a.K + a.cols[j];
    out[at] = from_float<T>(to_float(weight[at]) + to_float(values[j]));
  }
}

template <typename T>
void sums_in(const SumArgs& a, int64_t begin, int64_t end) {
  a.values_dtype == Dtype::kFloat ? sums_of<T, float>(a, begin, end)
                                  : sums_of<T, bf16>(a, begin, end);
}

}  // namespace

void sampled_products(const ProductsArgs& a, int64_t begin, int64_t end) {
  a.dtype == Dtype::kFloat ? products_of<float>(a, begin, end) : products_of<bf16>(a, begin, end);
}

void scattered_sum(const SumArgs& a, int64_t begin, int64_t end) {
  a.weight_dtype == Dtype::kFloat ? sums_in<float>(a, begin, end) : sums_in<bf16>(a, begin, end);
}

}  // namespace decomp_kernels::cpu::DK_LEVEL
