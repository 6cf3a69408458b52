// The dropout mask on a warpgroup's accumulator (mask.h says which elements are kept).
//
//     kept(row, col):  element row * cols + col of D [rows, cols],  cols % 4 == 0
//
// One word of the generator serves four columns, but a thread holds two neighbours of one row and
// two of the row 8 below.  Lanes 2i and 2i + 1 hold the same four columns, so the even one draws
// for the upper row, the odd one for the lower, and they exchange: each word is drawn once.

#pragma once

#include <cstdint>

#include "hopper_epilogue.h"
#include "mask.h"

namespace decomp_kernels {

// Accumulator blocks of 8 columns whose four bits fit one register to exchange.
inline constexpr int kMaskBlocks = 8;

// The four bits of each of 8 blocks that this thread draws; the tile's first element is
// (first_row, first_col) of D, and the blocks start at accumulator register 4 * first_block.
DK_HOST_DEVICE uint32_t drawn_bits(
    uint64_t seed, uint32_t threshold, int64_t cols, int first_row, int first_col, int thread,
    int first_block) {
  const Element mine = accumulator_element(thread, 4 * first_block + 2 * (thread % 2));
  const uint64_t row_start = uint64_t(first_row + mine.row) * uint64_t(cols);
  const uint64_t first = row_start + uint64_t(first_col + mine.col / 4 * 4);
  uint32_t bits = 0;
  for (int block = 0; block < kMaskBlocks; ++block) {
    const uint64_t word = mask_word(seed, first / 4 + 2 * block);
    for (int lane = 0; lane < 4; ++lane)
      bits |= uint32_t(lane_kept(word, lane, threshold)) << (4 * block + lane);
  }
  return bits;
}

// Whether accumulator register i, one of those blocks', is kept; ``other`` is lane ^ 1's bits.
DK_HOST_DEVICE bool register_kept(uint32_t mine, uint32_t other, int thread, int i) {
  const bool lower = i / 2 % 2, odd = thread % 2;
  const uint32_t bits = lower == odd ? mine : other;
  return bits >> (4 * (i / 4 % kMaskBlocks) + 2 * odd + i % 2) & 1;
}

}  // namespace decomp_kernels
