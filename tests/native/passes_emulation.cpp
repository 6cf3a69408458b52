// The device passes on the host: the kernels' own source and launch plans, run by cuda_on_host.h.
//
// Types travel as the numbers of csrc/common/dtype.h; a missing tensor as nullptr; vectors are
// float32.  Each function returns nullptr, or what the emulation found wrong.

#include "column_walk.cuh"
#include "down_projection.cuh"

using namespace decomp_kernels;
using namespace decomp_kernels::cuda;

namespace {

// Arrays of one launch, by bytes: their types are known at run time alone.
class Arrays {
 public:
  Matrix matrix(const void* host, int64_t dtype, int64_t rows, int64_t cols, int64_t stride) {
    const int64_t count = rows && cols ? (rows - 1) * stride + cols : 0;
    return {in(host, count * int64_t(size_of(Dtype(dtype)))), Dtype(dtype), stride};
  }
  Matrix matrix(const void* host, int64_t dtype, int64_t rows, int64_t cols) {
    return matrix(host, dtype, rows, cols, cols);
  }
  Vector vector(const void* host, int64_t count) { return {in(host, count * 4), Dtype::kFloat}; }
  Mask mask(const int64_t* seed, int64_t threshold) {
    return {memory_.input(seed, 1), uint32_t(threshold)};
  }
  Output output(void* host, int64_t dtype, int64_t count) {
    auto* bytes = static_cast<unsigned char*>(host);
    return {memory_.output(bytes, count * int64_t(size_of(Dtype(dtype)))), Dtype(dtype)};
  }
  float* sums(float* host, int64_t count) { return memory_.output(host, count); }
  void* workspace(size_t bytes) {
    return bytes ? memory_.scratch<unsigned char>(int64_t(bytes)) : nullptr;
  }
  const char* finish() { return memory_.finish(); }

 private:
  const void* in(const void* host, int64_t bytes) {
    return memory_.input(static_cast<const unsigned char*>(host), bytes);
  }

  cuda_on_host::Memory memory_;
};

struct OnHost {
  uint64_t seed;  // of the order of blocks and warps

  template <typename Parameters>
  int operator()(void (*kernel)(Parameters), int64_t blocks, int threads, size_t shared,
                 const Parameters& parameters) const {
    const cuda_on_host::Launch how{.grid = {unsigned(blocks)},
                                   .block = {unsigned(threads)},
                                   .shared = shared,
                                   .seed = seed};
    return cuda_on_host::launch(how, [&] { kernel(parameters); }) ? 0 : 1;
  }
};

}  // namespace

extern "C" const char* run_down_projection(
    const void* x, int64_t x_dtype, int64_t stride, const void* down, int64_t down_dtype, int64_t M,
    int64_t K, int64_t R, const float* in_scale, const int64_t* seed, int64_t threshold,
    const float* core, float scale, int64_t activation, void* t, int64_t t_dtype, void* v,
    int64_t sms, int64_t order) {
  Arrays arrays;
  const DownProjection args{
      .x = arrays.matrix(x, x_dtype, M, K, stride),
      .down = arrays.matrix(down, down_dtype, R, K),
      .M = M,
      .K = K,
      .R = R,
      .in_scale = arrays.vector(in_scale, K),
      .mask = arrays.mask(seed, threshold),
      .core = arrays.vector(core, R),
      .scale = scale,
      .activation = Activation(activation),
      .t = arrays.output(t, t_dtype, M * R),
      .v = arrays.output(v, down_dtype, M * R),
  };
  void* workspace = arrays.workspace(down_projection_workspace(args, int(sms)));
  run(args, workspace, int(sms), OnHost{uint64_t(order)});
  return arrays.finish();
}

extern "C" const char* run_column_walk(
    const void* big, int64_t big_dtype, int64_t stride, int64_t M, int64_t N, const void* right,
    int64_t R, const void* left, int64_t L, int64_t small_dtype, const int64_t* seed,
    int64_t threshold, const void* other, const float* scale, float* u, float* c, float* s,
    float* p, void* scaled_big, void* scaled_other, int64_t sms, int64_t order) {
  Arrays arrays;
  const ColumnWalk args{
      .big = arrays.matrix(big, big_dtype, M, N, stride),
      .M = M,
      .N = N,
      .right = arrays.matrix(right, small_dtype, N, R),
      .left = arrays.matrix(left, small_dtype, M, L),
      .R = R,
      .L = L,
      .mask = arrays.mask(seed, threshold),
      .other = arrays.matrix(other, big_dtype, M, N),
      .scale = arrays.vector(scale, N),
      .u = arrays.sums(u, M * R),
      .c = arrays.sums(c, L * N),
      .s = arrays.sums(s, N),
      .p = arrays.sums(p, N),
      .scaled_big = arrays.output(scaled_big, big_dtype, M * N),
      .scaled_other = arrays.output(scaled_other, big_dtype, M * N),
  };
  void* workspace = arrays.workspace(column_walk_workspace(args, int(sms)));
  run(args, workspace, int(sms), OnHost{uint64_t(order)});
  return arrays.finish();
}
