// Launch of the up expansion (interface and formula: up_expansion.h).

#include "up_expansion.cuh"

namespace decomp_kernels::cuda {

const char* why_not(const UpExpansion& args, int arch) {
  const bool is_up = args.up.data != nullptr;
  const Matrix& small = is_up ? args.up : args.down;
  const bool old_device = arch < 80;
  const bool other_types = !paired(args.out.dtype, args.v.dtype) ||
                           (small.data && small.dtype != args.v.dtype);
  const bool other_addend = args.addend.data && args.addend.dtype != args.out.dtype;
  const bool too_large = args.C > INT32_MAX || args.R > 65536 ||
                         ceil_div(args.M, kUpRows) * ceil_div(args.C, kUpCols) > kMostBlocks;
  if (old_device) return "it needs compute capability 8.0 or newer";
  if (other_types) return "v and small must be of out's dtype or float32, and of one";
  if (other_addend) return "addend must be of out's dtype";
  if (too_large) return "C must be below 2^31, r at most 65536, and the grid below 2^31 blocks";
  return nullptr;
}

cudaError_t launch(const UpExpansion& args, void*, int, cudaStream_t stream) {
  if (args.M == 0 || args.C == 0) return cudaSuccess;
  return with_types(args.out.dtype, args.v.dtype, [&]<typename T, typename S>() {
    const auto launch_tile = [&]<int BR, bool IS_UP>() {
      const int64_t rows = IS_UP ? args.C : args.R, cols = IS_UP ? args.R : args.C;
      const int64_t col_blocks = ceil_div(args.C, kUpCols);
      T* const out = static_cast<T*>(args.out.data);
      const UpExpansionCall<T, S> call{
          .v = view<S>(args.v, args.M, args.R),
          .small = view<S>(IS_UP ? args.up : args.down, rows, cols),
          .addend = view<T>(args.addend, args.M, args.C),
          .M = args.M,
          .C = int(args.C),
          .R = int(args.R),
          .mask = args.mask,
          .bias = args.bias,
          .out = out,
          .out_aligned = reinterpret_cast<uintptr_t>(out) % 16 == 0 &&
                         args.C % Vec<T>::kSize == 0,
          .col_blocks = int(col_blocks),
      };
      return enqueue(&up_expansion<T, S, BR, IS_UP>, ceil_div(args.M, kUpRows) * col_blocks,
                     kUpThreads, sizeof(UpShared<T, S, BR, IS_UP>), stream, call);
    };
    const bool is_up = args.up.data != nullptr;
    if (args.R <= 16)
      return is_up ? launch_tile.template operator()<16, true>()
                   : launch_tile.template operator()<16, false>();
    return is_up ? launch_tile.template operator()<32, true>()
                 : launch_tile.template operator()<32, false>();
  });
}

}  // namespace decomp_kernels::cuda
