// One read of big [M, N] for all that a backward takes from it (formulas: csrc/ops/column_walk.cpp).
//
// A unit of work is kChunkRows x kStripCols.  It gives u for its strip of columns and c, p, s for its
// chunk of rows; where there are several strips or chunks, those are partials, which column_walk_sum
// adds in their order.

#pragma once

#include <cstdint>

#include "dtype.h"
#include "levels.h"
#include "panel_sizes.h"

namespace decomp_kernels::cpu {

inline constexpr int64_t kChunkRows = 256, kStripCols = 512;

struct ColumnWalk {
  const void* big;     // [M, N]
  const void* right;   // [N, r] or null
  const void* left;    // [M, r] or null
  const void* other;   // [M, N], the dtype of big, or null
  const float* scale;  // [N] or null
  void* scaled;        // [M, N], the dtype of big; null without scale
  float* u;            // [strips, M, r]
  float* c;            // [chunks, N, r]
  float* p;            // [chunks, N]
  float* s;            // [chunks, N], null where not asked for
  int64_t M, N, r;
  uint64_t seed;
  uint32_t threshold;  // of the mask on big in c; 0: no mask
  Dtype big_dtype, small_dtype;

  int64_t chunks() const { return parts(M, kChunkRows); }
  int64_t strips() const { return parts(N, kStripCols); }
  int64_t units() const { return chunks() * strips(); }
  int64_t scratch_floats() const {  // of one thread
    return (2 * kStripCols + 2 * kChunkRows) * padded_rank(r) + 16;
  }
};

// out [rows, r], or [r, rows] where by_rank, = the sum of ``count`` partials [rows, r].
struct PartialSum {
  const float* partials;
  float* out;
  int64_t count, rows, r;
  bool by_rank;
};

// Units begin to end - 1.  scratch: scratch_floats() that nobody else uses meanwhile.
DK_DECLARE_AT_LEVELS(void column_walk(const ColumnWalk& walk, int64_t begin, int64_t end,
                                      float* scratch))
// Rows begin to end - 1 of ``rows``.
DK_DECLARE_AT_LEVELS(void sum_partials(const PartialSum& sum, int64_t begin, int64_t end))

}  // namespace decomp_kernels::cpu
