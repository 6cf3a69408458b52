// Tiles of row-major matrices on their way from global memory to the products of product.cuh.
//
//     Tile<E, ROWS, COLS, PARTS>            a tile in shared memory
//     Operand<S, E, ROWS, COLS, PARTS, STAGES>   a ring of tiles of S that cp.async fills, and
//                                           the tile of E that is made of the present one
//
// cp.async keeps many bytes under way without registers.  A thread may use the pieces that it
// copied itself as soon as its own wait is over, so masks, scales and conversions cost no barrier:
// the one that every product needs comes after them.

#pragma once

#include <type_traits>

#include "../common/mask.h"
#include "../common/narrow.h"
#include "arguments.h"
#include "intrinsics.cuh"

namespace decomp_kernels::cuda {

template <typename A, typename B>
inline constexpr bool kSame = false;
template <typename A>
inline constexpr bool kSame<A, A> = true;

template <typename T>
struct alignas(16) Vec {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

// [rows, cols] in global memory.  aligned: every row begins at a multiple of 16 bytes.
template <typename T>
struct View {
  const T* data;
  int64_t stride;
  int64_t rows;
  int cols;
  bool aligned;
};

template <typename T>
View<T> view(const Matrix& of, int64_t rows, int64_t cols) {
  const bool aligned =
      reinterpret_cast<uintptr_t>(of.data) % 16 == 0 && of.stride * int64_t(sizeof(T)) % 16 == 0;
  return {static_cast<const T*>(of.data), of.stride, rows, int(cols), aligned};
}

// Columns col to col + kSize - 1 of one row; zeros outside the matrix.
template <typename T>
__device__ __forceinline__ Vec<T> load(const View<T>& from, int64_t row, int64_t col) {
  constexpr int kSize = Vec<T>::kSize;
  Vec<T> vec{};
  if (row >= from.rows) return vec;
  const T* place = from.data + row * from.stride + col;
  if (from.aligned && col + kSize <= from.cols) return *reinterpret_cast<const Vec<T>*>(place);
#pragma unroll
  for (int j = 0; j < kSize; ++j)
    if (col + j < from.cols) vec.at[j] = place[j];
  return vec;
}

// The same places of an array [rows, cols] that may be written.
template <typename T>
__device__ __forceinline__ void store(T* data, int64_t stride, int64_t cols, bool aligned,
                                      int64_t row, int64_t col, const Vec<T>& vec) {
  constexpr int kSize = Vec<T>::kSize;
  T* place = data + row * stride + col;
  if (aligned && col + kSize <= cols) {
    *reinterpret_cast<Vec<T>*>(place) = vec;
    return;
  }
#pragma unroll
  for (int j = 0; j < kSize; ++j)
    if (col + j < cols) place[j] = vec.at[j];
}

// PARTS: a float32 element as that many bf16 ones, high first, which hold 8 bits of it each.
//
// Rows are padded by 16 bytes, so that eight of them at one column lie in different banks.
template <typename E, int ROWS, int COLS, int PARTS = 1>
struct Tile {
  using Element = E;
  static constexpr int kRows = ROWS, kCols = COLS, kParts = PARTS;
  static constexpr int kPitch = COLS + 16 / int(sizeof(E));

  alignas(16) E at[PARTS][ROWS][kPitch];
};

// f(row, col) of every 16-byte piece of a tile [ROWS, COLS] of T that is this thread's own.
// UNROLL: more where f waits for global memory; registers are what it costs.
template <typename T, int ROWS, int COLS, int THREADS, int UNROLL = 1, typename F>
__device__ __forceinline__ void each_piece(F f) {
  constexpr int kWidth = Vec<T>::kSize, kPerRow = COLS / kWidth, kPieces = ROWS * kPerRow;
  static_assert(COLS % kWidth == 0);
#pragma unroll UNROLL
  for (int first = 0; first < kPieces; first += THREADS) {
    const int piece = first + int(threadIdx.x);
    if (kPieces % THREADS == 0 || piece < kPieces) f(piece / kPerRow, piece % kPerRow * kWidth);
  }
}

// One piece of a row to its place in a tile, converted.
template <typename T, typename E, int ROWS, int COLS, int PARTS>
__device__ __forceinline__ void put(Tile<E, ROWS, COLS, PARTS>& tile, int row, int col,
                                    const Vec<T>& vec) {
  if constexpr (kSame<T, E> && sizeof(E) == 2) {
    *reinterpret_cast<Vec<T>*>(&tile.at[0][row][col]) = vec;
  } else if constexpr (kSame<E, float>) {
#pragma unroll
    for (int j = 0; j < Vec<T>::kSize; ++j) tile.at[0][row][col + j] = to_float(vec.at[j]);
  } else {
    static_assert(kSame<T, float> && kSame<E, bf16> && PARTS > 1);
    struct alignas(8) Four {
      bf16 at[4];
    };
    Four part[PARTS];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float rest = vec.at[j];
#pragma unroll
      for (int p = 0; p < PARTS; ++p) {
        part[p].at[j] = from_float<bf16>(rest);
        rest -= to_float(part[p].at[j]);
      }
    }
#pragma unroll
    for (int p = 0; p < PARTS; ++p) *reinterpret_cast<Four*>(&tile.at[p][row][col]) = part[p];
  }
}

template <typename S, typename E, int ROWS, int COLS, int PARTS, int STAGES>
struct Operand {
  static constexpr bool kAsItIs = kSame<S, E>;
  static_assert(!kAsItIs || PARTS == 1);
  struct Nothing {};

