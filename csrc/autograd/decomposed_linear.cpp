// y = out_scale * (X W^T + scale * ((drop(X) A^T) * core) B^T) + bias, X = x * in_scale, in one call.
//
// The composition of library calls of kernels/aten/decomposed_linear.py, or where that is asked for
// the passes of kernels/native/decomposed_linear.py (passes.h), call by call and so bit by bit, with
// its autograd node: forward and backward without the interpreter between the calls, which costs more
// than they do on a small layer (docs/performance.md).  On a CPU, without weight map, addend and
// activation; dropout and a float32 branch on 16 bits by the passes alone.  Everything else stays in
// Python.  Gradients: reference/decomposed_linear.py.
//
// A node of autograd is not on PyTorch's stable interface: this library is for the PyTorch that it
// was built with, and kernels/native's serves every one (docs/native.md).

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/library.h>

#include "passes.h"

namespace decomp_kernels {
namespace {

using torch::autograd::AutogradContext;

// Only the library's kernels run: no autograd, no tracking of views, no autocast.
struct Quiet {
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// kernels/columns.py

Tensor scale_columns(const Tensor& x, const Tensor& by, const Tensor& shift) {
  if (x.numel() == 0) return at::empty_like(x);
  const auto kind = wide(x);
  const Tensor scale = by.to(kind);
  const Tensor bias = shift.defined() ? shift.to(kind) : shift;
  if (x.scalar_type() == kind) return bias.defined() ? at::addcmul(bias, x, scale) : x * scale;
  const Tensor zero = at::zeros_like(scale);
  return std::get<0>(
      at::native_batch_norm(x, scale, given(bias), zero, zero, false, 0.0, 1.0));
}

constexpr int64_t kSummedRows = 4096;

Tensor column_sum(const Tensor& dy, at::ScalarType kind) {
  if (kind != at::kFloat || dy.element_size() != 2 || dy.numel() == 0)
    return dy.sum(0, false, kind);
  const Tensor one = at::ones({dy.size(1)}, dy.options().dtype(kind));
  const Tensor zero = at::zeros_like(one);
  variable_list parts;
  for (const Tensor& some : dy.split(kSummedRows))
    parts.push_back(std::get<2>(at::native_batch_norm_backward(
        some, some, one, zero, zero, std::nullopt, std::nullopt, false, 1.0,
        {false, false, true})));
  return parts.size() == 1 ? parts[0] : at::stack(parts).sum(0);
}

struct ColumnGradients {
  Tensor scaled, sum, shift;
};

ColumnGradients scale_columns_backward(const Tensor& dy, const Tensor& x, const Tensor& by,
                                       bool scaled, bool summed, bool shift) {
  const auto kind = wide(dy);
  if (dy.numel() == 0) {
    const Tensor sums = at::zeros({dy.size(1)}, dy.options().dtype(kind));
    return {scaled ? at::empty_like(dy) : Tensor(), summed ? sums : Tensor(),
            shift ? sums.clone() : Tensor()};
  }
  if (!summed)
    return {scaled ? scale_columns(dy, by, Tensor()) : Tensor(), Tensor(),
            shift ? column_sum(dy, kind) : Tensor()};
  const Tensor gamma = by.to(kind);
  const Tensor zero = at::zeros_like(gamma);
  auto [first, sum, second] = at::native_batch_norm_backward(
      dy, x, gamma, zero, zero, std::nullopt, std::nullopt, false, 1.0, {scaled, summed, shift});
  return {scaled ? first : Tensor(), sum, shift ? second : Tensor()};
}

// kernels/gemm.py, kernels/composition.py

Tensor skinny(const Tensor& x, const Tensor& small) {
  return x.element_size() == 2 ? at::mm(small.t(), x.t()).t().contiguous() : at::mm(x, small);
}

Tensor times(const Tensor& t, const Tensor& core, double scale) {
  if (core.defined()) return (t * (core.to(wide(t)) * scale)).to(t.scalar_type());
  return scale == 1.0 ? t : t * scale;
}

// Which directions run by the passes; the others by library calls.
constexpr int64_t kForwardByPasses = 1, kBackwardByPasses = 2;

// out += a b.  Below autograd nobody else counts the write, by which who keeps ``out`` (selective
// checkpointing does) knows of it.
Tensor accumulate(Tensor& out, const Tensor& a, const Tensor& b) {
  out.addmm_(a, b);
  out.unsafeGetTensorImpl()->bump_version();
  return out;
}

// One operator's call as autograd sees it.
struct Node : torch::autograd::Function<Node> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& down,
                        const OptionalTensor& up, const OptionalTensor& core,
                        const OptionalTensor& in_scale, const OptionalTensor& out_scale,
                        const OptionalTensor& seed, double scale, double dropout, int64_t passes,
                        bool differentiated);
  static variable_list backward(AutogradContext* ctx, variable_list dys);
};

Tensor Node::forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                     const OptionalTensor& bias_, const OptionalTensor& down_,
                     const OptionalTensor& up_, const OptionalTensor& core_,
                     const OptionalTensor& in_scale_, const OptionalTensor& out_scale_,
                     const OptionalTensor& seed_, double scale, double dropout, int64_t passes,
                     bool differentiated) {
  const Quiet quiet;
  const Tensor bias = bias_.value_or(Tensor()), down = down_.value_or(Tensor());
  const Tensor up = up_.value_or(Tensor()), core = core_.value_or(Tensor());
  const Tensor in_scale = in_scale_.value_or(Tensor()), seed = seed_.value_or(Tensor());
  const Tensor out_scale = out_scale_.value_or(Tensor());
  const auto needs = [&](const Tensor& t) {
    return differentiated && t.defined() && t.requires_grad();
  };
  const int64_t N = weight.size(0), K = weight.size(1);
  const Tensor rows = (x.dim() == 2 ? x : x.reshape({-1, K})).contiguous();

  const Tensor first = out_scale.defined() ? Tensor() : bias;  // what is added before out_scale
  Tensor start = first.defined() ? first.to(x.scalar_type()) : Tensor();
  Tensor t;
  if (down.defined()) {
    Tensor v;
    if (passes & kForwardByPasses) {
      std::tie(t, v) = passes::down_projection(rows, scaled(down, in_scale), core, seed, scale,
                                               dropout);
    } else {
      t = skinny(rows, scaled(down, in_scale).t());
      v = times(t, core, scale);
    }
    if (v.scalar_type() == x.scalar_type())
      start = start.defined() ? at::addmm(start, v, up.t()) : at::mm(v, up.t());
    else
      start = passes::up_expansion(v, up.t(), first, Tensor(), 0.0, x.scalar_type());
  }
  const Tensor X = in_scale.defined() ? scale_columns(rows, in_scale, Tensor()) : rows;
  Tensor z;
  if (start.defined() && start.dim() == 2)
    z = accumulate(start, X, weight.t());
  else  // at::linear without its name: what watches library calls is shown the product
    z = start.defined() ? at::addmm(start, X, weight.t()) : at::mm(X, weight.t());
  Tensor y = out_scale.defined() ? scale_columns(z, out_scale, bias) : z;

  if (differentiated) {
    const bool keep_x = needs(down) || needs(in_scale);
    const bool keep_t = needs(up) || needs(core);
    ctx->save_for_backward({keep_x ? x : Tensor(), weight, bias, down, up, core, in_scale,
                            out_scale, keep_t ? t : Tensor(), needs(out_scale) ? z : Tensor(),
                            seed});
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["dropout"] = dropout;
    ctx->saved_data["passes"] = passes;
  }
  if (x.dim() == 2) return y;
  auto shape = x.sizes().vec();
  shape.back() = N;
  return at::_unsafe_view(y, shape);
}

