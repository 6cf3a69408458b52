// Kernels that show what tests/native/cuda_on_host.h finds, each with a bug that a number plants.
//
//     saxpy          y = a x + y             reduce       sums[block] = sum of the block's x
//     tile_product   d = a b of one 16 x 8 tile, through cp.async and ldmatrix
//     mirror         y = x backwards in each block; mirror_warp: y = 2 x
//
// Bugs: 0 none; the others are named where they are.

#include "intrinsics.cuh"

namespace decomp_kernels::cuda {
namespace {

__global__ void saxpy_kernel(float a, const float* x, float* y, int n, int bug) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (bug == 1 ? i <= n : i < n) y[i] = a * x[bug == 2 ? i + 1 : i] + y[i];
  if (bug == 3 && i == 0) const_cast<float*>(x)[0] = 1.0f;
  if (bug == 4) y[0] = reinterpret_cast<const float4*>(x + 1)->x;
  if (bug == 5 && i == 0) y[0] = float(n / (bug - 5));
}

__global__ __launch_bounds__(128) void reduce_kernel(const float* x, float* sums, int n, int bug) {
  __shared__ float parts[4];
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  float sum = 0.0f;
  for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += int(gridDim.x * blockDim.x))
    sum += x[i];
  if (bug == 1 && lane == 31) return;  // a lane that the shuffles' mask names
  if (bug == 6 && lane < 16) __syncthreads();  // while the others wait for them in the shuffle
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
  if (bug == 2 && warp == 1) return;  // the barrier lacks a warp
  if (lane == 0) parts[bug == 3 ? warp + 1 : warp] = sum;
  if (bug == 5 && warp % 2)
    __syncthreads();  // another barrier than the other warps'
  else if (bug != 4)
    __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0.0f;
    for (float part : parts) sum += part;
    sums[blockIdx.x] = sum;
  }
}

// a: [16, 16]   b: [8, 16], transposed by its fragments   b_rows: [16, 8], read by ldmatrix.trans
template <typename T>
__global__ void tile_kernel(const T* a, const T* b, const T* b_rows, float* d, float* d_rows,
                            int bug) {
  T* shared = reinterpret_cast<T*>(dynamic_shared());
  T *s_a = shared, *s_b = s_a + 16 * 16, *s_rows = s_b + 8 * 16;
  const int lane = int(threadIdx.x);
  cp_async_16(s_a + 8 * lane, a + 8 * lane);
  const bool half = lane < 16;
  cp_async_16(half ? s_b + 8 * lane : s_rows + 8 * (lane - 16),
              half ? b + 8 * lane : b_rows + 8 * (lane - 16));
  cp_async_commit();
  if (bug != 1) cp_async_wait<0>();
  __syncthreads();
  uint32_t ra[4], rb[4], rt[4];
  ldmatrix_x4(ra, s_a + lane % 16 * 16 + lane / 16 * 8);
  // Matrices 0 and 1 are the two halves of k; 2 and 3 are not looked at.
  ldmatrix_x4(rb, s_b + lane % 8 * 16 + (bug == 2 ? 1 : lane / 8 % 2) * 8);
  ldmatrix_x4_trans(rt, s_rows + lane % 16 * 8);
  float c[4] = {}, c_rows[4] = {};
  mma_m16n8k16<T>(c, ra, rb[0], rb[1]);
  mma_m16n8k16<T>(c_rows, ra, rt[0], rt[1]);
  if (bug == 1) cp_async_wait<0>();
  for (int i = 0; i < 4; ++i) {
    const int place = (lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2;
    d[place] = c[i];
    d_rows[place] = c_rows[i];
  }
  if (bug == 3) ldmatrix_x4(ra, s_a + lane % 16 * 16 + 4);  // 8 bytes off
  if (bug == 4) cp_async_16(s_rows + 8 * 16, a);             // past the end of shared memory
  if (bug == 5) ldmatrix_x4(ra, a);                          // not shared memory
  if (bug == 6) cp_async_16(s_a, a);                         // nothing waits for it
}

// y[i] = x[mirror of i in its block], through shared memory.  Each bug is a race that another order
// of execution hides.
__global__ __launch_bounds__(128) void mirror_kernel(const float* x, float* y, int bug) {
  __shared__ float values[128];
  const int thread = int(threadIdx.x), first = int(blockIdx.x) * 128;
  values[thread] = x[first + thread];
  if (bug != 1) __syncthreads();
  const float mirrored = values[127 - thread];
  if (bug == 2) values[thread] = 0.0f;  // another thread has yet to load it
  if (bug == 3) y[thread] = mirrored;   // so does every block
  y[first + thread] = mirrored;
  if (bug == 4 && y[first + 127 - thread] == 0.5f) y[first + thread] = 0.0f;
}

// The same in a warp, where lanes run in step on no machine that this is for.
__global__ __launch_bounds__(32) void mirror_warp_kernel(const float* x, float* y, int bug) {
  float* values = reinterpret_cast<float*>(dynamic_shared());
  const int lane = int(threadIdx.x);
  values[lane] = x[lane];
  if (bug != 1) __syncwarp();
  const float mirrored = values[31 - lane];
  if (bug != 2) __syncwarp();
  values[lane] = 2.0f * mirrored;
  if (bug == 3)
    __shfl_sync(0xFFFFFFFFu, mirrored, 0);  // exchanges a register and orders nothing else
  else
    __syncwarp();
  y[lane] = values[31 - lane];
}

}  // namespace
}  // namespace decomp_kernels::cuda