  Tile<S, ROWS, COLS> ring[STAGES];
  std::conditional_t<kAsItIs, Nothing, Tile<E, ROWS, COLS, PARTS>> converted;

  // Starts the copy of a tile, zeros outside the matrix; the caller commits.
  template <int THREADS>
  __device__ __forceinline__ void fetch(int stage, const View<S>& from, int64_t row0,
                                        int64_t col0) {
    each_piece<S, ROWS, COLS, THREADS>([&](int row, int col) {
      S* to = &ring[stage].at[0][row][col];
      if (!from.aligned) {
        *reinterpret_cast<Vec<S>*>(to) = load(from, row0 + row, col0 + col);
        return;
      }
      const int64_t left = row0 + row < from.rows ? from.cols - (col0 + col) : 0;
      const int count = left <= 0 ? 0 : left < Vec<S>::kSize ? int(left) : Vec<S>::kSize;
      const S* place = from.data + (count ? (row0 + row) * from.stride + col0 + col : 0);
      cp_async_16(to, place, count * int(sizeof(S)));
    });
  }

  // This thread's pieces, through f(row, col, vec) where ``changed``, to where the product reads.
  template <int THREADS, typename F>
  __device__ __forceinline__ void prepare(int stage, bool changed, F f) {
    if (kAsItIs && !changed) return;
    each_piece<S, ROWS, COLS, THREADS>([&](int row, int col) {
      Vec<S>& place = *reinterpret_cast<Vec<S>*>(&ring[stage].at[0][row][col]);
      Vec<S> vec = place;
      if (changed) f(row, col, vec);
      if constexpr (kAsItIs)
        place = vec;
      else
        put(converted, row, col, vec);
    });
  }

  __device__ __forceinline__ const Tile<E, ROWS, COLS, PARTS>& tile(int stage) const {
    if constexpr (kAsItIs)
      return ring[stage];
    else
      return converted;
  }
};

// Zeros where the mask drops; ``first`` is the element number of vec.at[0].
template <typename T>
__device__ __forceinline__ void drop(Vec<T>& vec, uint64_t seed, int64_t first,
                                     uint32_t threshold) {
#pragma unroll
  for (int four = 0; four < Vec<T>::kSize; four += 4) {
    const uint32_t kept = kept_four(seed, uint64_t(first + four), threshold);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (!(kept >> j & 1)) vec.at[four + j] = T{};
  }
}

__device__ __forceinline__ float read(const Vector& vector, int64_t i) {
  switch (vector.dtype) {
    case Dtype::kBFloat16: return to_float(static_cast<const bf16*>(vector.data)[i]);
    case Dtype::kHalf: return to_float(static_cast<const fp16*>(vector.data)[i]);
    default: return static_cast<const float*>(vector.data)[i];
  }
}

// Stores ``value`` rounded to the output's type and returns what it was rounded to.
__device__ __forceinline__ float write(const Output& output, int64_t i, float value) {
  switch (output.dtype) {
    case Dtype::kBFloat16: {
      const bf16 rounded = from_float<bf16>(value);
      if (output.data) static_cast<bf16*>(output.data)[i] = rounded;
      return to_float(rounded);
    }
    case Dtype::kHalf: {
      const fp16 rounded = from_float<fp16>(value);
      if (output.data) static_cast<fp16*>(output.data)[i] = rounded;
      return to_float(rounded);
    }
    default:
      if (output.data) static_cast<float*>(output.data)[i] = value;
      return value;
  }
}

}  // namespace decomp_kernels::cuda
