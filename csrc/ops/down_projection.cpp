// The way into the rank:   t = drop(x) down^T / kept fraction      v = phi(t) * core * scale
//
//     x [M, K]   down [r, K]   core [r] float32   t, v [M, r] in down's dtype
//
// v comes from t before its rounding.  Where it would be t itself (no core, scale 1, identity) it
// is an empty tensor.

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "checks.h"
#include "down_projection.h"
#include "dropout.h"
#include "scratch.h"

#ifdef DK_CUDA
#include "../cuda/down_projection.h"
#include "on_device.h"
#endif

namespace decomp_kernels {
namespace {

Activation activation_of(const Checks& checks, const std::string& name) {
  if (name == "identity") return Activation::kIdentity;
  if (name == "relu") return Activation::kRelu;
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  checks.that(name == "tanh", "activation must be identity, relu, silu, gelu or tanh, got ", name);
  return Activation::kTanh;
}

// The checks of every device, and the sizes and options that follow from them.
struct Call {
  Checks checks;
  int64_t M, K, r;
  Dtype x_dtype, small_dtype;
  Dropout dropout;
  Activation activation;
  bool has_v;

  Call(const Tensor& x, const Tensor& down, const OptionalTensor& core, const OptionalTensor& seed,
       double scale, double p, const std::string& phi)
      : checks("down_projection", x, "x") {
    checks.tensor(x, "x", {-1, -1});
    M = x.size(0);
    K = x.size(1);
    checks.tensor(down, "down", {-1, K});
    r = down.size(0);
    x_dtype = checks.floating(x, "x", checks.on_cuda());
    small_dtype = checks.floating(down, "down", checks.on_cuda());
    checks.tensor(core, "core", {r});
    checks.dtype(core, "core", ScalarType::Float);
    dropout = checked_dropout(checks, seed, p);
    activation = activation_of(checks, phi);
    has_v = core || scale != 1.0 || activation != Activation::kIdentity;
  }
};

std::tuple<Tensor, Tensor> down_projection(Tensor x, Tensor down, OptionalTensor core,
                                           OptionalTensor seed, double scale, double dropout,
                                           std::string activation) {
  const Call call(x, down, core, seed, scale, dropout, activation);
  Tensor t = make(x, {call.M, call.r}, down.scalar_type());
  Tensor v = call.has_v ? make(x, {call.M, call.r}, down.scalar_type())
                        : make(x, {0}, down.scalar_type());
  cpu::DownProjection args{};
  args.x = x.const_data_ptr();
  args.down = down.const_data_ptr();
  args.core = float_pointer(core);
  args.t = t.mutable_data_ptr();
  args.v = call.has_v ? v.mutable_data_ptr() : nullptr;
  args.M = call.M;
  args.K = call.K;
  args.r = call.r;
  args.seed = host_seed(seed);
  args.threshold = call.dropout.threshold;
  args.over_kept = call.dropout.over_kept();
  args.scale = float(scale);
  args.activation = call.activation;
  args.x_dtype = call.x_dtype;
  args.small_dtype = call.small_dtype;

  Tensor packed = make(x, {args.packed_floats()}, ScalarType::Float);
  args.packed = static_cast<float*>(packed.mutable_data_ptr());
  const auto pack = DK_AT_LEVEL(down_projection_pack);
  torch::stable::parallel_for(0, args.packs(), 1,
                              [&](int64_t begin, int64_t end) { pack(args, begin, end); });
  const auto kernel = DK_AT_LEVEL(down_projection);
  torch::stable::parallel_for(0, args.units(), 1, [&](int64_t begin, int64_t end) {
    const auto scratch = scratch_floats(args.scratch_floats());
    kernel(args, begin, end, scratch.get());
  });
  return {t, v};
}

#ifdef DK_CUDA

std::tuple<Tensor, Tensor> down_projection_cuda(Tensor x, Tensor down, OptionalTensor core,
                                                OptionalTensor seed, double scale, double dropout,
                                                std::string activation) {
  const Call call(x, down, core, seed, scale, dropout, activation);
  const Device device("down_projection", x);
  Tensor t = make(x, {call.M, call.r}, down.scalar_type());
  Tensor v = make(x, {0}, down.scalar_type());
  if (call.has_v) v = make(x, {call.M, call.r}, down.scalar_type());
  cuda::DownProjection args;
  args.x = matrix(x);
  args.down = matrix(down);
  args.M = call.M, args.K = call.K, args.R = call.r;
  args.mask = mask(seed, call.dropout);
  args.core = vector(core);
  args.scale = float(scale);
  args.activation = call.activation;
  args.t = output(t);
  args.v = output(v);
  if (t.numel()) launch(args, x, device);
  return {t, v};
}

#endif

}  // namespace
}  // namespace decomp_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(decomp_kernels_native, m) {
  m.def("down_projection(Tensor x, Tensor down, Tensor? core, Tensor? seed, float scale, "
        "float dropout, str activation) -> (Tensor t, Tensor v)");
}

STABLE_TORCH_LIBRARY_IMPL(decomp_kernels_native, CPU, m) {
  m.impl("down_projection", TORCH_BOX(&decomp_kernels::down_projection));
}

#ifdef DK_CUDA
STABLE_TORCH_LIBRARY_IMPL(decomp_kernels_native, CUDA, m) {
  m.impl("down_projection", TORCH_BOX(&decomp_kernels::down_projection_cuda));
}
#endif
