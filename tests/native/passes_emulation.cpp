// The device passes on the host: the kernels' and the launching files' own source, run by
// cuda_on_host.h.
//
// Types travel as the numbers of csrc/common/dtype.h; a missing tensor as nullptr; vectors are
// float32.  Each function returns nullptr, or what the emulation found wrong.  PASS, where it is
// defined, leaves one pass alone: a planted bug is compiled sooner.

#include "passes_runtime.h"

#define DOWN_PROJECTION 1
#define COLUMN_WALK 2
#define UP_EXPANSION 3
#define MERGED_WEIGHT 4
#define DEQUANTIZE 5
#define ROW_NORM 6
#ifndef PASS
#define PASS 0
#endif
#define HAS(pass) (PASS == 0 || PASS == pass || (PASS == ROW_NORM && pass < UP_EXPANSION))

#if HAS(DOWN_PROJECTION)
#include "down_projection.cu"
#endif
#if HAS(COLUMN_WALK)
#include "column_walk.cu"
#endif
#if HAS(UP_EXPANSION)
#include "up_expansion.cu"
#endif
#if HAS(MERGED_WEIGHT)
#include "merged_weight.cu"
#endif
#if HAS(DEQUANTIZE)
#include "dequantize.cu"
#endif
#if HAS(ROW_NORM)
#include "row_norm.cu"
#endif

using namespace decomp_kernels;
using namespace decomp_kernels::cuda;

namespace {

int arch = 80;
int64_t bank_conflicts = 0;  // of ldmatrix, in the last pass

// Arrays of one launch, by bytes: their types are known at run time alone.
class Arrays {
 public:
  template <typename T>
  const T* input(const T* host, int64_t count) {
    return memory_.input(host, count);
  }
  Matrix matrix(const void* host, int64_t dtype, int64_t rows, int64_t cols, int64_t stride) {
    const int64_t count = rows && cols ? (rows - 1) * stride + cols : 0;
    return {bytes(host, count * int64_t(size_of(Dtype(dtype)))), Dtype(dtype), stride};
  }
  Matrix matrix(const void* host, int64_t dtype, int64_t rows, int64_t cols) {
    return matrix(host, dtype, rows, cols, cols);
  }
  Vector vector(const void* host, int64_t count) { return {bytes(host, count * 4), Dtype::kFloat}; }
  Mask mask(const int64_t* seed, int64_t threshold) {
    return {memory_.input(seed, 1), uint32_t(threshold)};
  }
  Output output(void* host, int64_t dtype, int64_t count) {
    auto* to = static_cast<unsigned char*>(host);
    return {memory_.output(to, count * int64_t(size_of(Dtype(dtype)))), Dtype(dtype)};
  }
  float* sums(float* host, int64_t count) { return memory_.output(host, count); }
  // An input that the launch may write over.
  void* in_and_output(void* host, int64_t dtype, int64_t count) {
    auto* both = static_cast<unsigned char*>(host);
    return memory_.in_and_output(both, count * int64_t(size_of(Dtype(dtype))));
  }

  template <typename Args>
  const char* launched(const Args& args, int64_t sms, int64_t order) {
    if (const char* reason = why_not(args, arch)) return reason;
    size_t needed = 0;
    if constexpr (requires { workspace_bytes(args, 1); }) needed = workspace_bytes(args, int(sms));
    void* workspace = needed ? memory_.scratch<unsigned char>(int64_t(needed)) : nullptr;
    EmulatedStream stream{uint64_t(order)};
    launch(args, workspace, int(sms), &stream);
    bank_conflicts = stream.bank_conflicts;
    return memory_.finish();
  }

 private:
  const void* bytes(const void* host, int64_t count) {
    return memory_.input(static_cast<const unsigned char*>(host), count);
  }

  cuda_on_host::Memory memory_;
};

}  // namespace

extern "C" const char* set_arch(int64_t to) {
  arch = int(to);
  return nullptr;
}

extern "C" int64_t count_bank_conflicts() { return bank_conflicts; }

#if HAS(DOWN_PROJECTION)
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
  return arrays.launched(args, sms, order);
}
#endif

#if HAS(COLUMN_WALK)
extern "C" const char* run_column_walk(
    const void* big, int64_t big_dtype, int64_t stride, int64_t M, int64_t N, const void* right,
    int64_t R, const void* left, int64_t L, int64_t small_dtype, const int64_t* seed,
    int64_t threshold, void* other, int64_t in_place, const float* scale, float* u, float* c,
    float* s, float* p, void* scaled_big, void* scaled_other, int64_t sms, int64_t order) {
  Arrays arrays;
  void* both = in_place ? arrays.in_and_output(other, big_dtype, M * N) : nullptr;
  const Matrix beside = in_place ? Matrix{both, Dtype(big_dtype), N}
                                 : arrays.matrix(other, big_dtype, M, N);
  const ColumnWalk args{
      .big = arrays.matrix(big, big_dtype, M, N, stride),
      .M = M,
      .N = N,
      .right = arrays.matrix(right, small_dtype, N, R),
      .left = arrays.matrix(left, small_dtype, M, L),
      .R = R,
      .L = L,
      .mask = arrays.mask(seed, threshold),
      .other = beside,
      .scale = arrays.vector(scale, N),
      .u = arrays.sums(u, M * R),
      .c = arrays.sums(c, L * N),
      .s = arrays.sums(s, N),
      .p = arrays.sums(p, N),
      .scaled_big = arrays.output(scaled_big, big_dtype, M * N),
      .scaled_other = in_place ? Output{both, Dtype(big_dtype)}
                               : arrays.output(scaled_other, big_dtype, M * N),
  };
  return arrays.launched(args, sms, order);
}
#endif

