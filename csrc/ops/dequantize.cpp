// w = level[code] * absmax, or code * (absmax / 127) (decomp_kernels/reference/dequantize.py).

#include "../cpu/dequantize.h"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <string>

#include "checks.h"

namespace decomp_kernels {
namespace {

constexpr int64_t kElementsPerThread = 1 << 16;  // fewer are not worth another thread

int64_t blocks(int64_t size, int64_t block) { return size / block + (size % block != 0); }

// Elements of each block but the last where ``elements`` make that many, 0 where they cannot.
int64_t block_size(int64_t elements, int64_t count) {
  int64_t size = cpu::kSmallestBlock;
  while (blocks(elements, size) > (count > 1 ? count : 1)) size *= 2;
  return blocks(elements, size) == count ? size : 0;
}

Tensor dequantize(Tensor weight, Tensor weight_scale, std::string weight_format, int64_t rows,
                  int64_t cols, ScalarType dtype) {
  const Checks check("dequantize", weight, "weight");
  check.that(rows >= 0 && cols >= 0, "rows and cols must not be negative, got ", rows, " and ",
             cols);
  check.that(cols == 0 || rows <= std::numeric_limits<int64_t>::max() / 8 / cols,
             "rows and cols are too large, got ", rows, " and ", cols);
  check.that(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
             "dtype must be float32 or bfloat16, got ", torch::headeronly::toString(dtype));
  check.dtype(weight_scale, "weight_scale", ScalarType::Float);
  const bool nf4 = weight_format == "nf4";
  check.that(nf4 || weight_format == "int8", "weight_format must be nf4 or int8, got ",
             weight_format);

  cpu::DequantizeArgs a{};
  const int64_t elements = rows * cols;
  if (nf4) {
    check.dtype(weight, "weight", ScalarType::Byte);
    check.that(weight.is_contiguous(), "weight must be contiguous: call .contiguous() on it");
    check.that(weight.numel() == blocks(elements, 2), "weight must have ", blocks(elements, 2),
               " bytes for ", elements, " codes, got ", weight.numel());
    check.tensor(weight_scale, "weight_scale", {-1});
    a.block = block_size(elements, weight_scale.numel());
    check.that(a.block > 0, "weight_scale must have one absmax for each block of 32, 64, 128, ... ",
               "of ", elements, " codes, got ", weight_scale.numel());
  } else {
    check.dtype(weight, "weight", ScalarType::Char);
    check.tensor(weight, "weight", {rows, cols});
    check.tensor(weight_scale, "weight_scale", {rows});
  }
  Tensor out = make(weight, {rows, cols}, dtype);
  a.codes = weight.const_data_ptr();
  a.absmax = static_cast<const float*>(weight_scale.const_data_ptr());
  a.out = out.mutable_data_ptr();
  a.dtype = dtype == ScalarType::Float ? Dtype::kFloat : Dtype::kBFloat16;
  a.rows = rows;
  a.cols = cols;

  const auto run = nf4 ? DK_AT_LEVEL(dequantize_nf4) : DK_AT_LEVEL(dequantize_int8);
  const int64_t units = nf4 ? blocks(elements, cpu::kNf4Elements) : rows;
  const int64_t grain = kElementsPerThread / ((nf4 ? cpu::kNf4Elements : cols) + 1) + 1;
  torch::stable::parallel_for(0, units, grain,
                              [&](int64_t begin, int64_t end) { run(a, begin, end); });
  return out;
}

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
