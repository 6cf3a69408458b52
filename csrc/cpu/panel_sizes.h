// The sizes that the walks over a large matrix share, the same at every level: they say how the work
// is divided, and so in which order partial sums are added.

#pragma once

#include <cstdint>

namespace decomp_kernels::cpu {

inline constexpr int64_t kPanelRows = 32, kPanelCols = 128;  // 16 KiB as floats: half of a level-1 cache
inline constexpr int64_t kRankAlign = 16;                    // the lanes of the widest level

constexpr int64_t padded_rank(int64_t r) { return (r + kRankAlign - 1) / kRankAlign * kRankAlign; }
constexpr int64_t parts(int64_t n, int64_t part) { return (n + part - 1) / part; }

}  // namespace decomp_kernels::cpu
