// From tensors to the arguments of the device passes (csrc/cuda/arguments.h), and their launch.

#pragma once

#include "../cuda/arguments.h"
#include "device.h"
#include "dropout.h"

namespace decomp_kernels {
namespace {

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kHalf;
    default: return Dtype::kFloat;
  }
}

[[maybe_unused]] cuda::Matrix matrix(const Tensor& t) {
  return {t.const_data_ptr(), dtype_of(t), t.size(1)};
}

[[maybe_unused]] cuda::Matrix matrix(const OptionalTensor& t) {
  return t ? matrix(*t) : cuda::Matrix{};
}

[[maybe_unused]] cuda::Vector vector(const OptionalTensor& t) {
  return t ? cuda::Vector{t->const_data_ptr(), dtype_of(*t)} : cuda::Vector{};
}

[[maybe_unused]] cuda::Output output(Tensor& t) {
  return {t.numel() ? t.mutable_data_ptr() : nullptr, dtype_of(t)};
}

[[maybe_unused]] cuda::Mask mask(const OptionalTensor& seed, const Dropout& dropout) {
  if (!seed || !dropout.on()) return {};
  return {static_cast<const int64_t*>(seed->const_data_ptr()), dropout.threshold};
}

// Refuses, or launches with a workspace of PyTorch's.
template <typename Args>
void launch(const Args& args, const Tensor& like, const Device& device) {
  device.supported(cuda::why_not(args, device.arch()));
  size_t bytes = 0;
  if constexpr (requires { workspace_bytes(args, 1); })  // found beside Args
    bytes = workspace_bytes(args, device.processors());
  const Tensor scratch = workspace(like, bytes);
  device.check(cuda::launch(args, scratch.mutable_data_ptr(), device.processors(), device.stream()));
}

}  // namespace
}  // namespace decomp_kernels
