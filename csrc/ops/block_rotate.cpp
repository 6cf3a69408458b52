// y = x R of block-diagonal R, and its gradients (maths: decomp_kernels/reference/block_rotate.py).

#include "../cpu/block_rotate.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "checks.h"
#include "scratch.h"
#include "shares.h"

namespace decomp_kernels {
namespace {

cpu::BlockRotateArgs arguments(const Checks& check, const Tensor& x, const Tensor& blocks_) {
  check.tensor(x, "x", {-1, -1});
  check.tensor(blocks_, "blocks", {-1, -1, -1});
  check.dtype(blocks_, "blocks", ScalarType::Float);
  cpu::BlockRotateArgs a{};
  a.dtype = check.floating(x, "x", false);
  a.M = x.size(0), a.q = blocks_.size(0), a.b = blocks_.size(1);
  check.that(blocks_.size(2) == a.b && a.q > 0 && a.b > 0 && a.K() == x.size(1),
             "blocks must be (q, b, b) with q * b = ", x.size(1), ", got ", shape_text(blocks_));
  a.x = x.const_data_ptr();
  a.blocks = static_cast<const float*>(blocks_.const_data_ptr());
  return a;
}

template <typename F>
void over_units(int64_t units, int64_t elements, const cpu::BlockRotateArgs& a, F* run) {
  torch::stable::parallel_for(0, units, grain(elements), [&](int64_t begin, int64_t end) {
    const auto scratch = scratch_floats(a.scratch());
    run(a, begin, end, scratch.get());
  });
}

Tensor block_rotate(Tensor x, Tensor blocks_) {
  const Checks check("block_rotate", x, "x");
  cpu::BlockRotateArgs a = arguments(check, x, blocks_);
  Tensor out = make(x, {a.M, a.K()}, x.scalar_type());
  a.out = out.mutable_data_ptr();
  over_units(a.units() * blocks(a.M, cpu::kRotateRows), cpu::kRotateRows * a.group() * a.b, a,
             DK_AT_LEVEL(block_rotate_forward));
  return out;
}

std::tuple<Tensor, Tensor> block_rotate_bwd(Tensor gx, Tensor x, Tensor blocks_) {
  const Checks check("block_rotate_bwd", x, "x");
  cpu::BlockRotateArgs a = arguments(check, x, blocks_);
  check.tensor(gx, "gx", {a.M, a.K()});
  check.dtype(gx, "gx", x.scalar_type());
  Tensor d_blocks = make(x, {a.q, a.b, a.b}, ScalarType::Float);
  Tensor dx = make(x, {a.M, a.K()}, x.scalar_type());
  a.gx = gx.const_data_ptr();
  a.out = dx.mutable_data_ptr();
  a.d_blocks = static_cast<float*>(d_blocks.mutable_data_ptr());
  over_units(a.units(), a.M * a.group() * a.b, a, DK_AT_LEVEL(block_rotate_backward));
  return {d_blocks, dx};
}

}  // namespace
}  // namespace decomp_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(decomp_kernels_native, m) {
  m.def("block_rotate(Tensor x, Tensor blocks) -> Tensor");
  m.def("block_rotate_bwd(Tensor gx, Tensor x, Tensor blocks) -> (Tensor d_blocks, Tensor dx)");
}

STABLE_TORCH_LIBRARY_IMPL(decomp_kernels_native, CPU, m) {
  m.impl("block_rotate", TORCH_BOX(&decomp_kernels::block_rotate));
  m.impl("block_rotate_bwd", TORCH_BOX(&decomp_kernels::block_rotate_bwd));
}
