// out_scale * (W + scale * B core A) * in_scale (maths: merged_weight of
// decomp_kernels/reference/decomposed_linear.py).

#include "../cpu/merged_weight.h"

#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "shares.h"

#ifdef DK_CUDA
#include "../cuda/merged_weight.h"
#include "on_device.h"
#endif

namespace decomp_kernels {
namespace {

// Returns r, 0 without a branch.
int64_t check_all(const Checks& check, const Tensor& weight, const OptionalTensor& down,
                  const OptionalTensor& up, const OptionalTensor& core,
                  const OptionalTensor& in_scale, const OptionalTensor& out_scale) {
  check.tensor(weight, "weight", {-1, -1});
  const int64_t N = weight.size(0), K = weight.size(1);
  check.that(down.has_value() == up.has_value(),
             "down and up come together: give both, or neither");
  check.that(down || !core, "core scales the low-rank branch: give down and up with it");
  check.tensor(down, "down", {-1, K});
  const int64_t r = down ? down->size(0) : 0;
  check.tensor(up, "up", {N, r});
  check.tensor(core, "core", {r});
  check.tensor(in_scale, "in_scale", {K});
  check.tensor(out_scale, "out_scale", {N});
  check.dtype(core, "core", ScalarType::Float);
  check.dtype(in_scale, "in_scale", ScalarType::Float);
  check.dtype(out_scale, "out_scale", ScalarType::Float);
  check.floating(weight, "weight", check.on_cuda());
  if (down) {
    check.floating(*down, "down", check.on_cuda());
    check.dtype(up, "up", down->scalar_type());
  }
  return r;
}

Tensor merged_weight(Tensor weight, OptionalTensor down, OptionalTensor up, OptionalTensor core,
                     OptionalTensor in_scale, OptionalTensor out_scale, double scale) {
  const Checks check("merged_weight", weight, "weight");
  const int64_t r = check_all(check, weight, down, up, core, in_scale, out_scale);
  const int64_t N = weight.size(0), K = weight.size(1);
  cpu::MergedWeightArgs a{};
  a.weight_dtype = check.floating(weight, "weight", false);
  a.small_dtype = down ? check.floating(*down, "down", false) : Dtype::kFloat;
  a.weight = weight.const_data_ptr();
  a.down = pointer(down);
  a.up = pointer(up);
  a.core = float_pointer(core);
  a.in_scale = float_pointer(in_scale);
  a.out_scale = float_pointer(out_scale);
  a.N = N;
  a.K = K;
  a.r = r;
  a.scale = float(scale);
  Tensor wide = make(weight, {N, r}, ScalarType::Float);
  Tensor out = make(weight, {N, K}, weight.scalar_type());
  a.wide = static_cast<float*>(wide.mutable_data_ptr());
  a.out = out.mutable_data_ptr();

  const auto run = DK_AT_LEVEL(merged_weight);
  torch::stable::parallel_for(0, blocks(N, cpu::kMergedRows), grain(cpu::kMergedRows * K),
                              [&](int64_t begin, int64_t end) { run(a, begin, end); });
  return out;
}

#ifdef DK_CUDA

Tensor merged_weight_cuda(Tensor weight, OptionalTensor down, OptionalTensor up,
                          OptionalTensor core, OptionalTensor in_scale, OptionalTensor out_scale,
                          double scale) {
  const Checks check("merged_weight", weight, "weight");
  const int64_t r = check_all(check, weight, down, up, core, in_scale, out_scale);
  const Device device("merged_weight", weight);
  Tensor out = make(weight, {weight.size(0), weight.size(1)}, weight.scalar_type());
  cuda::MergedWeight args;
  args.weight = matrix(weight);
  if (r) args.up = matrix(up), args.down = matrix(down), args.core = vector(core);
  args.N = weight.size(0), args.K = weight.size(1), args.R = r;
  args.in_scale = vector(in_scale);
  args.out_scale = vector(out_scale);
  args.scale = float(scale);
  args.out = output(out);
  if (out.numel()) launch(args, weight, device);
  return out;
}

#endif

}  // namespace
}  // namespace decomp_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(decomp_kernels_native, m) {
  m.def(
      "merged_weight(Tensor weight, Tensor? down, Tensor? up, Tensor? core, Tensor? in_scale, "
      "Tensor? out_scale, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(decomp_kernels_native, CPU, m) {
  m.impl("merged_weight", TORCH_BOX(&decomp_kernels::merged_weight));
}

#ifdef DK_CUDA
STABLE_TORCH_LIBRARY_IMPL(decomp_kernels_native, CUDA, m) {
  m.impl("merged_weight", TORCH_BOX(&decomp_kernels::merged_weight_cuda));
}
#endif
