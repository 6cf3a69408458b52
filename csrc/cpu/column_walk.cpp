// u = big right   c = drop(big)^T left   p = sum big * other   s = sum big   scaled = big * scale
//
// A panel is read from memory once, and everything is taken of it while it is in the level-1
// cache.  c of its columns and right's rows for them stay there from panel to panel.

#include "column_walk.h"

#include "panel.h"

namespace decomp_kernels::cpu::DK_LEVEL {
namespace {

// The small operands and results of one unit, padded.
struct Scratch {
  // c [strip / panel, padded, kPanelCols], turned [kPanelCols, padded]
  float *right, *left, *u, *c, *turned;

  Scratch(float* memory, int64_t padded) {
    right = aligned(memory);
    c = right + kStripCols * padded;
    left = c + kStripCols * padded;
    u = left + kChunkRows * padded;
    turned = u + kChunkRows * padded;
  }
};

// [count, from_row] to [count, to_row], the first ``cols`` of each row.
void copy_out(const float* from, int64_t from_row, int64_t count, int64_t cols, float* to,
              int64_t to_row) {
  for (int64_t i = 0; i < count; ++i, from += from_row, to += to_row)
    for (int64_t j = 0; j < cols; j += kLanes) store_at(to, j, cols, load(from + j));
}

// G vectors of columns: scaled, and p and s added to what they are.
template <typename T, int G>
void column_group(const ColumnWalk& walk, int64_t row, int64_t column, int64_t rows, int64_t cols,
                  float* p, float* s) {
  const int64_t first = row * walk.N + column, N = walk.N;
  const T* big = static_cast<const T*>(walk.big) + first;
  const T* other = walk.other ? static_cast<const T*>(walk.other) + first : nullptr;
  T* scaled = walk.scaled ? static_cast<T*>(walk.scaled) + first : nullptr;
  Floats p_sum[G], s_sum[G], scale[G];
  for (int g = 0; g < G; ++g) {
    p_sum[g] = p ? floats_at(p, g * kLanes, cols) : zero();
    s_sum[g] = s ? floats_at(s, g * kLanes, cols) : zero();
    scale[g] = scaled ? floats_at(walk.scale + column, g * kLanes, cols) : zero();
  }
  for (int64_t i = 0; i < rows; ++i, big += N) {
    Floats x[G];
    for (int g = 0; g < G; ++g) x[g] = floats_at(big, g * kLanes, cols);
    if (s)
      for (int g = 0; g < G; ++g) s_sum[g] = s_sum[g] + x[g];
    if (other) {
      for (int g = 0; g < G; ++g)
        p_sum[g] = fma(x[g], floats_at(other, g * kLanes, cols), p_sum[g]);
      other += N;
    }
    if (scaled) {
      if constexpr (G % 2 == 0)
        for (int g = 0; g < G; g += 2)
          store(scaled + g * kLanes, x[g] * scale[g], x[g + 1] * scale[g + 1]);
      else
        for (int g = 0; g < G; ++g) store_at(scaled, g * kLanes, cols, x[g] * scale[g]);
      scaled += N;
    }
  }
  for (int g = 0; g < G; ++g) {
    if (p) store_at(p, g * kLanes, cols, p_sum[g]);
    if (s) store_at(s, g * kLanes, cols, s_sum[g]);
  }
}

template <typename T>
void columns_of(const ColumnWalk& walk, int64_t row, int64_t column, int64_t rows, int64_t cols,
                float* p, float* s) {
  constexpr int kGroup = 4;
  for (int64_t j = 0; j < cols;) {
    float *p_at = p ? p + j : nullptr, *s_at = s ? s + j : nullptr;
    if (j + kGroup * kLanes <= cols) {
      column_group<T, kGroup>(walk, row, column + j, rows, kGroup * kLanes, p_at, s_at);
      j += kGroup * kLanes;
    } else {
      column_group<T, 1>(walk, row, column + j, rows, cols - j, p_at, s_at);
      j += kLanes;
    }
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
    clear(scratch.c, padded * kStripCols);
  }
  for (int64_t j = 0; j < cols; j += kPanelCols) {
    const int64_t wide = min(kPanelCols, cols - j);
    for (int64_t i = 0; i < rows; i += kHigh<Kind>) {
      const int64_t high = min(kHigh<Kind>, rows - i);
      const T* big = static_cast<const T*>(walk.big) + (row0 + i) * N + col0 + j;
      if (p || s || walk.scaled)
        columns_of<T>(walk, row0 + i, col0 + j, high, wide, p ? p + j : nullptr,
                      s ? s + j : nullptr);
      if (walk.right) {
        Panels<Kind>::rows(big, N, high, wide, nullptr, panel);
        product<Kind, kLine / kPer, 1>(panel, 0, 0, high, scratch.right + j / kPer * padded, padded,
                                       vectors, parts(wide, kPer), scratch.u + i * padded, padded);
      }
      if (walk.left) {
        if (walk.threshold)
          draw(walk.seed, walk.threshold, row0 + i, col0 + j, N, high, wide, &mask);
        if (kPer == 2 || walk.threshold || !walk.right)
          Panels<Kind>::columns(big, N, high, wide, walk.threshold ? &mask : nullptr, panel);
        product<Kind, 1, 0>(scratch.left + i / kPer * padded, 0, padded, r, panel, kLine,
                            parts(wide, kLanes), parts(high, kPer), scratch.c + j * padded,
                            kPanelCols);
      }
    }
  }
  if (walk.right)
    copy_out(scratch.u, padded, rows, r, walk.u + (strip * walk.M + row0) * r, r);
  if (!walk.left) return;
  for (int64_t j = 0; j < cols; j += kPanelCols) {
    const int64_t wide = min(kPanelCols, cols - j), column = col0 + j;
    const float* c = scratch.c + j * padded;
    if (walk.c_by_rank) {
      copy_out(c, kPanelCols, r, wide, walk.c + chunk * r * N + column, N);
    } else {
      transpose_out(c, kPanelCols, r, wide, scratch.turned, padded);
      copy_out(scratch.turned, padded, wide, r, walk.c + (chunk * N + column) * r, r);
    }
  }
}

template <typename T, typename S, typename Kind>
void walk_units(const ColumnWalk& walk, int64_t begin, int64_t end, float* scratch) {
  for (int64_t unit = begin; unit < end; ++unit) walk_unit<T, S, Kind>(walk, unit, scratch);
}

}  // namespace

void column_walk(const ColumnWalk& walk, int64_t begin, int64_t end, float* scratch) {
  const bool wide_big = walk.big_dtype == Dtype::kFloat;
  const bool wide_small = walk.small_dtype == Dtype::kFloat;
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
  for (int64_t i = begin; i < end; i += kLanes) {
    Floats total = floats_at(sum.partials, i, end);
    for (int64_t part = 1; part < sum.count; ++part)
      total = total + floats_at(sum.partials + part * sum.size, i, end);
    store_at(sum.out, i, end, total);
  }
}

}  // namespace decomp_kernels::cpu::DK_LEVEL
