// What every operator asks of its tensors before it takes a pointer.
//
// A wrong call raises RuntimeError with the operator's and the argument's name, what it must be, and
// what it is.  The public functions of decomp_kernels check first and say more; these are the last
// line, so that no call reads or writes out of bounds.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "dtype.h"

namespace decomp_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string shape_text(const Tensor& t) {
  std::string text = "(";
  for (int64_t d = 0; d < t.dim(); ++d)
    text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + ")";
}

// Raises RuntimeError with these words alone: no file of the machine that built the library.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// Checks of one operator's arguments; ``op`` stands in every message.
class Checks {
 public:
  // first: the tensor whose device all others share.
  Checks(const char* op, const Tensor& first, const char* first_name)
      : op_(op), first_name_(first_name), device_(first.get_device_index()), cuda_(first.is_cuda()) {}

  template <typename... Parts>
  void that(bool holds, const Parts&... parts) const {
    if (!holds) fail(op_, ": ", parts...);
  }

  // A row-major tensor of exactly this shape (-1: any size) on the operator's device.
  void tensor(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) const {
    bool fits = t.dim() == int64_t(shape.size());
    std::string wanted = "(";
    int64_t d = 0;
    for (const int64_t size : shape) {
      fits = fits && (size < 0 || t.size(d) == size);
      wanted += (d ? ", " : "") + (size < 0 ? std::string("any") : std::to_string(size));
      ++d;
    }
    that(fits, name, " must have shape ", wanted, "), got ", shape_text(t));
    that(t.is_cuda() == cuda_ && t.get_device_index() == device_, name, " must be on the device of ",
         first_name_);
    that(t.is_contiguous(), name, " must be contiguous (row-major): call .contiguous() on it");
    that(t.numel() == 0 || t.const_data_ptr() != nullptr, name, " has no memory: its storage was freed");
    const int64_t bytes_most = std::numeric_limits<int64_t>::max() / 2;
    that(t.numel() <= bytes_most / 8, name, " is too large, it has ", t.numel(), " elements");
  }

  void tensor(const OptionalTensor& t, const char* name, std::initializer_list<int64_t> shape) const {
    if (t) tensor(*t, name, shape);
  }

  // One of the types that kernels take: float32, and bfloat16 or float16 where ``half`` says so.
  Dtype floating(const Tensor& t, const char* name, bool half) const {
    return floating(t.scalar_type(), name, half);
  }

  Dtype floating(ScalarType dtype, const char* name, bool half) const {
    switch (dtype) {
      case ScalarType::Float: return Dtype::kFloat;
      case ScalarType::BFloat16: return Dtype::kBFloat16;
      case ScalarType::Half:
        if (half) return Dtype::kHalf;
        [[fallthrough]];
      default:
        that(false, name, " must be float32", half ? ", bfloat16 or float16" : " or bfloat16",
             ", got ", torch::headeronly::toString(dtype));
        return Dtype::kFloat;
    }
  }

  void dtype(const Tensor& t, const char* name, ScalarType wanted) const {
    that(t.scalar_type() == wanted, name, " must be ", torch::headeronly::toString(wanted), ", got ",
         torch::headeronly::toString(t.scalar_type()));
  }

  void dtype(const OptionalTensor& t, const char* name, ScalarType wanted) const {
    if (t) dtype(*t, name, wanted);
  }

  bool on_cuda() const { return cuda_; }

 private:
  const char* op_;
  const char* first_name_;
  int32_t device_;
  bool cuda_;
};

inline ScalarType scalar_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::kBFloat16: return ScalarType::BFloat16;
    case Dtype::kHalf: return ScalarType::Half;
    default: return ScalarType::Float;
  }
}

inline const void* pointer(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

inline const float* float_pointer(const OptionalTensor& t) {
  return static_cast<const float*>(pointer(t));
}

// A new row-major tensor on the device of ``like``.
inline Tensor make(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

}  // namespace decomp_kernels
