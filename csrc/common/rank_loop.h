// The inner loop of a product with a rank-r step in it, as one sequence of iterations.
//
//     D = left right + small_left small_right         left [rows, inner]  small_left [rows, rank]
//
// An iteration fills one stage of shared memory with kDepth inner elements of one of the two pairs;
// who computes sees one accumulator and a longer loop.  What lies beyond ``rank`` (or ``inner``) is
// zeros that the copy engine fills in, so any rank works with nothing padded in memory, and 16-wide
// blocks of a stage that hold zeros only are not multiplied.
// The small pair comes last, or first where the dropout mask has to fall on it alone.

#pragma once

#include "host_device.h"

namespace decomp_kernels {

inline constexpr int kDepth = 64;       // inner elements of a stage: 128 bytes, one swizzled row
inline constexpr int kBlockDepth = 16;  // inner elements of one matrix instruction
inline constexpr int kStageBlocks = kDepth / kBlockDepth;

DK_HOST_DEVICE constexpr int steps_of(int elements) { return (elements + kDepth - 1) / kDepth; }

struct RankLoop {
  int inner, rank;
  bool small_first;

  DK_HOST_DEVICE int base_steps() const { return steps_of(inner); }
  DK_HOST_DEVICE int small_steps() const { return steps_of(rank); }
  DK_HOST_DEVICE int steps() const { return base_steps() + small_steps(); }

  // Which pair an iteration multiplies, and from which of its inner elements on.
  DK_HOST_DEVICE bool is_small(int step) const {
    return small_first ? step < small_steps() : step >= base_steps();
  }
  DK_HOST_DEVICE int first_inner(int step) const {
    const int before = small_first ? small_steps() : base_steps();
    return (step < before ? step : step - before) * kDepth;
  }

  // Blocks of the small pair's stage that starts at ``first`` with an element inside the rank.
  DK_HOST_DEVICE int small_blocks(int first) const {
    const int blocks = (rank - first + kBlockDepth - 1) / kBlockDepth;
    return blocks < kStageBlocks ? blocks : kStageBlocks;
  }
};

}  // namespace decomp_kernels