#if HAS(UP_EXPANSION)
extern "C" const char* run_up_expansion(const void* v, int64_t small_dtype, const void* down,
                                        const void* up, int64_t M, int64_t C, int64_t R,
                                        const int64_t* seed, int64_t threshold, const float* bias,
                                        void* addend, int64_t in_place, void* out,
                                        int64_t out_dtype, int64_t order) {
  Arrays arrays;
  void* both = in_place ? arrays.in_and_output(addend, out_dtype, M * C) : nullptr;
  const UpExpansion args{
      .v = arrays.matrix(v, small_dtype, M, R),
      .down = arrays.matrix(down, small_dtype, R, C),
      .up = arrays.matrix(up, small_dtype, C, R),
      .M = M,
      .C = C,
      .R = R,
      .mask = arrays.mask(seed, threshold),
      .bias = arrays.vector(bias, C),
      .addend = in_place ? Matrix{both, Dtype(out_dtype), C}
                         : arrays.matrix(addend, out_dtype, M, C),
      .out = in_place ? Output{both, Dtype(out_dtype)} : arrays.output(out, out_dtype, M * C),
  };
  return arrays.launched(args, 1, order);
}
#endif

#if HAS(MERGED_WEIGHT)
extern "C" const char* run_merged_weight(const void* weight, int64_t dtype, int64_t row_stride,
                                         int64_t column_stride, const void* up, const void* down,
                                         int64_t small_dtype, int64_t N, int64_t K, int64_t R,
                                         const float* core, const float* in_scale,
                                         const float* out_scale, float scale, void* out,
                                         int64_t order) {
  Arrays arrays;
  const Matrix whole = row_stride == 1 ? arrays.matrix(weight, dtype, K, N, column_stride)
                                       : arrays.matrix(weight, dtype, N, K, row_stride);
  const MergedWeight args{
      .weight = {whole.data, whole.dtype, row_stride},
      .weight_column_stride = column_stride,
      .up = arrays.matrix(up, small_dtype, N, R),
      .down = arrays.matrix(down, small_dtype, R, K),
      .N = N,
      .K = K,
      .R = R,
      .core = arrays.vector(core, R),
      .in_scale = arrays.vector(in_scale, K),
      .out_scale = arrays.vector(out_scale, N),
      .scale = scale,
      .out = arrays.output(out, dtype, N * K),
  };
  return arrays.launched(args, 1, order);
}
#endif

#if HAS(DEQUANTIZE)
extern "C" const char* run_nf4(const uint8_t* packed, const float* absmax, int64_t blocksize,
                               int64_t N, int64_t K, void* out, int64_t dtype, int64_t order) {
  Arrays arrays;
  const Nf4Weight args{
      .packed = arrays.input(packed, (N * K + 1) / 2),
      .absmax = arrays.input(absmax, ceil_div(N * K, blocksize)),
      .blocksize = blocksize,
      .N = N,
      .K = K,
      .out = arrays.output(out, dtype, N * K),
  };
  return arrays.launched(args, 1, order);
}

extern "C" const char* run_int8(const int8_t* codes, const float* absmax, int64_t N, int64_t K,
                                void* out, int64_t dtype, int64_t order) {
  Arrays arrays;
  const Int8Weight args{
      .codes = arrays.input(codes, N * K),
      .absmax = arrays.input(absmax, N),
      .N = N,
      .K = K,
      .out = arrays.output(out, dtype, N * K),
  };
  return arrays.launched(args, 1, order);
}
#endif

#if HAS(ROW_NORM)
extern "C" const char* run_squared_rows(const void* weight, int64_t dtype, int64_t N, int64_t K,
                                        float* squares, int64_t order) {
  Arrays arrays;
  const SquaredRows args{.weight = arrays.matrix(weight, dtype, N, K),
                         .N = N,
                         .K = K,
                         .squares = arrays.sums(squares, N)};
  return arrays.launched(args, 1, order);
}

extern "C" const char* run_row_norm(const void* weight, int64_t dtype, const void* down,
                                    const void* up, int64_t small_dtype, int64_t N, int64_t K,
                                    int64_t R, const float* squares, float scale, float* norm,
                                    int64_t sms, int64_t order) {
  Arrays arrays;
  const RowNorm args{
      .weight = arrays.matrix(weight, dtype, N, K),
      .down = arrays.matrix(down, small_dtype, R, K),
      .up = arrays.matrix(up, small_dtype, N, R),
      .N = N,
      .K = K,
      .R = R,
      .squares = arrays.input(squares, N),
      .scale = scale,
      .norm = arrays.sums(norm, N),
  };
  return arrays.launched(args, sms, order);
}

extern "C" const char* run_row_norm_gradients(const float* d_norm, const float* norm,
                                              const void* weight, int64_t dtype, const void* down,
                                              const void* up, int64_t small_dtype, int64_t N,
                                              int64_t K, int64_t R, float scale, float* d_down,
                                              float* d_up, int64_t sms, int64_t order) {
  Arrays arrays;
  const RowNormGradients args{
      .d_norm = arrays.input(d_norm, N),
      .norm = arrays.input(norm, N),
      .weight = arrays.matrix(weight, dtype, N, K),
      .down = arrays.matrix(down, small_dtype, R, K),
      .up = arrays.matrix(up, small_dtype, N, R),
      .N = N,
      .K = K,
      .R = R,
      .scale = scale,
      .d_down = arrays.sums(d_down, R * K),
      .d_up = arrays.sums(d_up, N * R),
  };
  return arrays.launched(args, sms, order);
}
#endif
