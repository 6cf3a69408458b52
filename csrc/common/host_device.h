// What is compiled for both sides: by a C++ compiler for the host, by nvcc for host and device.

#pragma once

#ifdef __CUDACC__
#define DK_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Never out of line: a copy that was compiled for one instruction set must not serve another.
#define DK_HOST_DEVICE inline __attribute__((always_inline))
#endif
