// E = M M^T - I and its like for many small M, and their gradients (reference/gram.py).
//
//     matrices: G of one shape and dtype, [r, K] where of_rows, else [N, r]     E [G, r, r]

#pragma once

#include <cstdint>

#include "dtype.h"
#include "levels.h"

namespace decomp_kernels::cpu {

inline constexpr int64_t kGramBlock = 64;  // rows of an [N, r] matrix that become float32 at a time

struct GramArgs {
  const void* const* matrices;
  Dtype dtype;
  bool of_rows;
  int64_t length, r;  // length: K or N

  bool identity;    // forward: whether E's diagonal is that of M M^T minus 1; else it is 0
  float* residual;  // [G, r, r]  forward writes E, backward reads it
  float* squared;   // [G]        forward: ||E||_F^2

  const float* factor;  // [G]  backward: the slope is factor * E
  float* slope;         // [G, r, r]
  void* out;            // [G, r, K] or [G, N, r]  slope M, or M slope

  float* block;  // [G, kGramBlock, r]  float32 copies of bf16 rows, for [N, r] alone
};

// Each over a range of matrices.
DK_DECLARE_AT_LEVELS(void gram_forward(const GramArgs&, int64_t begin, int64_t end))
DK_DECLARE_AT_LEVELS(void gram_backward(const GramArgs&, int64_t begin, int64_t end))

}  // namespace decomp_kernels::cpu
