// t = drop(x) down^T / kept fraction    v = phi(t) * core * scale
//
// Panels of x, dropped and converted as they are copied to the level-1 cache, against ``down``
// transposed once a call, so that the rank is in the lanes.

#include "down_projection.h"

#include "panel.h"

namespace decomp_kernels::cpu::DK_LEVEL {
namespace {

template <typename T, typename S, typename Kind>
struct Project {
  static constexpr int kPer = Kind::kPer;

  static void pack(const DownProjection& args, int64_t part) {
    const int64_t first = part * kPanelCols, cols = min(kPanelCols, args.K - first);
    const int64_t padded = padded_rank(args.r);
    Panels<Kind>::transposed(static_cast<const S*>(args.down) + first, args.K, args.r, cols, padded,
                             args.packed + first / kPer * padded);
  }

  static void unit(const DownProjection& args, int64_t unit, float* t) {
    const int64_t K = args.K, padded = padded_rank(args.r);
    const int64_t row0 = unit * kProjectRows, rows = min(kProjectRows, args.M - row0);
    alignas(64) float panel[kPanelRows * kLine];
    PanelMask mask;
    clear(t, up_to(rows, kTileRows) * padded);
    for (int64_t j = 0; j < K; j += kPanelCols) {
      const int64_t cols = min(kPanelCols, K - j);
      for (int64_t i = 0; i < rows; i += kPanelRows) {
        const int64_t high = min(kPanelRows, rows - i);
        const T* x = static_cast<const T*>(args.x) + (row0 + i) * K + j;
        if (args.threshold) draw(args.seed, args.threshold, row0 + i, j, K, high, cols, &mask);
        Panels<Kind>::rows(x, K, high, cols, args.threshold ? &mask : nullptr, panel);
        product<Kind, kLine / kPer, 1>(panel, 0, high, args.packed + j / kPer * padded, padded,
                                       padded / kLanes, parts(cols, kPer), t + i * padded, padded);
      }
    }
    for (int64_t i = 0; i < rows; ++i) finish(args, row0 + i, t + i * padded);
  }

  // flatten: what it calls is compiled into it, for this level.
  __attribute__((flatten)) static void finish(const DownProjection& args, int64_t row, float* t) {
    const int64_t r = args.r;
    const float* core = args.core;
    S* const out = static_cast<S*>(args.t) + row * r;
    S* const v = static_cast<S*>(args.v);
    for (int64_t j = 0; j < r; j += kLanes) {
      Floats one = load(t + j) * set1(args.over_kept);
      store_at(out, j, r, one);
      if (!v) continue;
      if (args.activation != Activation::kIdentity) {
        float lanes[kLanes];
        store(lanes, one);
        for (int l = 0; l < kLanes; ++l) lanes[l] = activate(lanes[l], args.activation);
        one = load(lanes);
      }
      if (core) one = one * floats_at(core, j, r);
      store_at(v + row * r, j, r, one * set1(args.scale));
    }
  }
};

// f<Project<...>>() of the dtypes of the call.
template <typename F>
void with_dtypes(const DownProjection& args, const F& f) {
  const bool wide_x = args.x_dtype == Dtype::kFloat, wide_small = args.small_dtype == Dtype::kFloat;
  if (wide_x && wide_small) return f(Project<float, float, Singles>{});
  if (wide_x) return f(Project<float, bf16, Singles>{});
  if (wide_small) return f(Project<bf16, float, Singles>{});
#ifdef DK_PAIRS
  f(Project<bf16, bf16, Pairs>{});
#else
  f(Project<bf16, bf16, Singles>{});
#endif
}

}  // namespace

void down_projection_pack(const DownProjection& args, int64_t begin, int64_t end) {
  with_dtypes(args, [&](auto project) {
    for (int64_t part = begin; part < end; ++part) project.pack(args, part);
  });
}

void down_projection(const DownProjection& args, int64_t begin, int64_t end, float* scratch) {
  with_dtypes(args, [&](auto project) {
    for (int64_t unit = begin; unit < end; ++unit) project.unit(args, unit, aligned(scratch));
  });
}

}  // namespace decomp_kernels::cpu::DK_LEVEL