namespace on_host = cuda_on_host;
using namespace decomp_kernels;

extern "C" const char* saxpy(float a, const float* x, float* y, int n, int bug) {
  on_host::Memory memory;
  const float* d_x = memory.input(x, n);
  float* d_y = memory.in_and_output(y, n);
  on_host::launch({.grid = {unsigned(n + 63) / 64}, .block = {64}},
                  [&] { cuda::saxpy_kernel(a, d_x, d_y, n, bug); });
  return memory.finish();
}

extern "C" const char* reduce(const float* x, float* sums, int n, int blocks, int bug,
                              uint64_t seed) {
  on_host::Memory memory;
  const float* d_x = memory.input(x, n);
  float* d_sums = memory.output(sums, blocks);
  on_host::launch({.grid = {unsigned(blocks)}, .block = {128}, .seed = seed},
                  [&] { cuda::reduce_kernel(d_x, d_sums, n, bug); });
  return memory.finish();
}

extern "C" const char* mirror(const float* x, float* y, int blocks, int bug) {
  on_host::Memory memory;
  const float* d_x = memory.input(x, blocks * 128);
  float* d_y = memory.output(y, blocks * 128);
  on_host::launch({.grid = {unsigned(blocks)}, .block = {128}},
                  [&] { cuda::mirror_kernel(d_x, d_y, bug); });
  return memory.finish();
}

extern "C" const char* mirror_warp(const float* x, float* y, int bug) {
  on_host::Memory memory;
  const float* d_x = memory.input(x, 32);
  float* d_y = memory.output(y, 32);
  on_host::launch({.grid = {1}, .block = {32}, .shared = 128},
                  [&] { cuda::mirror_warp_kernel(d_x, d_y, bug); });
  return memory.finish();
}

template <typename T>
const char* product(const T* a, const T* b, const T* b_rows, float* d, float* d_rows, int bug) {
  on_host::Memory memory;
  const T *d_a = memory.input(a, 256), *d_b = memory.input(b, 128);
  const T* d_b_rows = memory.input(b_rows, 128);
  float *d_d = memory.output(d, 128), *d_d_rows = memory.output(d_rows, 128);
  on_host::launch({.grid = {1}, .block = {32}, .shared = 1024},
                  [&] { cuda::tile_kernel(d_a, d_b, d_b_rows, d_d, d_d_rows, bug); });
  return memory.finish();
}

extern "C" const char* tile_product(int half, const void* a, const void* b, const void* b_rows,
                                    float* d, float* d_rows, int bug) {
  auto of = [&](auto type) {
    using T = decltype(type);
    return product(static_cast<const T*>(a), static_cast<const T*>(b),
                   static_cast<const T*>(b_rows), d, d_rows, bug);
  };
  return half ? of(fp16{}) : of(bf16{});
}