// The gradients of rows by library calls; each only where ``need`` has its input.
Gradients library_gradients(const Tensor& dy, const Tensor& x, const variable_list& saved,
                            const Needs& need, double scale) {
  const Tensor &weight = saved[kWeight], &bias = saved[kBias], &down = saved[kDown];
  const Tensor &up = saved[kUp], &core = saved[kCore], &in_scale = saved[kInScale];
  const Tensor &out_scale = saved[kOutScale], &t = saved[kT], &z = saved[kZ];
  const bool need_dX = need[kX] || need[kInScale];
  Gradients found;

  Tensor g = dy;
  if (!out_scale.defined()) {
    if (need[kBias]) found[kBias] = column_sum(dy, bias.scalar_type());
  } else {
    const auto over =
        scale_columns_backward(dy, z, out_scale, need_dX, need[kOutScale], need[kBias]);
    g = over.scaled.defined() ? over.scaled : dy;
    found[kOutScale] = over.sum;
    found[kBias] = over.shift;
  }

  Tensor dt, dX;
  const bool need_dt = need_dX || need[kDown];
  const bool after = dy.element_size() == 2;  // dispatch.base_gemm_first
  if (down.defined()) {
    Tensor u, v;
    if (need[kUp]) v = times(t, core, scale);
    if (need_dt || need[kCore]) {
      const bool by_column = out_scale.defined();
      u = skinny(dy, by_column ? scaled(up, out_scale.unsqueeze(1)) : up);
    }
    if (v.defined()) found[kUp] = scaled(at::mm(v.t(), dy), out_scale).t().contiguous();
    if (need[kCore]) {
      const auto kind = wide(u);
      found[kCore] = (u.to(kind) * t.to(kind)).sum(0).mul_(scale);
    }
    if (need_dt) {
      dt = times(u, core, scale);
      u.reset(), v.reset();  // what follows is made without them
      if (need[kDown]) found[kDown] = scaled(at::mm(dt.t(), x), in_scale);
      if (need_dX && !after) dX = at::mm(dt, down);
    }
  }
  if (need_dX) {
    dX = dX.defined() ? accumulate(dX, g, weight) : at::mm(g, weight);
    if (dt.defined() && after) accumulate(dX, dt, down);
  }
  if (in_scale.defined() && dX.defined()) {
    const auto over = scale_columns_backward(dX, x, in_scale, need[kX], need[kInScale], false);
    dX = over.scaled;
    found[kInScale] = over.sum;
  }
  if (need[kX]) found[kX] = dX;
  return found;
}

