// Entries of left right^T, and a weight with values added, at some places (maths:
// decomp_kernels/reference/scatter.py).

#include "../cpu/scatter.h"

#include <torch/csrc/stable/library.h>

#include <cstring>

#include "checks.h"
#include "shares.h"

namespace decomp_kernels {
namespace {

const int64_t* places(const Checks& check, const Tensor& t, const char* name, int64_t count,
                      int64_t size) {
  check.tensor(t, name, {count});
  check.dtype(t, name, ScalarType::Long);
  const int64_t* at = static_cast<const int64_t*>(t.const_data_ptr());
  for (int64_t j = 0; j < count; ++j)
    check.that(at[j] >= 0 && at[j] < size, name, " must be from 0 to ", size - 1, ", got ", at[j]);
  return at;
}

Tensor sampled_products(Tensor left, Tensor right, Tensor rows, Tensor cols) {
  const Checks check("sampled_products", left, "left");
  check.tensor(left, "left", {-1, -1});
  check.tensor(right, "right", {-1, left.size(1)});
  check.tensor(rows, "rows", {-1});
  check.dtype(right, "right", left.scalar_type());
  const int64_t count = rows.size(0);
  cpu::ProductsArgs a{};
  a.dtype = check.floating(left, "left", false);
  a.left = left.const_data_ptr();
  a.right = right.const_data_ptr();
  a.rows = places(check, rows, "rows", count, left.size(0));
  a.cols = places(check, cols, "cols", count, right.size(0));
  a.M = left.size(1);
  Tensor out = make(left, {count}, ScalarType::Float);
  a.out = static_cast<float*>(out.mutable_data_ptr());
  const auto run = DK_AT_LEVEL(sampled_products);
  torch::stable::parallel_for(0, count, grain(a.M),
                              [&](int64_t begin, int64_t end) { run(a, begin, end); });
  return out;
}

Tensor scattered_sum(Tensor weight, Tensor rows, Tensor cols, Tensor values) {
  const Checks check("scattered_sum", weight, "weight");
  check.tensor(weight, "weight", {-1, -1});
  check.tensor(values, "values", {-1});
  const int64_t N = weight.size(0), count = values.size(0);
  cpu::SumArgs a{};
  a.weight_dtype = check.floating(weight, "weight", false);
  a.values_dtype = check.floating(values, "values", false);
  a.K = weight.size(1);
  a.weight = weight.const_data_ptr();
  a.values = values.const_data_ptr();
  a.rows = places(check, rows, "rows", count, N);
  a.cols = places(check, cols, "cols", count, a.K);
  Tensor out = make(weight, {N, a.K}, weight.scalar_type());
  a.out = out.mutable_data_ptr();
  const int64_t line = a.K * (a.weight_dtype == Dtype::kFloat ? 4 : 2);
  torch::stable::parallel_for(0, N, grain(a.K), [&](int64_t begin, int64_t end) {
    std::memcpy(static_cast<char*>(a.out) + begin * line,
                static_cast<const char*>(a.weight) + begin * line, size_t((end - begin) * line));
  });
  const auto run = DK_AT_LEVEL(scattered_sum);
  torch::stable::parallel_for(0, count, grain(1),
                              [&](int64_t begin, int64_t end) { run(a, begin, end); });
  return out;
}

}  // namespace
}  // namespace decomp_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(decomp_kernels_native, m) {
  m.def("sampled_products(Tensor left, Tensor right, Tensor rows, Tensor cols) -> Tensor");
  m.def("scattered_sum(Tensor weight, Tensor rows, Tensor cols, Tensor values) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(decomp_kernels_native, CPU, m) {
  m.impl("sampled_products", TORCH_BOX(&decomp_kernels::sampled_products));
  m.impl("scattered_sum", TORCH_BOX(&decomp_kernels::scattered_sum));
}
