// Launches of the kernels that widen quantised weights (interface and formulas: dequantize.h).

#include "dequantize.cuh"

namespace decomp_kernels::cuda {

namespace {

// A block writes 4 KiB.
bool too_large(int64_t N, int64_t K) {
  return N && K && (K > INT32_MAX || N > kMostBlocks * 1024 / K);
}

const char* const kTooLarge = "K must be below 2^31, and N * K below 2^41";
const char* const kOldDevice = "it needs compute capability 8.0 or newer";

}  // namespace

const char* why_not(const Nf4Weight& args, int arch) {
  const bool odd_blocks = args.blocksize < 16 || (args.blocksize & (args.blocksize - 1));
  if (arch < 80) return kOldDevice;
  if (odd_blocks) return "the block size must be a power of two, 16 or more";
  if (too_large(args.N, args.K)) return kTooLarge;
  return nullptr;
}

const char* why_not(const Int8Weight& args, int arch) {
  if (arch < 80) return kOldDevice;
  if (too_large(args.N, args.K)) return kTooLarge;
  return nullptr;
}

cudaError_t launch(const Nf4Weight& args, void*, int, cudaStream_t stream) {
  const int64_t count = args.N * args.K;
  if (count == 0) return cudaSuccess;
  return with_type(args.out.dtype, [&]<typename T>() {
    constexpr int kSize = Vec<T>::kSize;
    int block_bits = 0;
    while (int64_t(1) << block_bits < args.blocksize) ++block_bits;
    const Nf4Call<T> call{
        .packed = args.packed,
        .absmax = args.absmax,
        .count = count,
        .block_bits = block_bits,
        .out = static_cast<T*>(args.out.data),
        .packed_aligned = reinterpret_cast<uintptr_t>(args.packed) % (kSize / 2) == 0,
        .out_aligned = reinterpret_cast<uintptr_t>(args.out.data) % 16 == 0,
    };
    const int64_t blocks = ceil_div(ceil_div(count, kSize), kWidenThreads);
    return enqueue(&widen_nf4<T>, blocks, kWidenThreads, 0, stream, call);
  });
}

cudaError_t launch(const Int8Weight& args, void*, int, cudaStream_t stream) {
  if (args.N == 0 || args.K == 0) return cudaSuccess;
  return with_type(args.out.dtype, [&]<typename T>() {
    constexpr int kSize = Vec<T>::kSize;
    const bool whole = args.K % kSize == 0;
    const Int8Call<T> call{
        .codes = args.codes,
        .absmax = args.absmax,
        .N = args.N,
        .pieces = ceil_div(args.K, kSize),
        .K = int(args.K),
        .out = static_cast<T*>(args.out.data),
        .codes_aligned = whole && reinterpret_cast<uintptr_t>(args.codes) % kSize == 0,
        .out_aligned = whole && reinterpret_cast<uintptr_t>(args.out.data) % 16 == 0,
    };
    const int64_t blocks = ceil_div(args.N * call.pieces, kWidenThreads);
    return enqueue(&widen_int8<T>, blocks, kWidenThreads, 0, stream, call);
  });
}

}  // namespace decomp_kernels::cuda
