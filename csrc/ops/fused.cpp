// The decomposed linear's two large products, each in one kernel on a GPU.
//
//     fused_forward          z = x W^T + v B^T + addend      y = out_scale * z + bias
//     fused_input_gradient   dX = g W + mask(dt A)           d_x = in_scale * dX
//                            d_in_scale = sum_m x * dX
//
//     x, d_x [M, K]   W [N, K]   v, dt [M, r]   B = up [N, r]   A = down [r, K]   g, y, z [M, N]
//
// form: "hopper" (warp-specialised, sm_90 alone), "mma" (sm_80 and later), "auto" for the first that
// can run.  A form that cannot run is refused with its reason.  16-bit tensors of one dtype; scales
// and bias float32.  What is not asked for is an empty tensor.

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <string>
#include <tuple>

#include "checks.h"
#include "dropout.h"

#ifdef DK_CUDA
#include "device.h"
#include "mma_gemm.h"
#ifdef DK_HOPPER
#include "hopper_gemm.h"
#endif
#endif

namespace decomp_kernels {
namespace {

#ifdef DK_CUDA

using cuda::MmaForward;
using cuda::MmaInputGradient;

// 16-bit, and the same for all.
Dtype narrow(const Checks& checks, const Tensor& first, const char* name) {
  const Dtype dtype = checks.floating(first, name, true);
  checks.that(dtype != Dtype::kFloat, name, " must be bfloat16 or float16, got Float");
  return dtype;
}

void check_form(const Checks& checks, const std::string& form) {
  checks.that(form == "auto" || form == "hopper" || form == "mma",
              "form must be auto, hopper or mma, got ", form);
}

#ifdef DK_HOPPER

// Why the Hopper form cannot run.
template <typename Args>
const char* why_not_hopper(const Args& args, HopperOp op, const Device& device) {
  if (const char* why = why_not(args, device.arch())) return why;
  const bool linked = cuda::hopper_linked(op, args.dtype) != 0;
  return linked ? nullptr : "the library was built without it (DECOMP_KERNELS_HOPPER_INSTANCES)";
}

HopperForwardArgs hopper(const MmaForward& a) {
  return {a.x.data, a.weight.data, a.v.data, a.up.data, a.addend.data,
          static_cast<const float*>(a.out_scale.data), static_cast<const float*>(a.bias.data),
          a.y.data, a.z.data, a.M, a.N, a.K, a.r, a.K, a.K, a.r, a.r, a.N, a.N, a.N, a.dtype};
}

HopperInputGradientArgs hopper(const MmaInputGradient& a) {
  return {a.g.data, a.weight.data, a.dt.data, a.down.data, a.seed, a.dropout_threshold,
          static_cast<const float*>(a.in_scale.data), a.x.data, a.d_x.data, a.d_in_scale,
          a.M, a.N, a.K, a.r, a.N, a.K, a.r, a.K, a.K, a.K, a.dtype};
}

#endif

template <typename Args>
void run_mma(const Args& args, const Tensor& like, const Device& device) {
  device.supported(cuda::why_not(args, device.arch()));
  const Tensor scratch = workspace(like, cuda::workspace_bytes(args));
  device.check(cuda::launch(args, scratch.mutable_data_ptr(), device.processors(), device.stream()));
}

template <typename Args>
void run(const Args& args, const Tensor& like, const std::string& form, const Device& device) {
#ifdef DK_HOPPER
  if (form != "mma") {
    constexpr bool forward = std::is_same_v<Args, MmaForward>;
    const auto theirs = hopper(args);
    const char* why =
        why_not_hopper(theirs, forward ? HopperOp::kForward : HopperOp::kInputGradient, device);
    if (form == "hopper") device.supported(why);
    if (why == nullptr) {
      const Tensor scratch = workspace(like, cuda::workspace_bytes(theirs));
      device.check(
          cuda::launch(theirs, scratch.mutable_data_ptr(), device.processors(), device.stream()));
      return;
    }
  }
#else
  if (form == "hopper") device.supported("the library was built without the Hopper kernels");
#endif
  run_mma(args, like, device);
}

std::tuple<Tensor, Tensor> fused_forward(
    Tensor x, Tensor weight, OptionalTensor v, OptionalTensor up, OptionalTensor bias,
    OptionalTensor out_scale, OptionalTensor addend, bool keep_z, std::string form) {
  const Checks checks("fused_forward", x, "x");
  checks.tensor(x, "x", {-1, -1});
  const Dtype dtype = narrow(checks, x, "x");
  const int64_t M = x.size(0), K = x.size(1);
  checks.tensor(weight, "weight", {-1, K});
  const int64_t N = weight.size(0);
  checks.that(v.has_value() == up.has_value(), "v and up come together");
  checks.tensor(v, "v", {M, -1});
  const int64_t r = v ? v->size(1) : 0;
  checks.tensor(up, "up", {N, r});
  checks.tensor(addend, "addend", {M, N});
  for (const auto& [t, name] : {std::pair{&v, "v"}, {&up, "up"}, {&addend, "addend"}})
    checks.dtype(*t, name, x.scalar_type());
  checks.dtype(weight, "weight", x.scalar_type());
  for (const auto& [t, name] : {std::pair{&bias, "bias"}, {&out_scale, "out_scale"}}) {
    checks.tensor(*t, name, {N});
    checks.dtype(*t, name, ScalarType::Float);
  }
  check_form(checks, form);

  Tensor y = make(x, {M, N}, x.scalar_type());
  Tensor z = keep_z ? make(x, {M, N}, x.scalar_type()) : make(x, {0}, x.scalar_type());
  const Device device("fused_forward", x);
  MmaForward args;
  args.dtype = dtype;
  args.M = M, args.N = N, args.K = K, args.r = r;
  args.x = {x.const_data_ptr(), K};
  args.weight = {weight.const_data_ptr(), K};
  if (r) args.v = {pointer(v), r}, args.up = {pointer(up), r};
  if (addend) args.addend = {pointer(addend), N};
  args.out_scale = {pointer(out_scale)};
  args.bias = {pointer(bias)};
  args.y = {y.mutable_data_ptr(), N};
  if (keep_z) args.z = {z.mutable_data_ptr(), N};
  if (M > 0 && N > 0) run(args, x, form, device);
  return {y, z};
}

std::tuple<Tensor, Tensor> fused_input_gradient(
    Tensor g, Tensor weight, OptionalTensor dt, OptionalTensor down, OptionalTensor in_scale,
    OptionalTensor x, OptionalTensor seed, double dropout, bool need_x, std::string form) {
  const Checks checks("fused_input_gradient", g, "g");
  checks.tensor(g, "g", {-1, -1});
  const Dtype dtype = narrow(checks, g, "g");
  const int64_t M = g.size(0), N = g.size(1);
  checks.tensor(weight, "weight", {N, -1});
  const int64_t K = weight.size(1);
  checks.that(dt.has_value() == down.has_value(), "dt and down come together");
  checks.tensor(dt, "dt", {M, -1});
  const int64_t r = dt ? dt->size(1) : 0;
  checks.tensor(down, "down", {r, K});
  checks.tensor(x, "x", {M, K});
  for (const auto& [t, name] : {std::pair{&dt, "dt"}, {&down, "down"}, {&x, "x"}})
    checks.dtype(*t, name, g.scalar_type());
  checks.dtype(weight, "weight", g.scalar_type());
  checks.tensor(in_scale, "in_scale", {K});
  checks.dtype(in_scale, "in_scale", ScalarType::Float);
  check_form(checks, form);
  const Dropout drop = checked_dropout(checks, seed, dropout);

  Tensor d_x = need_x ? make(g, {M, K}, g.scalar_type()) : make(g, {0}, g.scalar_type());
  Tensor d_in_scale = make(g, {x ? K : 0}, ScalarType::Float);
  const Device device("fused_input_gradient", g);
  MmaInputGradient args;
  args.dtype = dtype;
  args.M = M, args.N = N, args.K = K, args.r = r;
  args.g = {g.const_data_ptr(), N};
  args.weight = {weight.const_data_ptr(), K};
  if (r) args.dt = {pointer(dt), r}, args.down = {pointer(down), K};
  if (x) args.x = {pointer(x), K};
  args.in_scale = {pointer(in_scale)};
  if (r && seed && drop.on()) {
    args.seed = static_cast<const int64_t*>(pointer(seed));
    args.dropout_threshold = drop.threshold;
  }
  if (need_x) args.d_x = {d_x.mutable_data_ptr(), K};
  if (x) args.d_in_scale = static_cast<float*>(d_in_scale.mutable_data_ptr());
  if (K > 0 && (need_x || x)) run(args, g, form, device);
  return {d_x, d_in_scale};
}

#endif

}  // namespace
}  // namespace decomp_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(decomp_kernels_native, m) {
  m.def("fused_forward(Tensor x, Tensor weight, Tensor? v, Tensor? up, Tensor? bias, "
        "Tensor? out_scale, Tensor? addend, bool keep_z, str form) -> (Tensor y, Tensor z)");
  m.def("fused_input_gradient(Tensor g, Tensor weight, Tensor? dt, Tensor? down, "
        "Tensor? in_scale, Tensor? x, Tensor? seed, float dropout, bool need_x, str form) "
        "-> (Tensor d_x, Tensor d_in_scale)");
}

#ifdef DK_CUDA
STABLE_TORCH_LIBRARY_IMPL(decomp_kernels_native, CUDA, m) {
  m.impl("fused_forward", TORCH_BOX(&decomp_kernels::fused_forward));
  m.impl("fused_input_gradient", TORCH_BOX(&decomp_kernels::fused_input_gradient));
}
#endif
