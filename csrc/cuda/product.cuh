// Sums of products of two tiles in shared memory, in float32:  sum[i, j] += sum_s a[i, s] b[j, s]
//
// On the tensor cores for bf16 and fp16, where every product is exact; a float32 operand beside a
// bf16 one comes as three bf16 parts, which hold its 24 bits (two parts: 16 bits, for a result that
// is rounded to 16 bits itself).  On the ordinary float32 units for everything else.
//
// The tensor cores cut the bits that a running sum cannot hold instead of rounding, which adds up
// along a long sum.  So each tile is summed from zero, the low parts first, and that sum is added to
// the running one by an ordinary addition.

#pragma once

#include "../common/narrow.h"
#include "intrinsics.cuh"
#include "tile.cuh"
#include "warp.cuh"

namespace decomp_kernels::cuda {

// How a tile lies in shared memory: [index][summed] or [summed][index].
enum class Layout { kSummedLast, kSummedFirst };

// [I, J], spread over WARPS_I x WARPS_J warps; warps beyond those hold nothing.
template <typename E, int I, int J, int WARPS_I, int WARPS_J>
struct Sum {
  static constexpr int kI = I / WARPS_I, kJ = J / WARPS_J;  // of one warp
  static constexpr int kTilesI = kI / 16, kTilesJ = kJ / 8;
  static_assert(kI % 16 == 0 && kJ % 8 == 0 && (kJ == 8 || kJ % 16 == 0));

  struct Fragments {
    float at[kTilesI][kTilesJ][4];
  };
  Fragments sum;

  __device__ __forceinline__ void clear() { sum = Fragments{}; }

  template <Layout A, Layout B, int ROWS_A, int COLS_A, int PARTS_A, int ROWS_B, int COLS_B,
            int PARTS_B>
  __device__ __forceinline__ void add(const Tile<E, ROWS_A, COLS_A, PARTS_A>& a,
                                      const Tile<E, ROWS_B, COLS_B, PARTS_B>& b) {
    constexpr int kSummed = A == Layout::kSummedLast ? COLS_A : ROWS_A;
    static_assert(kSummed == (B == Layout::kSummedLast ? COLS_B : ROWS_B) && kSummed % 16 == 0);
    if (warp_id() >= WARPS_I * WARPS_J) return;
    Fragments fresh{};
    constexpr int kParts = PARTS_A > PARTS_B ? PARTS_A : PARTS_B;
#pragma unroll
    for (int both = kParts - 1; both >= 0; --both)
#pragma unroll
      for (int p = 0; p < PARTS_A; ++p)
        if (both - p >= 0 && both - p < PARTS_B)
          add_parts<A, B, kSummed>(fresh, a.at[p], b.at[both - p]);
#pragma unroll
    for (int i = 0; i < kTilesI; ++i)
#pragma unroll
      for (int j = 0; j < kTilesJ; ++j)
#pragma unroll
        for (int n = 0; n < 4; ++n) sum.at[i][j][n] += fresh.at[i][j][n];
  }

  // f(i, j, value) of every element that this thread holds.
  template <typename F>
  __device__ __forceinline__ void each(F f) const {
    if (warp_id() >= WARPS_I * WARPS_J) return;
    const int row = warp_id() / WARPS_J * kI + lane_id() / 4;
    const int col = warp_id() % WARPS_J * kJ + lane_id() % 4 * 2;
#pragma unroll
    for (int i = 0; i < kTilesI; ++i)
#pragma unroll
      for (int j = 0; j < kTilesJ; ++j)
#pragma unroll
        for (int n = 0; n < 4; ++n)
          f(row + i * 16 + n / 2 * 8, col + j * 8 + n % 2, sum.at[i][j][n]);
  }

