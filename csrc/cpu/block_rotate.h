// y = x R with R = blockdiag(R_1, ..., R_q), and its gradients (reference/block_rotate.py)
//
//     x, y [M, K], K = q b, of one dtype     blocks [q, b, b]

#pragma once

#include <cstdint>

#include "dtype.h"
#include "levels.h"

namespace decomp_kernels::cpu {

inline constexpr int64_t kRotateRows = 32, kRotateCols = 128;  // of x that are worked on at a time

struct BlockRotateArgs {
  const void* x;        // [M, K]
  const void* gx;       // [M, K]  backward: the gradient of y
  const float* blocks;  // [q, b, b]
  void* out;            // [M, K]  forward x R, backward gx R^T
  float* d_blocks;      // [q, b, b]  backward
  Dtype dtype;
  int64_t M, q, b;

  int64_t K() const { return q * b; }
  // Neighbouring blocks that are one unit of work, so that whole lines of memory are read.
  int64_t group() const { return b < kRotateCols ? kRotateCols / b : 1; }
  int64_t units() const { return (q + group() - 1) / group(); }
  int64_t line() const { return group() * b + 16; }  // of a panel: its rows in different sets
  int64_t scratch() const { return 2 * kRotateRows * line() + group() * b * b + 3 * 16; }
};

// Over a range of units; the parts of the forward's range are (unit, rows) of kRotateRows each.
DK_DECLARE_AT_LEVELS(void block_rotate_forward(const BlockRotateArgs&, int64_t begin, int64_t end,
                                               float* scratch))
DK_DECLARE_AT_LEVELS(void block_rotate_backward(const BlockRotateArgs&, int64_t begin, int64_t end,
                                                float* scratch))

}  // namespace decomp_kernels::cpu
