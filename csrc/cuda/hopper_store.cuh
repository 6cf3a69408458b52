// From a warpgroup's accumulator [64, cols] to memory, in chunks of 64 columns:
// float32 arithmetic in registers, one rounding, swizzled shared memory, a box of the copy engine.
//
// The copy engine drops what lies beyond D's extents, so edges need no masks here.
// Which register is which element, and all arithmetic, is hopper_epilogue.h's.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cutlass/arch/barrier.h>

#include "../common/hopper_epilogue.h"

namespace decomp_kernels::cuda {

// Two neighbours rounded to T, the first in the low half.
template <typename T>
CUTLASS_DEVICE uint32_t packed(Pair pair) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(pair.a, pair.b);
    memcpy(&bits, &both, sizeof bits);
  } else {
    const __half2 both = __floats2half2_rn(pair.a, pair.b);
    memcpy(&bits, &both, sizeof bits);
  }
  return bits;
}

template <typename T, HopperTile tile>
struct Store {
  using Element = T;
  using Staged = uint16_t[tile.buffers()][tile.buffer_elements()];

  Staged& staged;
  int thread;    // of the warpgroup
  int consumer;  // the warpgroup
  int next = 0;  // the buffer to fill next

  CUTLASS_DEVICE void sync() const { cutlass::arch::NamedBarrier::sync(128, consumer); }

  // Waits until a buffer may be filled.
  CUTLASS_DEVICE void acquire() {
    if (thread == 0) cute::tma_store_wait<tile.buffers() - 1>();
    sync();
  }

  // The chunk's pairs to ``map`` at (row, col).  Between an acquire() and release_to().
  CUTLASS_DEVICE void fill(const uint32_t (&pairs)[kChunkRegisters / 2]) {
    CUTLASS_PRAGMA_UNROLL
    for (int store = 0; store < kChunkStores; ++store) {
      uint16_t* place = staged[next] + store_row_offset(thread, store);
      cute::SM90_U32x4_STSM_N::copy(
          pairs[4 * store], pairs[4 * store + 1], pairs[4 * store + 2], pairs[4 * store + 3],
          *reinterpret_cast<cute::uint128_t*>(place));
    }
  }

  CUTLASS_DEVICE void release_to(const CUtensorMap& map, int row, int col) {
    cute::tma_store_fence();  // the copy engine shall see what this thread wrote
    sync();
    if (thread == 0) {
      cute::SM90_TMA_STORE_2D::copy(&map, staged[next], col, row);
      cute::tma_store_arrive();
    }
    next = next + 1 == tile.buffers() ? 0 : next + 1;
  }

  // Shared memory must outlive its reads.
  CUTLASS_DEVICE void finish() const {
    if (thread == 0) cute::tma_store_wait<0>();
  }
};

// y, and z where it is kept, of one tile's rows first_row to first_row + 63.
template <typename T, HopperTile tile, class Accumulator>
CUTLASS_DEVICE void store_forward(
    Store<T, tile>& store, const ForwardEnd& end, const CUtensorMap& y_map,
    const CUtensorMap& z_map, const Accumulator& acc, int first_row, int first_col) {
  CUTLASS_PRAGMA_UNROLL
  for (int chunk = 0; chunk < tile.cols / kChunkCols; ++chunk) {
    const int chunk_col = first_col + chunk * kChunkCols;
    if (first_row >= end.rows || chunk_col >= end.cols) return;
    uint32_t z[kChunkRegisters / 2], y[kChunkRegisters / 2];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kChunkRegisters; i += 2) {
      const Element e = accumulator_element(store.thread, i);
      const int at = chunk * kChunkRegisters + i, row = first_row + e.row, col = chunk_col + e.col;
      const Pair sum = end.z<T>({acc(at), acc(at + 1)}, row, col);
      z[i / 2] = packed<T>(sum);
      y[i / 2] = packed<T>(end.y(sum, col));
    }
    if (end.keep_z) {
      store.acquire();
      store.fill(z);
      store.release_to(z_map, first_row, chunk_col);
    }
    store.acquire();
    store.fill(y);
    store.release_to(y_map, first_row, chunk_col);
  }
}

// d_x where it is kept, and a row of partial sums of d_in_scale where they are wanted.
template <typename T, HopperTile tile, class Accumulator>
CUTLASS_DEVICE void store_gradient(
    Store<T, tile>& store, const GradientEnd& end, const CUtensorMap& d_x_map,
    float (&warp_sums)[4][kChunkCols], const Accumulator& acc, int first_row, int first_col) {
  const int lane = store.thread % 32, warp = store.thread / 32;
  CUTLASS_PRAGMA_UNROLL
  for (int chunk = 0; chunk < tile.cols / kChunkCols; ++chunk) {
    const int chunk_col = first_col + chunk * kChunkCols;
    if (first_row >= end.rows || chunk_col >= end.cols) return;
    store.acquire();
    if (end.sums != nullptr) {
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kChunkRegisters; i += 4) {  // two rows of two columns
        const int at = chunk * kChunkRegisters + i;
        const Element e = accumulator_element(store.thread, i);
        const int row = first_row + e.row, col = chunk_col + e.col;
        const Pair upper = end.term<T>({acc(at), acc(at + 1)}, row, col);
        const Pair lower = end.term<T>({acc(at + 2), acc(at + 3)}, row + 8, col);
        Pair sum{upper.a + lower.a, upper.b + lower.b};
        CUTLASS_PRAGMA_UNROLL
        for (int other = 4; other < 32; other *= 2) {  // lanes of the same columns
          sum.a += __shfl_xor_sync(0xFFFFFFFFu, sum.a, other);
          sum.b += __shfl_xor_sync(0xFFFFFFFFu, sum.b, other);
        }
        if (lane < 4) {
          warp_sums[warp][e.col] = sum.a;
          warp_sums[warp][e.col + 1] = sum.b;
        }
      }
    }
    if (end.keep_d_x) {
      uint32_t d_x[kChunkRegisters / 2];
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kChunkRegisters; i += 2) {
        const int at = chunk * kChunkRegisters + i;
        const Element e = accumulator_element(store.thread, i);
        d_x[i / 2] = packed<T>(end.d_x({acc(at), acc(at + 1)}, chunk_col + e.col));
      }
      store.fill(d_x);
      store.release_to(d_x_map, first_row, chunk_col);
    } else {
      store.sync();  // warp_sums is whole
    }
    // The next chunk's acquire() comes after these reads in every thread.
    const int col = chunk_col + store.thread;
    if (end.sums != nullptr && store.thread < kChunkCols && col < end.cols) {
      float sum = 0.0f;
      CUTLASS_PRAGMA_UNROLL
      for (int w = 0; w < 4; ++w) sum += warp_sums[w][store.thread];
      end.sums[int64_t(partial_row(first_row)) * end.cols + col] = sum;
    }
  }
}

}  // namespace decomp_kernels::cuda