// The gradients of a call in their tensors' shapes and dtypes.
Gradients gradients(const Tensor& dys, const variable_list& saved, const Needs& need, double scale,
                    double dropout, int64_t passes) {
  const Quiet quiet;
  const int64_t N = saved[kWeight].size(0), K = saved[kWeight].size(1);
  const Tensor dy = (dys.dim() == 2 ? dys : dys.reshape({-1, N})).contiguous();
  Tensor x = saved[kX];
  if (x.defined()) x = (x.dim() == 2 ? x : x.reshape({-1, K})).contiguous();
  Gradients found = passes & kBackwardByPasses
                        ? passes::gradients(dy, x, saved, need, scale, dropout)
                        : library_gradients(dy, x, saved, need, scale);
  if (found[kX].defined() && dys.dim() != 2) {
    auto shape = dys.sizes().vec();
    shape.back() = K;
    found[kX] = at::_unsafe_view(found[kX], shape);
  }
  for (int i = kBias; i < kInputs; ++i)
    if (found[i].defined()) found[i] = found[i].to(saved[i].scalar_type());
  return found;
}

// The first ``count`` tensors as they are, with a graph that leads to all and raises: ops/once.py.
struct Refuses : torch::autograd::Function<Refuses> {
  static variable_list forward(AutogradContext*, int64_t count, at::TensorList tensors) {
    variable_list made;
    for (int64_t i = 0; i < count; ++i) made.push_back(tensors[i].detach());
    return made;
  }
  static variable_list backward(AutogradContext*, variable_list) {
    TORCH_CHECK(false, "trying to differentiate twice a function of decomp_kernels, which has first "
                       "derivatives alone; take gradients of gradients on the model without it");
  }
};

