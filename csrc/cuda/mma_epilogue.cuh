// What follows the sums, in float32 and with one rounding at the store.
//
//     forward          z = sums + addend    y = out_scale * z + bias
//     input gradient   dX = sums    d_x = in_scale * dX    parts[row tile] = sum_m x * dX
//
// A warp's sums go through its own shared memory, sixteen rows at a time, so that a lane has eight
// columns beside each other: reads and stores of 16 bytes, and a lane's columns stay the same down
// the tile, so that their sums stay in registers.

#pragma once

#include "mma_mainloop.cuh"

namespace decomp_kernels::cuda {

// A row of staged sums: 8 modulo 32 banks, so that the fragments' stores never collide.
inline constexpr int kStagedRow = kWarpCols + 8;

template <typename T>
struct MmaRows {
  T* data;  // null: not there
  int64_t stride;
  bool chunks;
};

template <typename T>
struct MmaColumns {
  const void* data;  // null: not there
  bool wide;         // float32, or T

  __device__ __forceinline__ float at(int col) const {
    return wide ? static_cast<const float*>(data)[col] : to_float(static_cast<const T*>(data)[col]);
  }
  // Of the first count columns from col on; ``other`` where there is nothing.
  __device__ __forceinline__ void read(float (&out)[kChunk], int col, int count,
                                       float other) const {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) out[i] = data && i < count ? at(col + i) : other;
  }
};

template <typename T>
__device__ __forceinline__ void read_chunk(float (&out)[kChunk], const MmaRows<const T>& from,
                                           int row, int col, int count) {
  const T* source = from.data + int64_t(row) * from.stride + col;
  if (from.chunks && count == kChunk) {
    const uint4 bits = load_streaming_16(source);
    const uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < kChunk; ++i) out[i] = to_float(T{uint16_t(pairs[i / 2] >> (i % 2 * 16))});
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) out[i] = i < count ? to_float(source[i]) : 0.0f;
  }
}

template <typename T>
__device__ __forceinline__ void store_chunk(const MmaRows<T>& to, int row, int col, int count,
                                            const float (&values)[kChunk]) {
  T* target = to.data + int64_t(row) * to.stride + col;
  uint32_t pairs[kChunk / 2];
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i)
    pairs[i] = narrow_two<T>(values[2 * i], values[2 * i + 1]);
  if (to.chunks && count == kChunk) {
    *reinterpret_cast<uint4*>(target) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (i < count) target[i] = T{uint16_t(pairs[i / 2] >> (i % 2 * 16))};
  }
}

template <typename T>
struct ForwardEpilogue {
  MmaRows<const T> addend;
  MmaColumns<T> out_scale, bias;
  MmaRows<T> y, z;

  struct Columns {
    float scale[kChunk], bias[kChunk];
  };

  __device__ __forceinline__ void start(Columns& own, int col, int count) const {
    out_scale.read(own.scale, col, count, 1.0f);
    bias.read(own.bias, col, count, 0.0f);
  }

  __device__ __forceinline__ void finish(Columns& own, int row, int col, int count,
                                         float (&sums)[kChunk]) const {
    if (addend.data) {
      float added[kChunk];
      read_chunk(added, addend, row, col, count);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) sums[i] += added[i];
    }
    if (z.data) store_chunk(z, row, col, count, sums);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sums[i] = own.scale[i] * sums[i] + own.bias[i];
    store_chunk(y, row, col, count, sums);
  }

  template <typename Tile>
  __device__ __forceinline__ void end(Columns&, float*, Place, Place, int, int) const {}
};

template <typename T>
struct InputGradientEpilogue {
  MmaRows<const T> x;
  MmaColumns<T> in_scale;
  MmaRows<T> d_x;
  float* parts;  // [row tiles, cols]; null without d_in_scale

  struct Columns {
    float scale[kChunk], sums[kChunk];
  };

  __device__ __forceinline__ void start(Columns& own, int col, int count) const {
    in_scale.read(own.scale, col, count, 1.0f);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) own.sums[i] = 0.0f;
  }

  __device__ __forceinline__ void finish(Columns& own, int row, int col, int count,
                                         float (&sums)[kChunk]) const {
    if (parts) {
      float inputs[kChunk];
      read_chunk(inputs, x, row, col, count);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) own.sums[i] += inputs[i] * sums[i];
    }
    if (!d_x.data) return;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) sums[i] *= own.scale[i];
    store_chunk(d_x, row, col, count, sums);
  }

  // A row of parts for this row of tiles: lanes, then warps, each in a fixed order.
  template <typename Tile>
  __device__ __forceinline__ void end(Columns& own, float* columns, Place corner, Place warp,
                                      int row_tile, int cols) const {
    if (!parts) return;
    const int lane = int(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {  // lanes of the same columns are 8 apart
      own.sums[i] += __shfl_xor_sync(0xFFFFFFFFu, own.sums[i], 8);
      own.sums[i] += __shfl_xor_sync(0xFFFFFFFFu, own.sums[i], 16);
      if (lane < 8)
        columns[warp.row / Tile::kWarpRows * Tile::kCols + warp.col + lane * kChunk + i] =
            own.sums[i];
    }
    __syncthreads();
    for (int col = int(threadIdx.x); col < Tile::kCols; col += Tile::kThreads) {
      float sum = 0.0f;
#pragma unroll
      for (int down = 0; down < Tile::kWarpsDown; ++down) sum += columns[down * Tile::kCols + col];
      if (corner.col + col < cols) parts[int64_t(row_tile) * cols + corner.col + col] = sum;
    }
  }
};

// shared: the stages' memory, of which no step is left to come or to be read.
template <typename Tile, typename Epilogue>
__device__ __forceinline__ void finish_tile(const Sums<Tile>& sums, float* shared,
                                            const Epilogue& epilogue, Place corner, Place warp,
                                            int row_tile, int rows, int cols) {
  constexpr int kWarps = Tile::kThreads / 32, kStaged = 16 * kStagedRow;
  static_assert((kWarps * kStaged + Tile::kWarpsDown * Tile::kCols) * 4 <= Tile::kSharedBytes);
  const int lane = int(threadIdx.x) % 32;
  float* staged = shared + int(threadIdx.x) / 32 * kStaged;
  const Place own = sum_fragment(lane);
  const int first = lane % 8 * kChunk, col = corner.col + warp.col + first;
  const int count = min(kChunk, cols - col);
  typename Epilogue::Columns columns;
  epilogue.start(columns, col, count);
#pragma unroll
  for (int i = 0; i < Sums<Tile>::kDown; ++i) {
#pragma unroll
    for (int j = 0; j < Sums<Tile>::kAcross; ++j)
#pragma unroll
      for (int below = 0; below < 2; ++below)
        *reinterpret_cast<float2*>(staged + (own.row + 8 * below) * kStagedRow + j * 8 + own.col) =
            make_float2(sums.of[i][j][2 * below], sums.of[i][j][2 * below + 1]);
    __syncwarp();
#pragma unroll 1
    for (int down = lane / 8; down < 16; down += 4) {
      const float4* from = reinterpret_cast<const float4*>(staged + down * kStagedRow + first);
      const float4 low = from[0], high = from[1];
      float values[kChunk] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      const int row = corner.row + warp.row + i * 16 + down;
      if (row < rows && count > 0) epilogue.finish(columns, row, col, count, values);
    }
    __syncwarp();
  }
  epilogue.template end<Tile>(columns, shared + kWarps * kStaged, corner, warp, row_tile, cols);
}

}  // namespace decomp_kernels::cuda
