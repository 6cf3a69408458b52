// out = bias + addend + mask(v small)
//
// The product goes to a tile in the level-1 cache, and from there once, with everything added to it,
// rounded to memory.

#include "up_expansion.h"

#include "panel.h"

namespace decomp_kernels::cpu::DK_LEVEL {
namespace {

constexpr int64_t kTile = kPanelRows * kPanelCols;

// The product's tile [rows, kPanelCols] to out.
template <typename T>
void finish(const UpExpansion& args, const float* tile, const float* bias, const PanelMask* mask,
            int64_t row, int64_t column, int64_t rows, int64_t cols) {
  T* out = static_cast<T*>(args.out) + row * args.N + column;
  const T* addend = args.addend ? static_cast<const T*>(args.addend) + row * args.N + column : nullptr;
  for (int64_t i = 0; i < rows; ++i, out += args.N, tile += kPanelCols) {
    for (int64_t j = 0; j < cols; j += kLanes) {
      Floats x = load(tile + j);
      if (mask) x = keep(kept_lanes(mask->bits[i], j), x);
      if (bias) x = x + load(bias + j);
      if (addend) x = x + floats_at(addend, j, cols);
      store_at(out, j, cols, x);
    }
    if (addend) addend += args.N;
  }
}

template <typename S, typename Kind>
void expand_unit(const UpExpansion& args, int64_t unit, float* scratch) {
  const int64_t N = args.N, r = args.r, padded = padded_rank(r), count = parts(r, Kind::kPer);
  const int64_t row0 = unit / args.strips() * kExpandRows;
  const int64_t col0 = unit % args.strips() * kPanelCols;
  const int64_t rows = min(kExpandRows, args.M - row0), cols = min(kPanelCols, N - col0);
  alignas(64) float tile[kTile], bias[kPanelCols];
  PanelMask mask;
  float* small = aligned(scratch);                       // [count, kPanelCols]
  float* v = small + padded * kPanelCols;                // [rows, line]
  const int64_t line = padded;
  Panels<Kind>::small(static_cast<const S*>(args.small) + col0, N, r, cols, kPanelCols, small);
  Panels<Kind>::small_as_rows(static_cast<const S*>(args.v) + row0 * r, rows, r, line, v);
  if (args.bias && args.bias_dtype == Dtype::kFloat)
    small_floats(static_cast<const float*>(args.bias) + col0, 0, 1, cols, kPanelCols, bias);
  else if (args.bias)
    small_floats(static_cast<const bf16*>(args.bias) + col0, 0, 1, cols, kPanelCols, bias);
  for (int64_t i = 0; i < rows; i += kPanelRows) {
    const int64_t high = min(kPanelRows, rows - i);
    if (args.threshold) draw(args.seed, args.threshold, row0 + i, col0, N, high, cols, &mask);
    product<Kind, 0, 1, false>(v + i * line, line, high, small, kPanelCols, parts(cols, kLanes), count,
                               tile, kPanelCols);
    const float* added = args.bias ? bias : nullptr;
    const PanelMask* dropped = args.threshold ? &mask : nullptr;
    if (args.out_dtype == Dtype::kFloat)
      finish<float>(args, tile, added, dropped, row0 + i, col0, high, cols);
    else
      finish<bf16>(args, tile, added, dropped, row0 + i, col0, high, cols);
  }
}

}  // namespace

void up_expansion(const UpExpansion& args, int64_t begin, int64_t end, float* scratch) {
  for (int64_t unit = begin; unit < end; ++unit) {
    if (args.small_dtype == Dtype::kFloat) {
      expand_unit<float, Singles>(args, unit, scratch);
    } else {
#ifdef DK_PAIRS
      expand_unit<bf16, Pairs>(args, unit, scratch);
#else
      expand_unit<bf16, Singles>(args, unit, scratch);
#endif
    }
  }
}

}  // namespace decomp_kernels::cpu::DK_LEVEL
