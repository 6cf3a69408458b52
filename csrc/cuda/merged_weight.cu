// Launch of the merged weight (interface and formula: merged_weight.h).

#include "merged_weight.cuh"

namespace decomp_kernels::cuda {

const char* why_not(const MergedWeight& args, int arch) {
  const Dtype wide = args.weight.dtype;
  const bool any = args.N && args.K && args.R;  // a tensor of no elements may have no data
  const bool half_a_pair = any && !args.up.data != !args.down.data;
  const bool old_device = arch < 80;
  const bool other_types =
      args.up.data && (!paired(wide, args.up.dtype) || args.up.dtype != args.down.dtype);
  const bool other_out = args.out.dtype != wide;
  const bool too_large = args.K > INT32_MAX || args.R > INT32_MAX - kMergeRank ||
                         ceil_div(args.N, kMergeRows) * ceil_div(args.K, kMergeCols) > kMostBlocks;
  if (old_device) return "it needs compute capability 8.0 or newer";
  if (half_a_pair) return "up and down come together";
  if (other_types) return "up and down must be of the weight's dtype or float32, and of one";
  if (other_out) return "out must be of the weight's dtype";
  if (too_large) return "K and r must be below 2^31, and the grid below 2^31 blocks";
  return nullptr;
}

cudaError_t launch(const MergedWeight& args, void*, int, cudaStream_t stream) {
  if (args.N == 0 || args.K == 0) return cudaSuccess;
  const bool has_factors = args.up.data && args.down.data;
  const Dtype small = has_factors ? args.up.dtype : args.weight.dtype;
  return with_types(args.weight.dtype, small, [&]<typename T, typename S>() {
    const int64_t col_blocks = ceil_div(args.K, kMergeCols);
    T* const out = static_cast<T*>(args.out.data);
    const MergedWeightCall<T, S> call{
        .weight = view<T>(args.weight, args.N, args.K),
        .weight_column_stride = args.weight_column_stride,
        .up = view<S>(args.up, args.N, args.R),
        .down = view<S>(args.down, args.R, args.K),
        .N = args.N,
        .K = int(args.K),
        .R = has_factors ? int(args.R) : 0,
        .core = args.core,
        .in_scale = args.in_scale,
        .out_scale = args.out_scale,
        .scale = args.scale,
        .out = out,
        .out_aligned = reinterpret_cast<uintptr_t>(out) % 16 == 0 && args.K % Vec<T>::kSize == 0,
        .col_blocks = int(col_blocks),
    };
    return enqueue(&merged_weight<T, S>, ceil_div(args.N, kMergeRows) * col_blocks, kMergeThreads,
                   sizeof(MergeShared), stream, call);
  });
}

}  // namespace decomp_kernels::cuda
