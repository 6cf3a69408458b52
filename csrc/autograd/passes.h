// The host kernels of the native library as C++ calls, and the backward made of them
// (kernels/native/passes.py, kernels/over_dy.py and kernels/native/decomposed_linear.py).
//
// They are found by name when first called: the native library is then loaded, or this raises.

#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <cmath>
#include <tuple>

#include "call.h"

namespace decomp_kernels::passes {

template <typename Signature>
auto pass(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline OptionalTensor in_order(const Tensor& t) {
  return t.defined() ? OptionalTensor(t.contiguous()) : std::nullopt;
}

inline OptionalTensor as_float(const Tensor& t) {
  return t.defined() ? OptionalTensor(t.to(at::kFloat)) : std::nullopt;
}

// t = drop(x) down^T and v = t * core * scale, [M, r] in down's dtype; v is t where it is equal.
inline std::tuple<Tensor, Tensor> down_projection(const Tensor& x, const Tensor& down,
                                                  const Tensor& core, const Tensor& seed,
                                                  double scale, double dropout) {
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&,
                                               const OptionalTensor&, double, double,
                                               c10::string_view);
  static const auto op = pass<Signature>("decomp_kernels_native::down_projection");
  auto [t, v] = op.call(x, down.contiguous(), as_float(core), given(seed), scale, dropout,
                        "identity");
  return {t, v.dim() == 1 ? t : v};
}

// bias + mask(v small), [M, N] of ``dtype`` with one rounding; v [M, r], small [r, N].
inline Tensor up_expansion(const Tensor& v, const Tensor& small, const Tensor& bias,
                           const Tensor& seed, double dropout, at::ScalarType dtype) {
  using Signature = Tensor(const Tensor&, const Tensor&, const OptionalTensor&,
                           const OptionalTensor&, const OptionalTensor&, double, at::ScalarType);
  static const auto op = pass<Signature>("decomp_kernels_native::up_expansion");
  return op.call(v.contiguous(), small.contiguous(), as_float(bias), std::nullopt, given(seed),
                 dropout, dtype);
}

struct Walked {
  Tensor u, c, p, s, scaled;  // big right, drop(big)^T left, sum big * other, sum big, big * scale
};

// One read of big [M, N]; what is not asked for is undefined.
inline Walked column_walk(const Tensor& big, const Tensor& right, const Tensor& left,
                          const Tensor& other, const Tensor& scale, bool column_sum,
                          const Tensor& seed = {}, double dropout = 0.0, bool c_by_rank = false) {
  using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
  using Signature = Five(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                         const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                         double, bool, bool);
  static const auto op = pass<Signature>("decomp_kernels_native::column_walk");
  auto [u, c, p, s, scaled] =
      op.call(big, in_order(right), in_order(left), in_order(other), as_float(scale), given(seed),
              dropout, column_sum, c_by_rank);
  return {right.defined() ? u : Tensor(), left.defined() ? c : Tensor(),
          other.defined() ? p : Tensor(), column_sum ? s : Tensor(),
          scale.defined() ? scaled : Tensor()};
}

// kernels/native/decomposed_linear.py: dX with what the branch adds, before in_scale.
inline Tensor input_gradient(const Tensor& g, const Tensor& weight, const Tensor& dt,
                             const Tensor& down, const Tensor& seed, double dropout) {
  if (!dt.defined()) return at::mm(g, weight);
  if (dt.scalar_type() != g.scalar_type() || seed.defined())
    return up_expansion(dt, down, Tensor(), seed, dropout, g.scalar_type()).addmm_(g, weight);
  const bool base_first = g.element_size() == 2;  // dispatch.base_gemm_first
  return base_first ? at::mm(g, weight).addmm_(dt, down) : at::mm(dt, down).addmm_(g, weight);
}

// dy [M, N] and x [M, K] in order; saved as the node keeps it.
inline Gradients gradients(const Tensor& dy, const Tensor& x, const variable_list& saved,
                           const Needs& need, double scale, double dropout) {
  const Tensor &up = saved[kUp], &core = saved[kCore], &out_scale = saved[kOutScale];
  const Tensor &in_scale = saved[kInScale], &t = saved[kT], &seed = saved[kSeed];
  const bool need_dX = need[kX] || need[kInScale];
  Gradients found;

  Tensor phi, right, left;
  if (up.defined()) {
    if (t.defined() && (need[kUp] || need[kCore])) phi = t.to(at::kFloat);
    if (need_dX || need[kDown] || need[kCore])
      right = out_scale.defined() ? scaled(up, out_scale.unsqueeze(1)) : up;
    if (need[kUp] && phi.defined())
      left = ((core.defined() ? phi * core.to(at::kFloat) : phi) * scale).to(up.scalar_type());
  }
  const Tensor by = need_dX ? out_scale : Tensor();
  const Tensor z = need[kOutScale] ? saved[kZ] : Tensor();
  Walked walked;
  if (right.defined() || left.defined() || need[kBias] || need[kOutScale] || by.defined())
    walked = column_walk(dy, right, left, z, by, need[kBias]);
  found[kBias] = walked.s;
  found[kOutScale] = walked.p;
  if (walked.c.defined())
    found[kUp] = out_scale.defined() ? walked.c * out_scale.unsqueeze(1) : walked.c;
  Tensor dt;
  if (walked.u.defined()) {
    const Tensor u = walked.u * scale;
    if (need[kCore] && phi.defined()) found[kCore] = (u * phi).sum(0);
    dt = core.defined() ? u * core.to(at::kFloat) : u;
    const double kept = 1.0 - std::nearbyint(dropout * 65536.0) / 65536.0;
    if (seed.defined()) dt = dt * (1.0 / kept);
    dt = dt.to(up.scalar_type());
  }
  if (need[kDown] && dt.defined() && x.defined()) {
    const Walked over_x = column_walk(x, Tensor(), dt, Tensor(), Tensor(), false, seed, dropout,
                                      /*c_by_rank=*/true);
    found[kDown] = in_scale.defined() ? over_x.c * in_scale : over_x.c;
  }
  if (!need_dX) return found;
  const Tensor& g = walked.scaled.defined() ? walked.scaled : dy;
  found[kX] = input_gradient(g, saved[kWeight], dt, saved[kDown], seed, dropout);
  if (in_scale.defined()) {
    const Walked over_dX =
        column_walk(found[kX], Tensor(), Tensor(), need[kInScale] ? x : Tensor(),
                    need[kX] ? in_scale : Tensor(), false);
    found[kX] = over_dX.scaled;
    found[kInScale] = over_dX.p;
  }
  if (!need[kX]) found[kX] = Tensor();
  return found;
}

}  // namespace decomp_kernels::passes
