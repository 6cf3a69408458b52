// The kernel of the up expansion (interface and formula: up_expansion.h).
//
// A block owns a tile of out and walks the rank.  The sums go through shared memory, so that addend
// and out are read and written 16 bytes at a time and a mask word serves the four elements it is
// for.

#pragma once

#include "launch.cuh"
#include "product.cuh"
#include "up_expansion.h"

namespace decomp_kernels::cuda {

inline constexpr int kUpThreads = 256, kUpRows = 64, kUpCols = 128;

// A sum that is rounded to 16 bits takes float32 factors as two bf16 parts each: three of their
// four products carry all but 2^-16 of it.
template <typename T, typename S>
struct UpPairing {
  static constexpr bool kSplit = sizeof(T) == 2 && sizeof(S) == 4;
  using Element = std::conditional_t<kSplit, bf16, S>;
  static constexpr int kParts = kSplit ? 2 : 1;
};

template <typename T, typename S, int BR, bool IS_UP>
struct UpShared {
  using E = typename UpPairing<T, S>::Element;
  static constexpr int kParts = UpPairing<T, S>::kParts;
  static constexpr Layout kLayout = IS_UP ? Layout::kSummedLast : Layout::kSummedFirst;
  struct Operands {
    Operand<S, E, kUpRows, BR, kParts, 1> v;
    Operand<S, E, IS_UP ? kUpCols : BR, IS_UP ? BR : kUpCols, kParts, 1> small;
  };

  union {
    Operands factors;
    float sums[kUpRows][kUpCols + 4];
  };
};

template <typename T, typename S>
struct UpExpansionCall {
  View<S> v, small;
  View<T> addend;
  int64_t M;
  int C, R;
  Mask mask;
  Vector bias;
  T* out;
  bool out_aligned;
  int col_blocks;
};

template <typename T, typename S, int BR, bool IS_UP>
__global__ __launch_bounds__(kUpThreads) void up_expansion(UpExpansionCall<T, S> call) {
  using Shared = UpShared<T, S, BR, IS_UP>;
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  auto& [v, small] = shared.factors;
  const int64_t row0 = int64_t(blockIdx.x / call.col_blocks) * kUpRows;
  const int64_t col0 = int64_t(blockIdx.x % call.col_blocks) * kUpCols;
  const uint64_t seed = call.mask.seed ? uint64_t(*call.mask.seed) : 0;

  Sum<typename Shared::E, kUpRows, kUpCols, 4, 2> sum;
  sum.clear();
  const auto unchanged = [](int, int, Vec<S>&) {};
  for (int rank = 0; rank < call.R; rank += BR) {
    __syncthreads();  // the product of the step before has read the tiles
    v.template fetch<kUpThreads>(0, call.v, row0, rank);
    small.template fetch<kUpThreads>(0, call.small, IS_UP ? col0 : rank, IS_UP ? rank : col0);
    cp_async_commit();
    cp_async_wait<0>();
    v.template prepare<kUpThreads>(0, false, unchanged);
    small.template prepare<kUpThreads>(0, false, unchanged);
    __syncthreads();
    sum.template add<Layout::kSummedLast, Shared::kLayout>(v.tile(0), small.tile(0));
  }
  __syncthreads();  // the sums take the place of the factors
  sum.each([&](int i, int j, float value) { shared.sums[i][j] = value; });
  __syncthreads();
  each_piece<T, kUpRows, kUpCols, kUpThreads, 4>([&](int i, int j) {
    constexpr int kSize = Vec<T>::kSize;
    const int64_t row = row0 + i, col = col0 + j;
    if (row >= call.M || col >= call.C) return;
    Vec<float> sums[kSize / 4];
#pragma unroll
    for (int four = 0; four < kSize / 4; ++four) {
      sums[four] = *reinterpret_cast<const Vec<float>*>(&shared.sums[i][j + 4 * four]);
      if (call.mask.seed)
        drop(sums[four], seed, row * call.C + col + 4 * four, call.mask.threshold);
    }
    Vec<T> addend{};
    if (call.addend.data) addend = load(call.addend, row, col);
    Vec<T> out;
#pragma unroll
    for (int n = 0; n < kSize; ++n) {
      float value = sums[n / 4].at[n % 4];
      if (call.bias.data && col + n < call.C) value += read(call.bias, col + n);
      if (call.addend.data) value += to_float(addend.at[n]);
      out.at[n] = from_float<T>(value);
    }
    store(call.out, int64_t(call.C), int64_t(call.C), call.out_aligned, row, col, out);
  });
}

}  // namespace decomp_kernels::cuda
