// CUDA on the host: a kernel's own source, compiled by a C++ compiler and run thread by thread.
//
//     g++ -std=c++20 -ffp-contract=off -fno-gnu-unique -include cuda_on_host.h ...    (emulator.py)
//
//     cuda_on_host::Memory memory;
//     const float* x = memory.input(host_x, n);
//     float* y = memory.output(host_y, n);
//     cuda_on_host::launch({.grid = {blocks}, .block = {256}}, [&] { kernel(x, y, n); });
//     return memory.finish();                     // nullptr, or what went wrong as text
//
// Every thread of a block is a fiber of one thread of the host; the blocks run one after another,
// in an order that the launch's seed shuffles, as it does the order of a block's warps between
// barriers.  What is an error here:
//
//     a barrier or a warp's collective that not every thread reaches          emulator_fibers.h
//     an access outside an array, a store to an input, a division by zero     emulator_memory.h
//     a misaligned cp.async, ldmatrix or vector load                          emulator_copies.h
//     a race, where the kernels are compiled with -fsanitize=thread           emulator_races.h
//
// and what shows as NaN in the results: shared memory that nothing wrote, the target of a cp.async
// before its wait, an output's element that nothing stored.
//
// Not modelled: time, caches, the order of sums inside a tensor core.  A library is one .cpp file;
// -fno-gnu-unique keeps the shared arrays of several libraries in a process apart.
// A static __shared__ array's bounds are checked under -fsanitize=bounds
// -fsanitize-undefined-trap-on-error; all other arrays' always.

#pragma once

#define CUDA_ON_HOST 1

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

// The language.  __noinline__ is left out: libstdc++ itself writes it inside attributes.
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
// A block's static shared memory is the thread-local storage of the one thread that runs it all, in
// this library alone: the one kind of variable whose place and extent the system knows.
#define __shared__ thread_local

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct uint3 {
  unsigned x, y, z;
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <typename T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(unsigned(bits)) : 32; }

template <typename To, typename From>
inline To __bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float x) { return __bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return __bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return __bits_as<float>(x); }
inline float __int_as_float(int x) { return __bits_as<float>(x); }

template <typename T>
inline T __ldg(const T* place) {
  return *place;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

#include "emulator_fibers.h"
#include "emulator_memory.h"
#include "emulator_warp.h"
// What csrc/cuda/intrinsics.cuh spells in PTX.
#include "emulator_copies.h"
#include "emulator_tensor_cores.h"
