// The way out of the rank:   out = bias + addend + mask(v small)      rounded once
//
//     v [M, r]   small [r, N]   bias [N]   addend, out [M, N] of ``dtype``
//
// The mask is that of an [M, N] tensor; nothing is divided by the kept fraction: the caller divides
// v.

#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "dropout.h"
#include "scratch.h"

#ifdef DK_CUDA
#include "../cuda/up_expansion.h"
#include "on_device.h"
#endif
#include "up_expansion.h"

namespace decomp_kernels {
namespace {

// The checks of every device, and the sizes and options that follow from them.
struct Call {
  Checks checks;
  int64_t M, N, r;
  Dtype small_dtype, bias_dtype, out_dtype;
  Dropout dropout;

  Call(const Tensor& v, const Tensor& small, const OptionalTensor& bias,
       const OptionalTensor& addend, const OptionalTensor& seed, double p, ScalarType dtype)
      : checks("up_expansion", v, "v") {
    checks.tensor(v, "v", {-1, -1});
    M = v.size(0);
    r = v.size(1);
    checks.tensor(small, "small", {r, -1});
    N = small.size(1);
    small_dtype = checks.floating(v, "v", checks.on_cuda());
    checks.dtype(small, "small", v.scalar_type());
    checks.tensor(bias, "bias", {N});
    bias_dtype = bias ? checks.floating(*bias, "bias", checks.on_cuda()) : Dtype::kFloat;
    checks.tensor(addend, "addend", {M, N});
    checks.dtype(addend, "addend", dtype);
    out_dtype = checks.floating(dtype, "dtype", checks.on_cuda());
    dropout = checked_dropout(checks, seed, p);
  }
};

Tensor up_expansion(Tensor v, Tensor small, OptionalTensor bias, OptionalTensor addend,
                    OptionalTensor seed, double dropout, ScalarType dtype) {
  const Call call(v, small, bias, addend, seed, dropout, dtype);
  Tensor out = make(v, {call.M, call.N}, dtype);
  cpu::UpExpansion args{};
  args.v = v.const_data_ptr();
  args.small = small.const_data_ptr();
  args.bias = pointer(bias);
  args.addend = pointer(addend);
  args.out = out.mutable_data_ptr();
  args.M = call.M;
  args.N = call.N;
  args.r = call.r;
  args.seed = host_seed(seed);
  args.threshold = call.dropout.threshold;
  args.small_dtype = call.small_dtype;
  args.bias_dtype = call.bias_dtype;
  args.out_dtype = call.out_dtype;

  const auto kernel = DK_AT_LEVEL(up_expansion);
  torch::stable::parallel_for(0, args.units(), 1, [&](int64_t begin, int64_t end) {
    const auto scratch = scratch_floats(args.scratch_floats());
    kernel(args, begin, end, scratch.get());
  });
  return out;
}

#ifdef DK_CUDA

Tensor up_expansion_cuda(Tensor v, Tensor small, OptionalTensor bias, OptionalTensor addend,
                         OptionalTensor seed, double dropout, ScalarType dtype) {
  const Call call(v, small, bias, addend, seed, dropout, dtype);
  const Device device("up_expansion", v);
  Tensor out = make(v, {call.M, call.N}, dtype);
  cuda::UpExpansion args;
  args.v = matrix(v);
  args.down = matrix(small);
  args.M = call.M, args.C = call.N, args.R = call.r;
  args.mask = mask(seed, call.dropout);
  args.bias = vector(bias);
  args.addend = matrix(addend);
  args.out = output(out);
  if (out.numel()) launch(args, v, device);
  return out;
}

#endif

}  // namespace
}  // namespace decomp_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(decomp_kernels_native, m) {
  m.def("up_expansion(Tensor v, Tensor small, Tensor? bias, Tensor? addend, Tensor? seed, "
        "float dropout, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(decomp_kernels_native, CPU, m) {
  m.impl("up_expansion", TORCH_BOX(&decomp_kernels::up_expansion));
}

#ifdef DK_CUDA
STABLE_TORCH_LIBRARY_IMPL(decomp_kernels_native, CUDA, m) {
  m.impl("up_expansion", TORCH_BOX(&decomp_kernels::up_expansion_cuda));
}
#endif
