// The kernels that widen quantised weights (interface and formulas: dequantize.h).
//
// A thread writes one 16-byte piece of out, from 2 to 8 bytes of codes.

#pragma once

#include "../common/quantized.h"
#include "dequantize.h"
#include "launch.cuh"
#include "tile.cuh"

namespace decomp_kernels::cuda {

inline constexpr int kWidenThreads = 256;

template <typename T>
struct Nf4Call {
  const uint8_t* packed;
  const float* absmax;
  int64_t count;
  int block_bits;  // log2 of the block size
  T* out;
  bool packed_aligned, out_aligned;
};

template <typename T>
struct Int8Call {
  const int8_t* codes;
  const float* absmax;
  int64_t N, pieces;  // of a row
  int K;
  T* out;
  bool codes_aligned, out_aligned;
};

// BYTES consecutive bytes, in one load where the place is a multiple of BYTES.
template <int BYTES>
struct alignas(BYTES) Bytes {
  uint8_t at[BYTES];
};

template <int BYTES>
__device__ __forceinline__ Bytes<BYTES> load_bytes(const void* from, int64_t first, int64_t end,
                                                   bool aligned) {
  const uint8_t* place = static_cast<const uint8_t*>(from) + first;
  if (aligned && first + BYTES <= end) return *reinterpret_cast<const Bytes<BYTES>*>(place);
  Bytes<BYTES> bytes{};
#pragma unroll
  for (int i = 0; i < BYTES; ++i)
    if (first + i < end) bytes.at[i] = place[i];
  return bytes;
}

template <typename T>
__global__ __launch_bounds__(kWidenThreads) void widen_nf4(Nf4Call<T> call) {
  constexpr int kSize = Vec<T>::kSize;
  __shared__ float levels[16];  // indexed by data: registers cannot be
  if (threadIdx.x < 16) levels[threadIdx.x] = nf4_level(int(threadIdx.x));
  __syncthreads();
  const int64_t first = (int64_t(blockIdx.x) * kWidenThreads + threadIdx.x) * kSize;
  if (first >= call.count) return;
  const auto bytes = load_bytes<kSize / 2>(call.packed, first / 2, (call.count + 1) / 2,
                                           call.packed_aligned);
  const float absmax = call.absmax[first >> call.block_bits];  // a piece lies in one block
  Vec<T> out;
#pragma unroll
  for (int j = 0; j < kSize; ++j)
    out.at[j] = from_float<T>(levels[nf4_code(bytes.at[j / 2], j % 2)] * absmax);
  store(call.out, int64_t(0), call.count, call.out_aligned, int64_t(0), first, out);
}

template <typename T>
__global__ __launch_bounds__(kWidenThreads) void widen_int8(Int8Call<T> call) {
  constexpr int kSize = Vec<T>::kSize;
  const int64_t piece = int64_t(blockIdx.x) * kWidenThreads + threadIdx.x;
  if (piece >= call.N * call.pieces) return;
  const int64_t row = piece / call.pieces, col = piece % call.pieces * kSize;
  const auto bytes = load_bytes<kSize>(call.codes + row * call.K, col, call.K, call.codes_aligned);
  const float absmax = call.absmax[row];
  Vec<T> out;
#pragma unroll
  for (int j = 0; j < kSize; ++j)
    out.at[j] = from_float<T>(int8_value(int8_t(bytes.at[j]), absmax));
  store(call.out, int64_t(call.K), int64_t(call.K), call.out_aligned, row, col, out);
}

}  // namespace decomp_kernels::cuda
