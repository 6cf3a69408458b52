// One pass over a tall matrix, down its columns: everything that a backward takes from it at once.
//
//     big [M, N]     u = big right                [M, R]    right [N, R]
//                    c = left^T drop(big)         [L, N]    left  [M, L]
//                    s = sum_m big                [N]
//                    p = sum_m big * other        [N]       other [M, N]
//                    scaled_big = big * scale     [M, N]    scale [N]
//                    scaled_other = other * scale [M, N]
//
// Each only where its result has data.  right and left are of big's type or float32, both of one;
// other, scaled_big and scaled_other are of big's type.  u, c, s and p are float32: nothing is
// divided by the kept fraction.  scaled_other may be other itself; scaled_big is not big.
//
// Over dY this gives dH, dB, dbias, d_out_scale and out_scale * dY; over x, with dX for ``other``,
// dA, d_in_scale and dx (decomp_kernels/reference/decomposed_linear.py).

#pragma once

#include "arguments.h"

namespace decomp_kernels::cuda {

struct ColumnWalk {
  Matrix big = {};
  int64_t M = 0, N = 0;
  Matrix right = {}, left = {};
  int64_t R = 0, L = 0;
  Mask mask = {};
  Matrix other = {};
  Vector scale = {};
  float *u = nullptr, *c = nullptr, *s = nullptr, *p = nullptr;  // contiguous
  Output scaled_big = {}, scaled_other = {};
};

// nullptr, or why there is no kernel for it.  arch: 10 * major + minor of the compute capability.
const char* why_not(const ColumnWalk& args, int arch);

// Partial results: of u for each strip of columns, of c, s and p for each share of the rows, which
// are as many as device_sms asks for: the same bits each time are those of one device.
// For the arguments of the launch, results included.
size_t workspace_bytes(const ColumnWalk& args, int device_sms);

cudaError_t launch(const ColumnWalk& args, void* workspace, int device_sms, cudaStream_t stream);

// Whether the partial results of u, written and read once, are fewer bytes than another read of
// big, which a down projection of big would be.
bool u_is_cheap(const ColumnWalk& args);

}  // namespace decomp_kernels::cuda
