// w = level[code] * absmax, or code * (absmax / 127) (decomp_kernels/reference/dequantize.py).

#include "../cpu/dequantize.h"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <string>

#include "checks.h"
#include "shares.h"

#ifdef DK_CUDA
#include "../cuda/dequantize.h"
#include "on_device.h"
#endif

namespace decomp_kernels {
namespace {

// Elements of each block but the last where ``elements`` make that many, 0 where they cannot.
int64_t block_size(int64_t elements, int64_t count) {
  int64_t size = cpu::kSmallestBlock;
  while (blocks(elements, size) > (count > 1 ? count : 1)) size *= 2;
  return blocks(elements, size) == count ? size : 0;
}

// The checks of every device, and what follows from them.
struct Call {
  Checks checks;
  bool nf4;
  int64_t elements, block = 0;
  Dtype dtype;

  Call(const Tensor& weight, const Tensor& weight_scale, const std::string& format, int64_t rows,
       int64_t cols, ScalarType out_dtype)
      : checks("dequantize", weight, "weight"), nf4(format == "nf4") {
    checks.that(rows >= 0 && cols >= 0, "rows and cols must not be negative, got ", rows, " and ",
                cols);
    checks.that(cols == 0 || rows <= std::numeric_limits<int64_t>::max() / 8 / cols,
                "rows and cols are too large, got ", rows, " and ", cols);
    checks.that(nf4 || format == "int8", "weight_format must be nf4 or int8, got ", format);
    dtype = checks.floating(out_dtype, "dtype", checks.on_cuda());
    checks.dtype(weight_scale, "weight_scale", ScalarType::Float);
    elements = rows * cols;
    if (!nf4) {
      checks.dtype(weight, "weight", ScalarType::Char);
      checks.tensor(weight, "weight", {rows, cols});
      checks.tensor(weight_scale, "weight_scale", {rows});
      return;
    }
    checks.dtype(weight, "weight", ScalarType::Byte);
    checks.that(weight.is_contiguous(), "weight must be contiguous: call .contiguous() on it");
    checks.that(weight.numel() == blocks(elements, 2), "weight must have ", blocks(elements, 2),
                " bytes for ", elements, " codes, got ", weight.numel());
    checks.tensor(weight_scale, "weight_scale", {-1});
    block = block_size(elements, weight_scale.numel());
    checks.that(block > 0, "weight_scale must have one absmax for each block of 32, 64, 128, ... ",
                "of ", elements, " codes, got ", weight_scale.numel());
  }
};

Tensor dequantize(Tensor weight, Tensor weight_scale, std::string weight_format, int64_t rows,
                  int64_t cols, ScalarType dtype) {
  const Call call(weight, weight_scale, weight_format, rows, cols, dtype);
  Tensor out = make(weight, {rows, cols}, dtype);
  cpu::DequantizeArgs a{};
  a.block = call.block;
  a.codes = weight.const_data_ptr();
  a.absmax = static_cast<const float*>(weight_scale.const_data_ptr());
  a.out = out.mutable_data_ptr();
  a.dtype = call.dtype;
  a.rows = rows;
  a.cols = cols;

  const auto run = call.nf4 ? DK_AT_LEVEL(dequantize_nf4) : DK_AT_LEVEL(dequantize_int8);
  const int64_t units = call.nf4 ? blocks(call.elements, cpu::kNf4Elements) : rows;
  torch::stable::parallel_for(0, units, grain(call.nf4 ? cpu::kNf4Elements : cols),
                              [&](int64_t begin, int64_t end) { run(a, begin, end); });
  return out;
}

#ifdef DK_CUDA

Tensor dequantize_cuda(Tensor weight, Tensor weight_scale, std::string weight_format, int64_t rows,
                       int64_t cols, ScalarType dtype) {
  const Call call(weight, weight_scale, weight_format, rows, cols, dtype);
  const Device device("dequantize", weight);
  Tensor out = make(weight, {rows, cols}, dtype);
  if (call.elements == 0) return out;
  const auto* absmax = static_cast<const float*>(weight_scale.const_data_ptr());
  if (call.nf4) {
    const auto* packed = static_cast<const uint8_t*>(weight.const_data_ptr());
    launch(cuda::Nf4Weight{packed, absmax, call.block, rows, cols, output(out)}, weight, device);
  } else {
    const auto* codes = static_cast<const int8_t*>(weight.const_data_ptr());
    launch(cuda::Int8Weight{codes, absmax, rows, cols, output(out)}, weight, device);
  }
  return out;
}

#endif

}  // namespace
}  // namespace decomp_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(decomp_kernels_native, m) {
  m.def(
      "dequantize(Tensor weight, Tensor weight_scale, str weight_format, int rows, int cols, "
      "ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(decomp_kernels_native, CPU, m) {
  m.impl("dequantize", TORCH_BOX(&decomp_kernels::dequantize));
}

#ifdef DK_CUDA
STABLE_TORCH_LIBRARY_IMPL(decomp_kernels_native, CUDA, m) {
  m.impl("dequantize", TORCH_BOX(&decomp_kernels::dequantize_cuda));
}
#endif
