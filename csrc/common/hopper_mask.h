// The dropout mask on a warpgroup's accumulator (mask.h says which elements are kept).
//
//     kept(row, col):  element row * cols + col of D [rows, cols],  cols % 4 == 0
//
// One word of the generator serves four columns, but a thread holds two neighbours of one row and
// two of the row 8 below.  Lanes 2i and 2i + 1 hold the same four columns, so the even one draws
// for the upper row, the odd one for the lower, and they exchange: each word is drawn once.
// The words of a tile are drawn one a step of the main loop of the tile before, where the matrix
// instructions leave the other units idle.

#pragma once

#include <cstdint>

#include "hopper_epilogue.h"
#include "mask.h"

namespace decomp_kernels {

// Accumulator blocks of 8 columns, 4 registers each, whose four bits fit one register.
inline constexpr int kMaskBlocks = 8;
inline constexpr int kMaskRegisters = 4 * kMaskBlocks;

// The bits that one thread draws of a tile of kParts * 64 columns.
template <int kParts>
struct MaskDraw {
  uint32_t bits[kParts];
  uint64_t word;       // the next to draw
  int left;            // how many there are still to draw

  // For the tile whose first element is (first_row, first_col) of D [, cols].
  DK_HOST_DEVICE void begin(int64_t cols, int first_row, int first_col, int thread) {
    const Element mine = accumulator_element(thread, 2 * (thread % 2));
    const uint64_t row_start = uint64_t(first_row + mine.row) * uint64_t(cols);
    word = (row_start + uint64_t(first_col + mine.col / 4 * 4)) / 4;
    left = kParts * kMaskBlocks;
  }

  // One word's four bits, pushed in from above: after all of them the first stands lowest.
  DK_HOST_DEVICE void step(uint64_t seed, uint32_t threshold) {
    if (left == 0) return;
    const uint64_t lanes = mask_word(seed, word);
    word += 2;  // 8 columns on
    --left;
    uint32_t kept = 0;
    for (int lane = 0; lane < 4; ++lane)
      kept |= uint32_t(lane_kept(lanes, lane, threshold)) << lane;
    for (int part = 0; part < kParts; ++part) {
      const uint32_t above = part + 1 < kParts ? bits[part + 1 < kParts ? part + 1 : part] : kept;
      bits[part] = bits[part] >> 4 | above << 28;
    }
  }

  DK_HOST_DEVICE void finish(uint64_t seed, uint32_t threshold) {
    while (left > 0) step(seed, threshold);
  }
};

// Whether register i of a part's kMaskRegisters is kept; ``other`` is lane ^ 1's bits of the part.
DK_HOST_DEVICE bool register_kept(uint32_t mine, uint32_t other, int thread, int i) {
  const bool lower = i / 2 % 2, odd = thread % 2;
  const uint32_t bits = lower == odd ? mine : other;
  return bits >> (4 * (i / 4) + 2 * odd + i % 2) & 1;
}

}  // namespace decomp_kernels