 private:
  template <Layout A, Layout B, int SUMMED, int PITCH_A, int PITCH_B>
  static __device__ __forceinline__ void add_parts(Fragments& to, const E (*a)[PITCH_A],
                                                   const E (*b)[PITCH_B]) {
    const int first_i = warp_id() / WARPS_J * kI, first_j = warp_id() % WARPS_J * kJ;
    const int which = lane_id() / 8, line = lane_id() % 8;  // of four matrices, and of their rows
#pragma unroll 4
    for (int s = 0; s < SUMMED; s += 16) {
      uint32_t left[kTilesI][4];
#pragma unroll
      for (int i = 0; i < kTilesI; ++i) {
        const int at_i = first_i + 16 * i;
        if constexpr (A == Layout::kSummedLast)
          ldmatrix_x4(left[i], &a[at_i + which % 2 * 8 + line][s + which / 2 * 8]);
        else
          ldmatrix_x4_trans(left[i], &a[s + which / 2 * 8 + line][at_i + which % 2 * 8]);
      }
#pragma unroll
      for (int j = 0; j < kTilesJ; j += 2) {
        // The second two of the four matrices are the next eight j; a lone tile reads its own
        // twice.
        const int at_j = first_j + 8 * j + (kTilesJ > 1 ? which / 2 * 8 : 0);
        uint32_t right[4];
        if constexpr (B == Layout::kSummedLast)
          ldmatrix_x4(right, &b[at_j + line][s + which % 2 * 8]);
        else
          ldmatrix_x4_trans(right, &b[s + which % 2 * 8 + line][at_j]);
#pragma unroll
        for (int i = 0; i < kTilesI; ++i) {
          mma_m16n8k16<E>(to.at[i][j], left[i], right[0], right[1]);
          if constexpr (kTilesJ > 1) mma_m16n8k16<E>(to.at[i][j + 1], left[i], right[2], right[3]);
        }
      }
    }
  }
};

// float32: a lane holds every eighth row and every fourth column of its warp's part.
template <int I, int J, int WARPS_I, int WARPS_J>
struct Sum<float, I, J, WARPS_I, WARPS_J> {
  static constexpr int kI = I / WARPS_I, kJ = J / WARPS_J;
  static constexpr int kEachI = kI / 8, kEachJ = kJ / 4;
  static_assert(kI % 8 == 0 && kJ % 4 == 0);

  float sum[kEachI][kEachJ];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kEachI; ++i)
#pragma unroll
      for (int j = 0; j < kEachJ; ++j) sum[i][j] = 0.0f;
  }

  template <Layout A, Layout B, int ROWS_A, int COLS_A, int ROWS_B, int COLS_B>
  __device__ __forceinline__ void add(const Tile<float, ROWS_A, COLS_A>& a,
                                      const Tile<float, ROWS_B, COLS_B>& b) {
    constexpr int kSummed = A == Layout::kSummedLast ? COLS_A : ROWS_A;
    static_assert(kSummed == (B == Layout::kSummedLast ? COLS_B : ROWS_B));
    if (warp_id() >= WARPS_I * WARPS_J) return;
#pragma unroll 4
    for (int s = 0; s < kSummed; ++s) {
      float left[kEachI], right[kEachJ];
#pragma unroll
      for (int i = 0; i < kEachI; ++i)
        left[i] = A == Layout::kSummedLast ? a.at[0][row(i)][s] : a.at[0][s][row(i)];
#pragma unroll
      for (int j = 0; j < kEachJ; ++j)
        right[j] = B == Layout::kSummedLast ? b.at[0][col(j)][s] : b.at[0][s][col(j)];
#pragma unroll
      for (int i = 0; i < kEachI; ++i)
#pragma unroll
        for (int j = 0; j < kEachJ; ++j) sum[i][j] += left[i] * right[j];
    }
  }

  template <typename F>
  __device__ __forceinline__ void each(F f) const {
    if (warp_id() >= WARPS_I * WARPS_J) return;
#pragma unroll
    for (int i = 0; i < kEachI; ++i)
#pragma unroll
      for (int j = 0; j < kEachJ; ++j) f(row(i), col(j), sum[i][j]);
  }

 private:
  static __device__ __forceinline__ int row(int i) {
    return warp_id() / WARPS_J * kI + i * 8 + lane_id() / 4;
  }
  static __device__ __forceinline__ int col(int j) {
    return warp_id() % WARPS_J * kJ + j * 4 + lane_id() % 4;
  }
};

// What tiles hold where the large operand is T and the small one S, and in how many parts.
template <typename T, typename S>
struct Pairing {
  using Element = float;
  static constexpr int kParts = 1;
};
template <>
struct Pairing<bf16, bf16> {
  using Element = bf16;
  static constexpr int kParts = 1;
};
template <>
struct Pairing<fp16, fp16> {
  using Element = fp16;
  static constexpr int kParts = 1;
};
// fp16 has no such entry: bf16's parts do not hold its 11 bits, and fp16's leave float32's range.
template <>
struct Pairing<bf16, float> {
  using Element = bf16;
  static constexpr int kParts = 3;
};

}  // namespace decomp_kernels::cuda
