// What the arguments of the device passes are made of: pointers, types, strides.  No torch, no
// kernels.

#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/activation.h"
#include "../common/dtype.h"

#ifndef CUDA_ON_HOST  // the tests bring a stand-in
#include <cuda_runtime_api.h>
#endif

namespace decomp_kernels::cuda {

// Row-major, neighbouring columns in neighbouring places; stride: elements from row to row.
struct Matrix {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat;
  int64_t stride = 0;
};

// Contiguous; of any of the three types, whatever the matrices have: it is read as float32.
struct Vector {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat;
};

// Contiguous and written by the kernel; no data where the result is not asked for.
struct Output {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat;
};

// Dropout of element row * columns + column (csrc/common/mask.h); seed is in device memory, and
// nullptr where nothing is dropped.  threshold < 65536.
struct Mask {
  const int64_t* seed = nullptr;
  uint32_t threshold = 0;
};

// 1 / the exact kept fraction.
inline float kept_reciprocal(const Mask& mask) {
  return mask.seed ? float(65536.0 / (65536.0 - double(mask.threshold))) : 1.0f;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr size_t size_of(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }

// The types that every pass takes: an adapter's factors are of the large operand's type or float32.
constexpr bool paired(Dtype wide, Dtype small) { return small == wide || small == Dtype::kFloat; }

}  // namespace decomp_kernels::cuda
