// out = bias + addend + mask(v small)
//
// The product stays in registers, and goes to memory once, rounded, with everything added to it.

#include "up_expansion.h"

#include "panel.h"

namespace decomp_kernels::cpu::DK_LEVEL {
namespace {

constexpr int kTall = 4;               // rows of a tile
constexpr int64_t kCached = 16 << 10;  // bytes of ``small`` that stay in the level-1 cache

// What is added to the products of up to kTall rows and some columns, and where they go.
template <typename T>
struct Target {
  T* out;                // at the first row and column
  const T* addend;       // the same, or null
  const float* bias;     // [cols] and zeros, or null
  const uint64_t* mask;  // [rows, kExpandCols / 64], or null
  int64_t N, rows, cols;

  DK_INLINE Floats finished(Floats x, int64_t i, int64_t j) const {
    if (mask) x = keep(kept_lanes(mask + i * (kExpandCols / 64), j), x);
    if (bias) x = x + load(bias + j);
    if (addend) x = x + floats_at(addend + i * N, j, cols);
    return x;
  }
};

template <typename Kind, typename T, int J>
void expand_tile(const float* v, int64_t line, const float* small, int64_t count,
                 const Target<T>& to, int64_t j) {
  Floats acc[kTall][J];
  for (int a = 0; a < kTall; ++a)
    for (int b = 0; b < J; ++b) acc[a][b] = zero();
  const float* columns = small + j / kPanelCols * kPanelCols * line + j % kPanelCols;
  accumulate<Kind, 0, 1>(v, line, 0, columns, kPanelCols, count, acc);
  for (int a = 0; a < kTall; ++a) {
    if (a >= to.rows) return;
    T* out = to.out + a * to.N;
    if constexpr (J == 1) {
      store_at(out, j, to.cols, to.finished(acc[a][0], a, j));
    } else {
      for (int b = 0; b < J; b += 2)
        store(out + j + b * kLanes, to.finished(acc[a][b], a, j + b * kLanes),
              to.finished(acc[a][b + 1], a, j + (b + 1) * kLanes));
    }
  }
}

template <typename S, typename Kind, typename T>
void expand_unit(const UpExpansion& args, int64_t unit, float* scratch) {
  const int64_t N = args.N, r = args.r, padded = padded_rank(r), count = parts(r, Kind::kPer);
  const int64_t row0 = unit / args.strips() * kExpandRows;
  const int64_t col0 = unit % args.strips() * kExpandCols;
  const int64_t rows = min(kExpandRows, args.M - row0), cols = min(kExpandCols, N - col0);
  alignas(64) float bias[kExpandCols];
  uint64_t mask[kTall * kExpandCols / 64];
  float* small = aligned(scratch);          // [cols / kPanelCols, padded, kPanelCols]
  float* v = small + padded * kExpandCols;  // [rows, padded]
  for (int64_t j = 0; j < cols; j += kPanelCols)
    Panels<Kind>::small(static_cast<const S*>(args.small) + col0 + j, N, r,
                        min(kPanelCols, cols - j), kPanelCols, small + j * padded);
  Panels<Kind>::small_as_rows(static_cast<const S*>(args.v) + row0 * r, rows, r, padded, v);
  if (args.bias && args.bias_dtype == Dtype::kFloat)
    small_floats(static_cast<const float*>(args.bias) + col0, 0, 1, cols, kExpandCols, bias);
  else if (args.bias)
    small_floats(static_cast<const bf16*>(args.bias) + col0, 0, 1, cols, kExpandCols, bias);

  // As many columns as the cache holds of ``small``, so that long pieces of rows are written.
  const int64_t most = kCached / int64_t(sizeof(float)) / (count ? count : 1);
  const int64_t step = most < kPanelCols ? kPanelCols : most / kPanelCols * kPanelCols;
  for (int64_t j0 = 0; j0 < cols; j0 += step)
    for (int64_t i = 0; i < rows; i += kTall) {
      const int64_t first = (row0 + i) * N + col0 + j0;
      const Target<T> to{static_cast<T*>(args.out) + first,
                         args.addend ? static_cast<const T*>(args.addend) + first : nullptr,
                         args.bias ? bias + j0 : nullptr, args.threshold ? mask : nullptr, N,
                         min(kTall, rows - i), min(step, cols - j0)};
      if (args.threshold)
        for (int64_t a = 0; a < to.rows; ++a)
          kept_bits(args.seed, uint64_t(first + a * N), to.cols, args.threshold,
                    mask + a * (kExpandCols / 64));
      for (int64_t j = 0; j < to.cols;) {
        const float *left = v + i * padded, *right = small + j0 * padded;
        const bool wide = j + kWide * kLanes <= to.cols;
        if (wide) expand_tile<Kind, T, kWide>(left, padded, right, count, to, j);
        else expand_tile<Kind, T, 1>(left, padded, right, count, to, j);
        j += wide ? kWide * kLanes : kLanes;
      }
    }
}

template <typename S, typename Kind>
void expand_units(const UpExpansion& args, int64_t begin, int64_t end, float* scratch) {
  for (int64_t unit = begin; unit < end; ++unit) {
    if (args.out_dtype == Dtype::kFloat) expand_unit<S, Kind, float>(args, unit, scratch);
    else expand_unit<S, Kind, bf16>(args, unit, scratch);
  }
}

}  // namespace

void up_expansion(const UpExpansion& args, int64_t begin, int64_t end, float* scratch) {
  if (args.small_dtype == Dtype::kFloat)
    return expand_units<float, Singles>(args, begin, end, scratch);
#ifdef DK_PAIRS
  expand_units<bf16, Pairs>(args, begin, end, scratch);
#else
  expand_units<bf16, Singles>(args, begin, end, scratch);
#endif
}

}  // namespace decomp_kernels::cpu::DK_LEVEL