void refuse_again(variable_list& made, const Tensor& dy, const variable_list& saved) {
  variable_list tensors, sources{dy};
  for (const auto& one : saved) sources.push_back(one);
  if (const auto node = torch::autograd::get_current_node())  // none where grad_fn(dy) is called
    for (const auto& edge : node->next_edges())
      if (auto* leaf = dynamic_cast<torch::autograd::AccumulateGrad*>(edge.function.get()))
        sources.push_back(leaf->variable);
  sources.push_back(at::empty({0}).set_requires_grad(true));
  for (const auto& one : made)
    if (one.defined()) tensors.push_back(one);
  const int64_t count = int64_t(tensors.size());
  for (const auto& one : sources)
    if (one.defined()) tensors.push_back(one);
  if (count == 0) return;
  const variable_list linked = Refuses::apply(count, at::TensorList(tensors));
  size_t next = 0;
  for (auto& one : made)
    if (one.defined()) one = linked[next++];
}

variable_list Node::backward(AutogradContext* ctx, variable_list dys) {
  const variable_list saved = ctx->get_saved_variables();
  Needs need{};
  size_t edge = 0;  // autograd counts the tensors that were given
  for (int i = 0; i < kInputs; ++i)
    if (i == kX || saved[i].defined()) need[i] = ctx->needs_input_grad(edge++);
  const bool again = at::GradMode::is_enabled();  // create_graph=True
  Gradients found;
  {
    const at::AutoGradMode off(false);
    found = gradients(dys[0], saved, need, ctx->saved_data["scale"].toDouble(),
                      ctx->saved_data["dropout"].toDouble(), ctx->saved_data["passes"].toInt());
  }
  variable_list made(found.begin(), found.end());
  if (again) refuse_again(made, dys[0], saved);
  made.resize(kInputs + 5);  // and none for seed, scale, dropout, passes and differentiated
  return made;
}

Tensor decomposed_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& down, const OptionalTensor& up,
                         const OptionalTensor& core, const OptionalTensor& in_scale,
                         const OptionalTensor& out_scale, const OptionalTensor& seed, double scale,
                         double dropout, int64_t passes) {
  TORCH_CHECK(weight.dim() == 2 && x.dim() >= 1 && x.size(-1) == weight.size(1),
              "decomposed_linear: x must be [..., K] and weight [N, K], got ", x.sizes(), " and ",
              weight.sizes());
  TORCH_CHECK(down.has_value() == up.has_value(),
              "decomposed_linear: down and up come together: give both, or neither");
  TORCH_CHECK(!weight.requires_grad(),
              "decomposed_linear: weight must be frozen here, got one that requires a gradient");
  TORCH_CHECK(passes == (kForwardByPasses | kBackwardByPasses) ||
                  (!seed && (!down || down->scalar_type() == x.scalar_type())),
              "decomposed_linear: dropout, and a branch of another dtype than x, run by the passes "
              "in both directions: passes must be 3 there, got ", passes);
  return Node::apply(x, weight, bias, down, up, core, in_scale, out_scale, seed, scale, dropout,
                     passes, at::GradMode::is_enabled());
}

}  // namespace
}  // namespace decomp_kernels

TORCH_LIBRARY(decomp_kernels_autograd, m) {
  m.def(
      "decomposed_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? down, Tensor? up, "
      "Tensor? core, Tensor? in_scale, Tensor? out_scale, Tensor? seed, float scale, "
      "float dropout, int passes) -> Tensor",
      &decomp_kernels::decomposed_linear);
}
