// The instructions that CUDA C++ has no name for: asynchronous copies, matrix fragments, mma.sync.
//
//     cp_async_16        16 bytes from global to shared memory, zeros after the first ``bytes``
//     ldmatrix_x4        four 8 x 8 matrices of 16-bit elements from shared memory
//     mma_m16n8k16       d [16, 8] += a [16, 16] b [16, 8], float32 sums of bf16 or fp16 products
//
// sm_80 and later.  The one file with inline PTX; on the host tests/native/cuda_on_host.h defines
// the same functions.

#pragma once

#include <cstdint>

#include "narrow.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

namespace decomp_kernels::cuda {

// This block's dynamic shared memory.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[];
  return dynamic_shared_bytes;
}

__device__ __forceinline__ uint32_t shared_address(const void* place) {
  return uint32_t(__cvta_generic_to_shared(place));
}

// ``global`` is not read where bytes is 0 but must be a pointer all the same; 16-byte aligned both.
// .cg: through L2 alone, since a tile is read once by each block.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until at most ``pending`` of this thread's newest groups are under way.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Lane 8 i + j gives the address of row j of matrix i.  With g = lane / 4 and t = lane % 4, r[i] is
// columns 2t and 2t + 1 of row g of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the transposed matrices: r[i] is rows 2t and 2t + 1 of column g.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// a: (g, 2t) (g + 8, 2t) (g, 2t + 8) (g + 8, 2t + 8), each with the next column
// b: (2t, g) (2t + 8, g), each with the next row
// d: (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1)
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4],
                                                   uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<fp16>(float (&d)[4], const uint32_t (&a)[4],
                                                   uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// low and high rounded to T, low in the lower 16 bits.
template <typename T>
__device__ __forceinline__ uint32_t narrow_two(float low, float high);

template <>
__device__ __forceinline__ uint32_t narrow_two<bf16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <>
__device__ __forceinline__ uint32_t narrow_two<fp16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// 16 bytes that no thread of this grid writes, and that displace nothing in L1; 16-byte aligned.
__device__ __forceinline__ uint4 load_streaming_16(const void* global) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(__cvta_generic_to_global(global)));
  return value;
}

// 16 bytes that nothing reads again soon.
__device__ __forceinline__ void store_streaming_16(void* global, uint4 value) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(global)), "r"(value.x), "r"(value.y), "r"(value.z),
                 "r"(value.w)
               : "memory");
}

}  // namespace decomp_kernels::cuda

#elif !defined(CUDA_ON_HOST)
#error "compile with nvcc, or with -include tests/native/cuda_on_host.h"
#endif
