// n_j = ||(W + scale * B A)_j|| and its gradients (maths: decomp_kernels/reference/row_norm.py).

#include "../cpu/row_norm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>

#include "checks.h"
#include "shares.h"

#ifdef DK_CUDA
#include "../cuda/row_norm.h"
#include "on_device.h"
#endif

namespace decomp_kernels {
namespace {

struct Shapes {
  int64_t N, K, r;
  Dtype weight, small;
};

Shapes check_low_rank(const Checks& check, const Tensor& weight, const Tensor& down,
                      const Tensor& up) {
  check.tensor(weight, "weight", {-1, -1});
  check.tensor(down, "down", {-1, weight.size(1)});
  check.tensor(up, "up", {weight.size(0), down.size(0)});
  const Dtype large = check.floating(weight, "weight", check.on_cuda());
  const Dtype small = check.floating(down, "down", check.on_cuda());
  check.dtype(up, "up", down.scalar_type());
  return {weight.size(0), weight.size(1), down.size(0), large, small};
}

void check_vector(const Checks& check, const Tensor& t, const char* name, int64_t N) {
  check.tensor(t, name, {N});
  check.dtype(t, name, ScalarType::Float);
}

float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

cpu::RowNormArgs arguments(const Shapes& shapes, const Tensor& weight, const Tensor& down,
                           const Tensor& up, double scale, Tensor& gram, Tensor& wide) {
  cpu::RowNormArgs a{};
  a.weight = weight.const_data_ptr();
  a.down = down.const_data_ptr();
  a.up = up.const_data_ptr();
  a.weight_dtype = shapes.weight;
  a.small_dtype = shapes.small;
  a.N = shapes.N;
  a.K = shapes.K;
  a.r = shapes.r;
  a.scale = float(scale);
  a.gram = floats(gram);
  a.wide = floats(wide);
  return a;
}

template <typename F>
void over_units(int64_t units, int64_t elements_a_unit, const cpu::RowNormArgs& a, F* run) {
  torch::stable::parallel_for(0, units, grain(elements_a_unit),
                              [&](int64_t begin, int64_t end) { run(a, begin, end); });
}

Tensor squared_rows(Tensor weight) {
  const Checks check("squared_rows", weight, "weight");
  check.tensor(weight, "weight", {-1, -1});
  cpu::RowNormArgs a{};
  a.weight_dtype = check.floating(weight, "weight", false);
  a.weight = weight.const_data_ptr();
  a.N = weight.size(0);
  a.K = weight.size(1);
  Tensor out = make(weight, {a.N}, ScalarType::Float);
  a.out = floats(out);
  over_units(a.N, a.K, a, DK_AT_LEVEL(squared_rows));
  return out;
}

Tensor row_norm_fwd(Tensor weight, Tensor weight_sq, Tensor down, Tensor up, double scale) {
  const Checks check("row_norm_fwd", weight, "weight");
  const Shapes s = check_low_rank(check, weight, down, up);
  check_vector(check, weight_sq, "weight_sq", s.N);
  Tensor out = make(weight, {s.N}, ScalarType::Float);
  Tensor gram = make(weight, {s.r, s.r}, ScalarType::Float);
  Tensor wide = make(weight, {s.N, s.r}, ScalarType::Float);
  Tensor products = make(weight, {s.N, s.r}, ScalarType::Float);
  cpu::RowNormArgs a = arguments(s, weight, down, up, scale, gram, wide);
  a.weight_sq = floats(std::as_const(weight_sq));
  a.products = floats(products);
  a.out = floats(out);
  over_units(blocks(s.r, cpu::kGramRows), cpu::kGramRows * s.K, a, DK_AT_LEVEL(down_gram));
  over_units(blocks(s.N, cpu::kForwardRows), cpu::kForwardRows * s.K, a,
             DK_AT_LEVEL(row_norm_forward));
  return out;
}

std::tuple<Tensor, Tensor> row_norm_bwd(Tensor d_norm, Tensor norm, Tensor weight, Tensor down,
                                        Tensor up, double scale) {
  const Checks check("row_norm_bwd", weight, "weight");
  const Shapes s = check_low_rank(check, weight, down, up);
  check_vector(check, d_norm, "d_norm", s.N);
  check_vector(check, norm, "norm", s.N);
  const int64_t parts = blocks(s.N, cpu::kBackwardRows);
  Tensor d_down = make(weight, {s.r, s.K}, ScalarType::Float);
  Tensor d_up = make(weight, {s.N, s.r}, ScalarType::Float);
  Tensor gram = make(weight, {s.r, s.r}, ScalarType::Float);
  Tensor wide = make(weight, {s.N, s.r}, ScalarType::Float);
  Tensor partial = make(weight, {parts, s.r, s.K}, ScalarType::Float);
  Tensor partial_gram = make(weight, {parts, s.r, s.r}, ScalarType::Float);
  cpu::RowNormArgs a = arguments(s, weight, down, up, scale, gram, wide);
  a.d_norm = floats(std::as_const(d_norm));
  a.norm = floats(std::as_const(norm));
  a.d_up = floats(d_up);
  a.d_down = floats(d_down);
  a.partial = floats(partial);
  a.partial_gram = floats(partial_gram);
  over_units(blocks(s.r, cpu::kGramRows), cpu::kGramRows * s.K, a, DK_AT_LEVEL(down_gram));
  over_units(parts, cpu::kBackwardRows * s.K, a, DK_AT_LEVEL(row_norm_backward));
  DK_AT_LEVEL(row_norm_gram_sum)(a, 0, parts ? s.r * s.r : 0);
  over_units(blocks(s.K, cpu::kFinishColumns), cpu::kFinishColumns * s.r, a,
             DK_AT_LEVEL(row_norm_finish));
  return {d_down, d_up};
}

#ifdef DK_CUDA

Tensor squared_rows_cuda(Tensor weight) {
  const Checks check("squared_rows", weight, "weight");
  check.tensor(weight, "weight", {-1, -1});
  check.floating(weight, "weight", true);
  const Device device("squared_rows", weight);
  Tensor out = make(weight, {weight.size(0)}, ScalarType::Float);
  cuda::SquaredRows args;
  args.weight = matrix(weight);
  args.N = weight.size(0), args.K = weight.size(1);
  args.squares = floats(out);
  if (args.N && args.K) launch(args, weight, device);
  if (args.K == 0) torch::stable::zero_(out);
  return out;
}

Tensor row_norm_fwd_cuda(Tensor weight, Tensor weight_sq, Tensor down, Tensor up,
                             double scale) {
  const Checks check("row_norm_fwd", weight, "weight");
  const Shapes shapes = check_low_rank(check, weight, down, up);
  check_vector(check, weight_sq, "weight_sq", shapes.N);
  const Device device("row_norm_fwd", weight);
  Tensor out = make(weight, {shapes.N}, ScalarType::Float);
  cuda::RowNorm args;
  args.weight = matrix(weight);
  args.down = matrix(down);
  args.up = matrix(up);
  args.N = shapes.N, args.K = shapes.K, args.R = shapes.r;
  args.squares = floats(std::as_const(weight_sq));
  args.scale = float(scale);
  args.norm = floats(out);
  if (shapes.N) launch(args, weight, device);
  return out;
}

std::tuple<Tensor, Tensor> row_norm_bwd_cuda(Tensor d_norm, Tensor norm, Tensor weight,
                                             Tensor down, Tensor up, double scale) {
  const Checks check("row_norm_bwd", weight, "weight");
  const Shapes shapes = check_low_rank(check, weight, down, up);
  check_vector(check, d_norm, "d_norm", shapes.N);
  check_vector(check, norm, "norm", shapes.N);
  const Device device("row_norm_bwd", weight);
  Tensor d_down = make(weight, {shapes.r, shapes.K}, ScalarType::Float);
  Tensor d_up = make(weight, {shapes.N, shapes.r}, ScalarType::Float);
  cuda::RowNormGradients args;
  args.d_norm = floats(std::as_const(d_norm));
  args.norm = floats(std::as_const(norm));
  args.weight = matrix(weight);
  args.down = matrix(down);
  args.up = matrix(up);
  args.N = shapes.N, args.K = shapes.K, args.R = shapes.r;
  args.scale = float(scale);
  args.d_down = floats(d_down);
  args.d_up = floats(d_up);
  if (shapes.N == 0 || shapes.K == 0) {
    torch::stable::zero_(d_down);
    torch::stable::zero_(d_up);
  } else if (shapes.r) {
    launch(args, weight, device);
  }
  return {d_down, d_up};
}

#endif

}  // namespace
}  // namespace decomp_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(decomp_kernels_native, m) {
  m.def("squared_rows(Tensor weight) -> Tensor");
  m.def(
      "row_norm_fwd(Tensor weight, Tensor weight_sq, Tensor down, Tensor up, float scale) "
      "-> Tensor");
  m.def(
      "row_norm_bwd(Tensor d_norm, Tensor norm, Tensor weight, Tensor down, Tensor up, "
      "float scale) -> (Tensor d_down, Tensor d_up)");
}

STABLE_TORCH_LIBRARY_IMPL(decomp_kernels_native, CPU, m) {
  m.impl("squared_rows", TORCH_BOX(&decomp_kernels::squared_rows));
  m.impl("row_norm_fwd", TORCH_BOX(&decomp_kernels::row_norm_fwd));
  m.impl("row_norm_bwd", TORCH_BOX(&decomp_kernels::row_norm_bwd));
}

#ifdef DK_CUDA
STABLE_TORCH_LIBRARY_IMPL(decomp_kernels_native, CUDA, m) {
  m.impl("squared_rows", TORCH_BOX(&decomp_kernels::squared_rows_cuda));
  m.impl("row_norm_fwd", TORCH_BOX(&decomp_kernels::row_norm_fwd_cuda));
  m.impl("row_norm_bwd", TORCH_BOX(&decomp_kernels::row_norm_bwd_cuda));
}
#endif
