// From run-time types to kernels' template arguments, and the launch itself.
//
// Every kernel has one parameter, a struct, and a one-dimensional grid: y and z end at 65,535.

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

// Takes one piece after another of a workspace, each 256-byte aligned, and adds up their bytes.
// Without a workspace the pieces are nowhere, but not nullptr: that would mean "not asked for".
class Room {
 public:
  explicit Room(void* workspace = nullptr)
      : start_(workspace ? reinterpret_cast<uintptr_t>(workspace) : 256) {}

  template <typename T>
  T* take(int64_t count) {
    const uintptr_t here = start_ + bytes_;
    bytes_ += (size_t(count) * sizeof(T) + 255) / 256 * 256;
    return reinterpret_cast<T*>(here);
  }

  size_t bytes() const { return bytes_; }

 private:
  uintptr_t start_;
  size_t bytes_ = 0;
};

#ifdef __CUDACC__  // on the host the tests define it
template <typename Parameters>
cudaError_t enqueue(void (*kernel)(Parameters), int64_t blocks, int threads, size_t shared,
                    cudaStream_t stream, const Parameters& parameters) {
  if (shared > 48 * 1024) {  // more than any block has without asking
    const cudaError_t refused = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (refused != cudaSuccess) return refused;
  }
  kernel<<<unsigned(blocks), threads, shared, stream>>>(parameters);
  return cudaGetLastError();
}
#endif

}  // namespace decomp_kernels::cuda
