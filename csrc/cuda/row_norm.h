// Row norms of V = W + scale * B A, and their gradients, in one read of W
// (definition: decomp_kernels/reference/row_norm.py).
//
//     n^2 = ||W||^2 + scale * sum_r B * (2 U + scale * B G)        U = W A^T        G = A A^T
//     dB  = scale * q * (U + scale * B G)                          q = d_n / n      [N, 1]
//     dA  = L^T W + scale * (L^T B) A                              L = scale * q * B
//
//     W [N, K]    A = down [R, K]    B = up [N, R]    n, d_n [N]    U, L [N, R]    G [R, R]
//
// down and up are of W's type or float32, both of one.  All results are float32.

#pragma once

#include "arguments.h"

namespace decomp_kernels::cuda {

// ||W||^2 of each row, which does not change while W is frozen.
struct SquaredRows {
  Matrix weight = {};
  int64_t N = 0, K = 0;
  float* squares = nullptr;  // [N]
};

struct RowNorm {
  Matrix weight = {}, down = {}, up = {};
  int64_t N = 0, K = 0, R = 0;
  const float* squares = nullptr;  // [N]
  float scale = 1.0f;
  float* norm = nullptr;  // [N]
};

struct RowNormGradients {
  const float *d_norm = nullptr, *norm = nullptr;  // [N]
  Matrix weight = {}, down = {}, up = {};
  int64_t N = 0, K = 0, R = 0;
  float scale = 1.0f;
  float* d_down = nullptr;  // [R, K]
  float* d_up = nullptr;    // [N, R]
};

// nullptr, or why there is no kernel for it.  arch: 10 * major + minor of the compute capability.
const char* why_not(const SquaredRows& args, int arch);
const char* why_not(const RowNorm& args, int arch);
const char* why_not(const RowNormGradients& args, int arch);

// For the arguments of the launch, results included.
size_t workspace_bytes(const RowNorm& args, int device_sms);
size_t workspace_bytes(const RowNormGradients& args, int device_sms);

cudaError_t launch(const SquaredRows& args, void* workspace, int device_sms, cudaStream_t stream);
cudaError_t launch(const RowNorm& args, void* workspace, int device_sms, cudaStream_t stream);
cudaError_t launch(const RowNormGradients& args, void* workspace, int device_sms,
                   cudaStream_t stream);

}  // namespace decomp_kernels::cuda
