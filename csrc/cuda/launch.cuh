// From run-time types to kernels' template arguments, and the launch itself.
//
// A pass is a host function ``run`` beside its kernels: it plans the grid and calls its launcher with
// (kernel, blocks, threads, bytes of dynamic shared memory, parameters).  OnStream launches on a
// device; the tests bring a launcher that runs the same kernels on the host.  Every kernel has one
// parameter, a struct, and a one-dimensional grid: y and z end at 65,535.

#pragma once

#include "../common/narrow.h"
#include "arguments.h"

namespace decomp_kernels::cuda {

inline constexpr int64_t kMostBlocks = 2147483647;

// f<T, S>() for the types of the large and of the small operands; ``paired`` holds.
template <typename F>
auto with_types(Dtype wide, Dtype small, F f) {
  const bool narrow = small != Dtype::kFloat;
  switch (wide) {
    case Dtype::kBFloat16:
      return narrow ? f.template operator()<bf16, bf16>() : f.template operator()<bf16, float>();
    case Dtype::kHalf:
      return narrow ? f.template operator()<fp16, fp16>() : f.template operator()<fp16, float>();
    default: return f.template operator()<float, float>();
  }
}

// f<T>() for one type.
template <typename F>
auto with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kBFloat16: return f.template operator()<bf16>();
    case Dtype::kHalf: return f.template operator()<fp16>();
    default: return f.template operator()<float>();
  }
}

// f<BR>() for the smallest tile of the rank that holds it, else for the largest.
template <typename F>
auto with_rank_tile(int64_t rank, F f) {
  if (rank <= 16) return f.template operator()<16>();
  if (rank <= 32) return f.template operator()<32>();
  return f.template operator()<64>();
}

constexpr int rank_tile(int64_t rank) { return rank <= 16 ? 16 : rank <= 32 ? 32 : 64; }

// Room for ``bytes`` at the front of what is left of a workspace, every piece 256-byte aligned.  With
// no workspace it adds up the bytes alone.
class Room {
 public:
  explicit Room(void* workspace = nullptr) : next_(static_cast<unsigned char*>(workspace)) {}

  template <typename T>
  T* take(int64_t count) {
    unsigned char* const here = next_ ? next_ + bytes_ : nullptr;
    bytes_ += (size_t(count) * sizeof(T) + 255) / 256 * 256;
    return reinterpret_cast<T*>(here);
  }

  size_t bytes() const { return bytes_; }

 private:
  unsigned char* next_;
  size_t bytes_ = 0;
};

#ifdef __CUDACC__
struct OnStream {
  cudaStream_t stream;

  template <typename Parameters>
  cudaError_t operator()(void (*kernel)(Parameters), int64_t blocks, int threads, size_t shared,
                         const Parameters& parameters) const {
    if (shared > 48 * 1024) {  // more than any block has without asking
      const cudaError_t refused = cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
      if (refused != cudaSuccess) return refused;
    }
    kernel<<<unsigned(blocks), threads, shared, stream>>>(parameters);
    return cudaGetLastError();
  }
};
#endif

}  // namespace decomp_kernels::cuda
