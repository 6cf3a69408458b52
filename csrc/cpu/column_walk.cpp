// u = big @ right    c = drop(big)^T left    p = sum_m big * other    s = sum_m big    scaled = big * scale
//
// A panel of 32 x 128 is read from memory once, and everything is taken from it while it is in the
// level-1 cache.  c of a strip of 128 columns and right's rows for it stay there from panel to panel.

#include "column_walk.h"

#include "panel.h"

namespace decomp_kernels::cpu::DK_LEVEL {
namespace {

// The small operands and results of one unit, padded.
struct Scratch {
  float *right, *left, *u, *c;

  Scratch(float* memory, int64_t padded) {
    right = aligned(memory);
    c = right + kStripCols * padded;
    left = c + kStripCols * padded;
    u = left + kChunkRows * padded;
  }
};

// [count, padded] to [count, r].
void copy_out(const float* from, int64_t count, int64_t r, int64_t padded, float* to) {
  for (int64_t i = 0; i < count; ++i, from += padded, to += r)
    for (int64_t j = 0; j < r; j += kLanes) store_at(to, j, r, load(from + j));
}

// scaled, and p and s added to what they are.
template <typename T>
void columns_of(const ColumnWalk& walk, int64_t row, int64_t column, int64_t rows, int64_t cols,
                float* p, float* s) {
  const int64_t first = row * walk.N + column;
  for (int64_t j = 0; j < cols; j += kLanes) {
    const T* big = static_cast<const T*>(walk.big) + first;
    const T* other = walk.other ? static_cast<const T*>(walk.other) + first : nullptr;
    T* scaled = walk.scaled ? static_cast<T*>(walk.scaled) + first : nullptr;
    Floats p_sum = p ? floats_at(p, j, cols) : zero(), s_sum = s ? floats_at(s, j, cols) : zero();
    const Floats scale = scaled ? floats_at(walk.scale + column, j, cols) : zero();
    for (int64_t i = 0; i < rows; ++i) {
      const Floats x = floats_at(big, j, cols);
      s_sum = s_sum + x;
      if (other) {
        p_sum = fma(x, floats_at(other, j, cols), p_sum);
        other += walk.N;
      }
      if (scaled) {
        store_at(scaled, j, cols, x * scale);
        scaled += walk.N;
      }
      big += walk.N;
    }
    if (p) store_at(p, j, cols, p_sum);
    if (s) store_at(s, j, cols, s_sum);
  }
}

template <typename T, typename S, typename Kind>
void walk_unit(const ColumnWalk& walk, int64_t unit, float* memory) {
  constexpr int kPer = Kind::kPer;
  const int64_t N = walk.N, r = walk.r, padded = padded_rank(r), vectors = padded / kLanes;
  const int64_t chunk = unit / walk.strips(), strip = unit % walk.strips();
  const int64_t row0 = chunk * kChunkRows, col0 = strip * kStripCols;
  const int64_t rows = min(kChunkRows, walk.M - row0), cols = min(kStripCols, N - col0);
  const Scratch scratch(memory, padded);
  alignas(64) float panel[kPanelRows * kLine];
  PanelMask mask;
  float* p = walk.p ? walk.p + chunk * N + col0 : nullptr;
  float* s = walk.s ? walk.s + chunk * N + col0 : nullptr;

  if (p) clear(p, cols);
  if (s) clear(s, cols);
  if (walk.right) {
    Panels<Kind>::small(static_cast<const S*>(walk.right) + col0 * r, r, cols, r, padded,
                        scratch.right);
    clear(scratch.u, up_to(rows, kTileRows) * padded);
  }
  if (walk.left) {
    Panels<Kind>::small(static_cast<const S*>(walk.left) + row0 * r, r, rows, r, padded,
                        scratch.left);
    clear(scratch.c, up_to(cols, kTileRows) * padded);
  }
  for (int64_t j = 0; j < cols; j += kPanelCols) {
    const int64_t wide = min(kPanelCols, cols - j);
    for (int64_t i = 0; i < rows; i += kPanelRows) {
      const int64_t high = min(kPanelRows, rows - i);
      const T* big = static_cast<const T*>(walk.big) + (row0 + i) * N + col0 + j;
      if (p || s || walk.scaled)
        columns_of<T>(walk, row0 + i, col0 + j, high, wide, p ? p + j : nullptr,
                      s ? s + j : nullptr);
      if (walk.right) {
        Panels<Kind>::rows(big, N, high, wide, nullptr, panel);
        product<Kind, kLine / kPer, 1>(panel, 0, high, scratch.right + j / kPer * padded, padded,
                                       vectors, parts(wide, kPer), scratch.u + i * padded, padded);
      }
      if (walk.left) {
        if (walk.threshold)
          draw(walk.seed, walk.threshold, row0 + i, col0 + j, N, high, wide, &mask);
        if (kPer == 2 || walk.threshold || !walk.right)
          Panels<Kind>::columns(big, N, high, wide, walk.threshold ? &mask : nullptr, panel);
        product<Kind, 1, kLine>(panel, 0, wide, scratch.left + i / kPer * padded, padded, vectors,
                                parts(high, kPer), scratch.c + j * padded, padded);
      }
    }
  }
  if (walk.right)
    copy_out(scratch.u, rows, r, padded, walk.u + (strip * walk.M + row0) * r);
  if (walk.left) copy_out(scratch.c, cols, r, padded, walk.c + (chunk * N + col0) * r);
}

template <typename T, typename S, typename Kind>
void walk_units(const ColumnWalk& walk, int64_t begin, int64_t end, float* scratch) {
  for (int64_t unit = begin; unit < end; ++unit) walk_unit<T, S, Kind>(walk, unit, scratch);
}

}  // namespace

void column_walk(const ColumnWalk& walk, int64_t begin, int64_t end, float* scratch) {
  const bool wide_big = walk.big_dtype == Dtype::kFloat, wide_small = walk.small_dtype == Dtype::kFloat;
  if (wide_big && wide_small) return walk_units<float, float, Singles>(walk, begin, end, scratch);
  if (wide_big) return walk_units<float, bf16, Singles>(walk, begin, end, scratch);
  if (wide_small) return walk_units<bf16, float, Singles>(walk, begin, end, scratch);
#ifdef DK_PAIRS
  walk_units<bf16, bf16, Pairs>(walk, begin, end, scratch);
#else
  walk_units<bf16, bf16, Singles>(walk, begin, end, scratch);
#endif
}

void sum_partials(const PartialSum& sum, int64_t begin, int64_t end) {
  const int64_t r = sum.r, size = sum.rows * r;
  for (int64_t n = begin; n < end; ++n) {
    const float* from = sum.partials + n * r;
    for (int64_t j = 0; j < r; j += kLanes) {
      Floats total = floats_at(from, j, r);
      for (int64_t part = 1; part < sum.count; ++part)
        total = total + floats_at(from + part * size, j, r);
      if (sum.by_rank) {
        float lanes[kLanes];
        store(lanes, total);
        for (int64_t l = 0; l < min(kLanes, r - j); ++l) sum.out[(j + l) * sum.rows + n] = lanes[l];
      } else {
        store_at(sum.out + n * r, j, r, total);
      }
    }
  }
}

}  // namespace decomp_kernels::cpu::DK_LEVEL
