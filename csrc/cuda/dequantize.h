// A quantised weight [N, K] as floats (codes: csrc/common/quantized.h).
//
//     NF4     w = level[code] * absmax[i / blocksize]    i = row * K + column
//     int8    w = code * absmax[row] / 127

#pragma once

#include "arguments.h"

namespace decomp_kernels::cuda {

struct Nf4Weight {
  const uint8_t* packed = nullptr;  // [ceil(N * K / 2)], the first of two codes in the high bits
  const float* absmax = nullptr;    // [ceil(N * K / blocksize)]
  int64_t blocksize = 64;           // a power of two from 16 on
  int64_t N = 0, K = 0;
  Output out = {};
};

struct Int8Weight {
  const int8_t* codes = nullptr;  // [N, K]
  const float* absmax = nullptr;  // [N]
  int64_t N = 0, K = 0;
  Output out = {};
};

// nullptr, or why there is no kernel for it.  arch: 10 * major + minor of the compute capability.
const char* why_not(const Nf4Weight& args, int arch);
const char* why_not(const Int8Weight& args, int arch);

cudaError_t launch(const Nf4Weight& args, void* workspace, int device_sms, cudaStream_t stream);
cudaError_t launch(const Int8Weight& args, void* workspace, int device_sms, cudaStream_t stream);

}  // namespace decomp_kernels::cuda
