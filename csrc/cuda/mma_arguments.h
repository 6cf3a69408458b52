// What the mma.sync forms of the decomposed linear take, and what they refuse.
//
//     forward          z = x W^T + v B^T + addend        y = out_scale * z + bias
//     input gradient   dX = g W + undrop(dt A)           d_x = in_scale * dX
//                                                        d_in_scale = sum_m x * dX
//
//     x, d_x [M, K]   W [N, K]   v, dt [M, r]   B = up [N, r]   A = down [r, K]   g, y, z [M, N]
//
// Scale and the kept fraction are the caller's to put into v and dt.  Matrices have one dtype, bf16
// or fp16, columns beside each other and any stride between rows; vectors may be float32.  Null is
// "not there"; an output overlaps nothing else.
// Definition: decomp_kernels/reference/decomposed_linear.py.

#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"
#include "mma_tiles.h"

namespace decomp_kernels::cuda {

struct MmaMatrix {
  const void* data = nullptr;
  int64_t stride = 0;  // elements from a row to the next
};

struct MmaOutput {
  void* data = nullptr;
  int64_t stride = 0;
};

struct MmaVector {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat;  // or the matrices' own
};

struct MmaForward {
  Dtype dtype = Dtype::kBFloat16;
  int64_t M = 0, N = 0, K = 0, r = 0;
  MmaMatrix x, weight, v, up, addend;
  MmaVector out_scale, bias;
  MmaOutput y, z;
};

struct MmaInputGradient {
  Dtype dtype = Dtype::kBFloat16;
  int64_t M = 0, N = 0, K = 0, r = 0;
  MmaMatrix g, weight, dt, down, x;
  MmaVector in_scale;
  const int64_t* seed = nullptr;   // on the device; null is no dropout
  uint32_t dropout_threshold = 0;  // round(p * 65536)
  MmaOutput d_x;
  float* d_in_scale = nullptr;  // [K]
};

namespace mma_checks {

inline constexpr int64_t kMost = 2147483647;

// Room for the last tile's overhang, in the int that indices inside the kernels are.
inline bool size_fits(int64_t size) { return size >= 0 && size <= kMost - 512; }

inline bool tiles_fit(int64_t rows, int64_t cols) {
  return tiles_over(rows, SmallTile::kRows) <= kMost / (1 + tiles_over(cols, SmallTile::kCols));
}

inline bool even(const void* data) { return reinterpret_cast<uintptr_t>(data) % 2 == 0; }

// A matrix that is there has rows that do not overlap.
inline bool whole(const void* data, int64_t stride, int64_t cols) {
  return !data || (even(data) && stride >= cols);
}

inline bool vector_fits(const MmaVector& v, Dtype own) {
  const uintptr_t bytes = v.dtype == Dtype::kFloat ? 4 : 2;
  const bool aligned = reinterpret_cast<uintptr_t>(v.data) % bytes == 0;
  return !v.data || (aligned && (v.dtype == Dtype::kFloat || v.dtype == own));
}

// What holds for both forms.  An empty tensor's address may well be null.
inline const char* why_not_sizes(Dtype dtype, int64_t M, int64_t N, int64_t K, int64_t r,
                                 int arch) {
  const bool sizes_fit = size_fits(M) && size_fits(N) && size_fits(K) && size_fits(r);
  if (arch < 80) return "mma.sync with cp.async needs sm_80 or later";
  if (dtype == Dtype::kFloat) return "the matrices must be bf16 or fp16";
  if (!sizes_fit) return "M, N, K and r must be 0 to 2147483135";
  if (!tiles_fit(M, N) || !tiles_fit(M, K)) return "more tiles than a grid has blocks";
  return nullptr;
}

}  // namespace mma_checks

// Why a launch would be refused, or null.  arch is 80 for sm_80.
inline const char* why_not(const MmaForward& a, int arch) {
  using namespace mma_checks;
  if (const char* why = why_not_sizes(a.dtype, a.M, a.N, a.K, a.r, arch)) return why;
  const bool empty = a.M == 0 || a.N == 0;
  const bool has_base = (a.x.data && a.weight.data) || a.K == 0, has_output = a.y.data;
  const bool has_pair = (a.v.data && a.up.data) || a.r == 0;
  const bool rows_are_whole =
      whole(a.x.data, a.x.stride, a.K) && whole(a.weight.data, a.weight.stride, a.K) &&
      whole(a.v.data, a.v.stride, a.r) && whole(a.up.data, a.up.stride, a.r) &&
      whole(a.addend.data, a.addend.stride, a.N) && whole(a.y.data, a.y.stride, a.N) &&
      whole(a.z.data, a.z.stride, a.N);
  const bool vectors_fit = vector_fits(a.out_scale, a.dtype) && vector_fits(a.bias, a.dtype);
  if (!empty && !has_base) return "x and weight must be there";
  if (!empty && !has_pair) return "r above 0 needs both v and up";
  if (!empty && !has_output) return "y must be there";
  if (!rows_are_whole) return "a row stride is less than its columns, or an address is odd";
  if (!vectors_fit) return "out_scale and bias must be float32 or the matrices' dtype, and aligned";
  return nullptr;
}

inline const char* why_not(const MmaInputGradient& a, int arch) {
  using namespace mma_checks;
  if (const char* why = why_not_sizes(a.dtype, a.M, a.N, a.K, a.r, arch)) return why;
  const bool empty = a.M == 0 || a.K == 0;
  const bool has_base = (a.g.data && a.weight.data) || a.N == 0;
  const bool has_pair = (a.dt.data && a.down.data) || a.r == 0;
  const bool has_output = a.d_x.data || a.d_in_scale;
  const bool rows_are_whole =
      whole(a.g.data, a.g.stride, a.N) && whole(a.weight.data, a.weight.stride, a.K) &&
      whole(a.dt.data, a.dt.stride, a.r) && whole(a.down.data, a.down.stride, a.K) &&
      whole(a.x.data, a.x.stride, a.K) && whole(a.d_x.data, a.d_x.stride, a.K);
  if (!empty && !has_base) return "g and weight must be there";
  if (!empty && !has_pair) return "r above 0 needs both dt and down";
  if (!empty && !has_output) return "d_x or d_in_scale must be there";
  if (!empty && a.d_in_scale && !a.x.data) return "d_in_scale needs x";
  if (a.dropout_threshold > 65535) return "the dropout threshold must be 0 to 65535";
  if (!rows_are_whole) return "a row stride is less than its columns, or an address is odd";
  if (!vector_fits(a.in_scale, a.dtype))
    return "in_scale must be float32 or the matrices' dtype, and aligned";
  return nullptr;
}

// One row of d_in_scale's parts for each row of the lowest tiles.
inline size_t workspace_bytes(const MmaInputGradient& a) {
  const bool needed = a.d_in_scale && a.M > 0;
  return needed ? size_t(tiles_over(a.M, SmallTile::kRows)) * size_t(a.K) * sizeof(float) : 0;
}

}  // namespace decomp_kernels::cuda
