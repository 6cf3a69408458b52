// What the files of one call share: its tensors by place, and the small steps of both ways.

#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/variable.h>

#include <array>
#include <optional>

namespace decomp_kernels {

using at::Tensor;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;

// The inputs that may need a gradient, in the order of the operator's arguments.
enum Input { kX, kWeight, kBias, kDown, kUp, kCore, kInScale, kOutScale, kInputs };
// What is kept beside the inputs.
enum Kept { kT = kInputs, kZ, kSeed, kAll };

using Needs = std::array<bool, kInputs>;
using Gradients = std::array<Tensor, kInputs>;  // undefined where it is not asked for

inline OptionalTensor given(const Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

inline at::ScalarType wide(const Tensor& t) {
  return at::promote_types(t.scalar_type(), at::kFloat);
}

inline Tensor scaled(const Tensor& small, const Tensor& by) {
  return by.defined() ? (small * by).to(small.scalar_type()) : small;
}

}  // namespace decomp_kernels
