// Tensor maps, the copy engine's view of a tensor, from the plain boxes of common/hopper_boxes.h.
//
// Only the driver makes them.  It is asked for at the first call and not linked, so a library with
// these kernels loads where there is no driver.

#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "../common/hopper_boxes.h"

namespace decomp_kernels::cuda {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

inline EncodeTiled find_encode_tiled() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  const bool there = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
  return there ? reinterpret_cast<EncodeTiled>(found) : nullptr;
}

// cudaErrorNotSupported: no driver that knows tensor maps.
inline cudaError_t make_map(const TensorBox& t, Dtype dtype, CUtensorMap& map) {
  static const EncodeTiled encode = find_encode_tiled();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t extents[] = {cuuint64_t(t.extent[0]), cuuint64_t(t.extent[1])};
  const cuuint64_t row_bytes[] = {cuuint64_t(t.stride) * 2};  // the innermost dimension's is 2
  const cuuint32_t box[] = {cuuint32_t(t.box[0]), cuuint32_t(t.box[1])};
  const cuuint32_t apart[] = {1, 1};
  const auto type = dtype == Dtype::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                          : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result = encode(
      &map, type, 2, const_cast<void*>(t.base), extents, row_bytes, box, apart,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace decomp_kernels::cuda
