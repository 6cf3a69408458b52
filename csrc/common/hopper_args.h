// What the fused Hopper product takes, and when it can run (the products: cuda/hopper_gemm.h).
//
// Row strides are in elements.  bf16 or fp16 operands of one type; scales and bias float32.

#pragma once

#include <algorithm>
#include <cstdint>

#include "dtype.h"
#include "hopper_tiles.h"

namespace decomp_kernels {

inline constexpr int kChooseShape = -1;

struct HopperForwardArgs {
  const void *x, *weight;         // [M, K]  [N, K]
  const void *v, *up;             // [M, r]  [N, r], scale folded in; null: no rank-r term
  const void* addend;             // [M, N] or null
  const float *out_scale, *bias;  // [N] or null
  void *y, *z;                    // [M, N], z null: not kept
  int64_t M, N, K, r;
  int64_t x_stride, weight_stride, v_stride, up_stride, addend_stride, y_stride, z_stride;
  Dtype dtype;
  int shape = kChooseShape;  // of kHopperShape, or the heuristic's choice
};

struct HopperInputGradientArgs {
  const void *g, *weight;  // [M, N]  [N, K]
  const void *dt, *down;   // [M, r]  [r, K], the kept fraction divided out; null: no rank-r term
  const int64_t* seed;     // on the device, null: no dropout
  uint32_t threshold;      // lane values below it are dropped (mask.h)
  const float* in_scale;   // [K] or null
  const void* x;           // [M, K], where d_in_scale is wanted
  void* d_x;               // [M, K], null: not wanted
  float* d_in_scale;       // [K], null: not wanted
  int64_t M, N, K, r;
  int64_t g_stride, weight_stride, dt_stride, down_stride, x_stride, d_x_stride;
  Dtype dtype;
  int shape = kChooseShape;
};

namespace hopper_detail {

inline bool starts_at(const void* p, int bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

// Rows of ``length`` that the copy engine, and pairs of elements, are read by.  Null is fine.
struct Rows {
  const void* base;
  int64_t length, stride;
  bool aligned() const { return base == nullptr || starts_at(base, 16); }
  bool strided() const {
    return base == nullptr || (stride % 8 == 0 && stride >= length && stride < int64_t(1) << 38);
  }
};

template <size_t n>
const char* why_not(
    int arch, Dtype dtype, int shape, const Rows (&rows)[n],
    std::initializer_list<const float*> vectors, int64_t M, int64_t cols, int64_t inner, int64_t r,
    bool both_small) {
  const bool has_instructions = arch == 90;
  const bool narrow = dtype == Dtype::kBFloat16 || dtype == Dtype::kHalf;
  const bool known_shape = shape >= kChooseShape && shape < kHopperShapes;
  const bool something_to_sum = inner >= 1 && r >= 0;
  const bool small_given = both_small == (r > 0);
  const bool fits_coordinates = std::max({M, cols, inner, r}) < (int64_t(1) << 31) - 512;
  const bool fits_tile_numbers = ((M + 63) / 64) * ((cols + 127) / 128) < int64_t(1) << 30;
  const bool columns_in_pairs = cols % 2 == 0;
  const bool aligned = std::all_of(rows, rows + n, [](const Rows& t) { return t.aligned(); });
  const bool strided = std::all_of(rows, rows + n, [](const Rows& t) { return t.strided(); });
  const bool pairs_aligned = std::all_of(
      vectors.begin(), vectors.end(), [](const float* p) { return starts_at(p, 8); });

  if (!has_instructions) return "it uses matrix and copy instructions that only sm_90 has";
  if (!narrow) return "its operands are bfloat16 or float16";
  if (!known_shape) return "there is no tile shape of that number";
  if (!something_to_sum) return "the inner dimension is empty";
  if (!small_given) return "r > 0 needs both rank-r operands, r = 0 none";
  if (!fits_coordinates) return "a size does not fit the copy engine's 32-bit coordinates";
  if (!fits_tile_numbers) return "there are more tiles than 32-bit numbers for them";
  if (!columns_in_pairs) return "the output has an odd number of columns";
  if (!aligned) return "an operand does not start at a multiple of 16 bytes";
  if (!strided) return "an operand's rows are not apart by a multiple of 16 bytes";
  if (!pairs_aligned) return "a scale or the bias does not start at a multiple of 8 bytes";
  return nullptr;
}

}  // namespace hopper_detail

// The reason as text, or null where it can run.
inline const char* why_not(const HopperForwardArgs& a, int arch) {
  const hopper_detail::Rows rows[] = {
      {a.x, a.K, a.x_stride},           {a.weight, a.K, a.weight_stride}, {a.v, a.r, a.v_stride},
      {a.up, a.r, a.up_stride},         {a.addend, a.N, a.addend_stride}, {a.y, a.N, a.y_stride},
      {a.z, a.N, a.z_stride},
  };
  return hopper_detail::why_not(arch, a.dtype, a.shape, rows, {a.out_scale, a.bias}, a.M, a.N, a.K,
                                a.r, a.v != nullptr && a.up != nullptr);
}

inline const char* why_not(const HopperInputGradientArgs& a, int arch) {
  const hopper_detail::Rows rows[] = {
      {a.g, a.N, a.g_stride},       {a.weight, a.K, a.weight_stride}, {a.dt, a.r, a.dt_stride},
      {a.down, a.K, a.down_stride}, {a.x, a.K, a.x_stride},           {a.d_x, a.K, a.d_x_stride},
  };
  const char* reason = hopper_detail::why_not(
      arch, a.dtype, a.shape, rows, {a.in_scale}, a.M, a.K, a.N, a.r,
      a.dt != nullptr && a.down != nullptr);
  if (reason != nullptr) return reason;
  const bool words_in_rows = a.seed == nullptr || a.K % 4 == 0;
  const bool threshold_fits = a.threshold <= 65536;
  const bool sum_has_x = a.d_in_scale == nullptr || a.x != nullptr;
  if (!words_in_rows) return "with dropout K must be a multiple of 4: a mask word serves 4 columns";
  if (!threshold_fits) return "the dropout threshold is above 65536";
  if (!sum_has_x) return "d_in_scale needs x";
  return nullptr;
}

// The shape of tile for D [rows, cols] on so many processors, of those with a bit set in ``linked``
// (kChooseShape: there is none).  A model, not a measurement: the fullest processor's clocks, where
// a tile's step takes what multiplying it does (4096 operations a clock, in dense bf16) or what
// fetching it does (32 bytes a clock of L2), and a cooperative tile's end is not hidden behind the
// other warpgroup's products.
inline int choose_shape(
    HopperOp op, int64_t rows, int64_t cols, int64_t inner, int device_sms,
    unsigned linked = ~0u) {
  int best = kChooseShape;
  double best_clocks = 0.0;
  for (int shape = 0; shape < kHopperShapes; ++shape) {
    if (!(linked >> shape & 1)) continue;
    const HopperTile tile = hopper_tile(op, shape);
    const int64_t clusters = std::max(device_sms / tile.cluster, 1);
    const int64_t tiles = (tile_grid(tile, rows, cols).units() + clusters - 1) / clusters;
    const double elements = double(tile.rows()) * tile.cols;
    const double multiply = elements * kDepth / 2048.0;
    const double fetch = 2.0 * kDepth * (tile.rows() + double(tile.cols) / tile.cluster) / 32.0;
    const double end = elements / 16.0 * (tile.ping_pong() ? 1.0 : double(tiles));
    const double clocks = double(tiles * steps_of(int(inner))) * std::max(multiply, fetch) + end;
    if (best == kChooseShape || clocks < best_clocks) best = shape, best_clocks = clocks;
  }
  return best;
}

}  // namespace decomp_kernels
