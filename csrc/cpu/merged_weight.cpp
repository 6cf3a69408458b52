// out[n, k] = out_scale[n] * (W[n, k] + scale * sum_j B[n, j] * core[j] * A[j, k]) * in_scale[k]
//
// One read of W and one write of the result: a tile's sums meet W in registers, and B A is nowhere.

#define DK_EXACT_SUBNORMALS
#include "merged_weight.h"

#include "products.h"

namespace decomp_kernels::cpu::DK_LEVEL {
namespace {

// out = scale * b * core, r numbers
template <typename TA>
void scaled(const TA* b, const float* core, float scale, float* out, int64_t r) {
  for (int64_t j = 0; j < r; j += kLanes) {
    const Part some{smaller(r - j, kLanes)};
    const Floats of_core = core ? take(core + j, some) : set1(1.0f);
    put(out + j, set1(scale) * (take(b + j, some) * of_core), some);
  }
}

template <typename TX, typename TA>
void merged_rows(const MergedWeightArgs& a, int64_t unit) {
  const int64_t r = a.r, K = a.K, n = unit * kMergedRows, rows = smaller(kMergedRows, a.N - n);
  const TX* W = static_cast<const TX*>(a.weight) + n * K;
  TX* out = static_cast<TX*>(a.out) + n * K;
  float* B = a.wide + n * r;
  // Without a branch nothing is read there, but an offset to a null pointer would be undefined.
  const TA* A = static_cast<const TA*>(r ? a.down : a.weight);
  if (a.up)
    for (int64_t m = 0; m < rows; ++m)
      scaled(static_cast<const TA*>(a.up) + (n + m) * r, a.core, a.scale, B + m * r, r);
  outer_products(Left{B, 1, r}, rows, A, K, r, 0, K,
                 [&](int64_t m, int64_t k, Floats sum, auto lanes) {
                   Floats w = take(W + m * K + k, lanes);
                   if (a.up) w = w + sum;  // without a branch -0 stays -0
                   if (a.out_scale) w = w * set1(a.out_scale[n + m]);
                   if (a.in_scale) w = w * take(a.in_scale + k, lanes);
                   put(out + m * K + k, w, lanes);
                 });
}

}  // namespace

void merged_weight(const MergedWeightArgs& a, int64_t begin, int64_t end) {
  const bool wide_weight = a.weight_dtype == Dtype::kFloat;
  const bool wide_small = a.small_dtype == Dtype::kFloat;
  for (int64_t unit = begin; unit < end; ++unit) {
    if (wide_weight && wide_small) merged_rows<float, float>(a, unit);
    if (wide_weight && !wide_small) merged_rows<float, bf16>(a, unit);
    if (!wide_weight && wide_small) merged_rows<bf16, float>(a, unit);
    if (!wide_weight && !wide_small) merged_rows<bf16, bf16>(a, unit);
  }
}

}  // namespace decomp_kernels::cpu::DK_LEVEL
