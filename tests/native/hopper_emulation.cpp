// The Hopper product walked on the host, through the same headers that the kernel is made of.
//
// A cluster's blocks are host threads: in each one that fetches and two that compute, with
// barriers as shared memory has them.  Boxes of tensors go into stages as the copy engine moves
// them (128-byte swizzle of addresses, zeros from outside), the accumulator is held by 128
// threads' registers as the matrix instructions hold it, products read their operands as late as
// they may, and results leave by matrix stores and boxes that drop what is outside.  What the
// device is known to do is written here from its documentation (hopper_machine.h too) and not
// taken from those headers; what is where, how much, and in which order, is theirs.  Returns 0, or
// the number of the first thing seen to be wrong.

#include <limits>

#include "hopper_args.h"
#include "hopper_machine.h"

using namespace decomp_kernels;
using namespace hopper_host;

namespace {

// What was written how often: each element of an output once.
struct Output {
  TensorBox tensor;
  std::vector<uint8_t> written;
  explicit Output(const TensorBox& t)
      : tensor(t), written(t.base ? t.extent[0] * t.extent[1] : 0) {}

  void store(const Halves& staged, int inner, int outer) {
    for (int o = 0; o < tensor.box[1]; ++o)
      for (int i = 0; i < tensor.box[0]; ++i) {
        const int64_t x = int64_t(inner) + i, y = int64_t(outer) + o;
        const uint16_t value = staged[swizzled_address(size_t(o * tensor.box[0] + i) * 2) / 2];
        require(value != kPoison, kUnstaged);
        if (x >= tensor.extent[0] || y >= tensor.extent[1]) continue;
        require(!written[y * tensor.extent[0] + x]++, kWrittenTwice);
        static_cast<uint16_t*>(const_cast<void*>(tensor.base))[y * tensor.stride + x] = value;
      }
  }
  void finish() const {
    for (uint8_t times : written) require(times == 1, kNotWritten);
  }
};

// Four 8 x 8 matrices a warp: row r of matrix m goes where lane 8 m + r says, and lane 4 r + q
// holds its elements 2 q and 2 q + 1 in register m.
template <typename T>
Halves staged_chunk(const std::vector<Pair>& pairs) {  // [128, kChunkRegisters / 2]
  Halves staged(kGroupRows * kChunkCols, kPoison);
  for (int warp = 0; warp < 4; ++warp)
    for (int store = 0; store < kChunkStores; ++store)
      for (int matrix = 0; matrix < 4; ++matrix)
        for (int row = 0; row < 8; ++row) {
          const int start = store_row_offset(32 * warp + 8 * matrix + row, store);
          require(start % 8 == 0 && start + 8 <= int(staged.size()), kOutsideBox);
          for (int q = 0; q < 4; ++q) {
            const int thread = 32 * warp + 4 * row + q;
            const Pair p = pairs[thread * (kChunkRegisters / 2) + 4 * store + matrix];
            staged[start + 2 * q] = bits_of<T>(p.a);
            staged[start + 2 * q + 1] = bits_of<T>(p.b);
          }
        }
  return staged;
}

// The pairs of a chunk of the accumulator, each passed through ``f(acc, row, col)``.
template <class F>
std::vector<Pair> chunk_pairs(Accumulator& acc, int chunk, int first_row, int first_col, F f) {
  std::vector<Pair> pairs(128 * (kChunkRegisters / 2));
  for (int thread = 0; thread < 128; ++thread)
    for (int i = 0; i < kChunkRegisters; i += 2) {
      const Element e = accumulator_element(thread, i);
      const int at = chunk * kChunkRegisters + i;
      pairs[thread * (kChunkRegisters / 2) + i / 2] =
          f(Pair{acc.at(thread, at), acc.at(thread, at + 1)}, first_row + e.row,
            first_col + chunk * kChunkCols + e.col);
    }
  return pairs;
}

template <typename T, class... Rest>
void walk(const HopperTile& tile, const Rest&... rest) {
  tile.cols == 128 ? run<T, 2>(tile, rest...) : run<T, 4>(tile, rest...);
}

template <typename T>
void forward(const HopperForwardArgs& a, int device_sms) {
  const HopperTile tile = hopper_tile(HopperOp::kForward, a.shape);
  const Operands operands{
      left_tensor(tile, a.x, a.M, a.K, a.x_stride),
      right_tensor(tile, a.weight, a.N, a.K, a.weight_stride),
      left_tensor(tile, a.v, a.M, a.r, a.v_stride),
      right_tensor(tile, a.up, a.N, a.r, a.up_stride),
  };
  Output y(out_tensor(a.y, a.M, a.N, a.y_stride)), z(out_tensor(a.z, a.M, a.N, a.z_stride));
  const ForwardEnd end{a.addend,   a.addend_stride, a.out_scale,   a.bias,
                       int(a.M),   int(a.N),        a.z != nullptr};
  walk<T>(tile, operands, a.M, a.N, RankLoop{int(a.K), int(a.r), tile.small_first()}, nullptr, 0,
          device_sms, [&](Accumulator& acc, int first_row, int first_col) {
            for (int chunk = 0; chunk < tile.cols / kChunkCols; ++chunk) {
              const int col = first_col + chunk * kChunkCols;
              if (col >= end.cols) return;
              const auto sums = chunk_pairs(acc, chunk, first_row, first_col,
                  [&](Pair p, int row, int c) { return end.z<T>(p, row, c); });
              const auto out = chunk_pairs(acc, chunk, first_row, first_col,
                  [&](Pair p, int row, int c) { return end.y(end.z<T>(p, row, c), c); });
              if (end.keep_z) z.store(staged_chunk<T>(sums), col, first_row);
              y.store(staged_chunk<T>(out), col, first_row);
            }
          });
  y.finish();
  z.finish();
}

template <typename T>
void input_gradient(const HopperInputGradientArgs& a, int device_sms) {
  const HopperTile tile = hopper_tile(HopperOp::kInputGradient, a.shape);
  const Operands operands{
      left_tensor(tile, a.g, a.M, a.N, a.g_stride),
      right_tensor(tile, a.weight, a.K, a.N, a.weight_stride),
      left_tensor(tile, a.dt, a.M, a.r, a.dt_stride),
      right_tensor(tile, a.down, a.K, a.r, a.down_stride),
  };
  Output d_x(out_tensor(a.d_x, a.M, a.K, a.d_x_stride));
  const bool summed = a.d_in_scale != nullptr;
  std::vector<float> partial(summed ? partial_rows(a.M) * a.K : 0,
                             std::numeric_limits<float>::quiet_NaN());
  std::vector<uint8_t> times(partial.size());
  const GradientEnd end{a.x,      a.x_stride, a.in_scale, partial.data(),
                        int(a.M), int(a.K),   a.d_x != nullptr};
  walk<T>(tile, operands, a.M, a.K, RankLoop{int(a.N), int(a.r), tile.small_first()}, a.seed,
          a.threshold, device_sms, [&](Accumulator& acc, int first_row, int first_col) {
            for (int chunk = 0; chunk < tile.cols / kChunkCols; ++chunk) {
              const int col = first_col + chunk * kChunkCols;
              if (col >= end.cols) return;
              if (summed) {
                std::vector<float> sums(kChunkCols);
                for (int thread = 0; thread < 128; ++thread)
                  for (int i = 0; i < kChunkRegisters; i += 2) {
                    const Element e = accumulator_element(thread, i);
                    const int at = chunk * kChunkRegisters + i;
                    const Pair t = end.term<T>({acc.at(thread, at), acc.at(thread, at + 1)},
                                               first_row + e.row, col + e.col);
                    sums[e.col] += t.a;
                    sums[e.col + 1] += t.b;
                  }
                for (int c = 0; c < kChunkCols && col + c < end.cols; ++c) {
                  const int64_t at = int64_t(partial_row(first_row)) * a.K + col + c;
                  require(at < int64_t(partial.size()) && !times[at]++, kWrittenTwice);
                  partial[at] = sums[c];
                }
              }
              if (!end.keep_d_x) continue;
              const auto out = chunk_pairs(acc, chunk, first_row, first_col,
                  [&](Pair p, int, int c) { return end.d_x(p, c); });
              d_x.store(staged_chunk<T>(out), col, first_row);
            }
          });
  d_x.finish();
  for (uint8_t t : times) require(t == 1, kNotWritten);
  for (int64_t k = 0; summed && k < a.K; ++k) {
    a.d_in_scale[k] = 0.0f;
    for (int64_t row = 0; row < partial_rows(a.M); ++row) a.d_in_scale[k] += partial[row * a.K + k];
  }
}

template <class F>
int caught(F f) {
  try {
    f();
    return kFine;
  } catch (const Failure& failure) {
    return failure.what;
  }
}

}  // namespace

extern "C" {

const char* hopper_forward_why_not(const HopperForwardArgs* a, int arch) {
  return why_not(*a, arch);
}
const char* hopper_input_gradient_why_not(const HopperInputGradientArgs* a, int arch) {
  return why_not(*a, arch);
}

// HOPPER_FP16: fp16, or bf16 again where planted defects are tried, which takes half the time.
#ifndef HOPPER_FP16
#define HOPPER_FP16 fp16
#endif

int hopper_forward(const HopperForwardArgs* a, int device_sms) {
  return caught([&] {
    a->dtype == Dtype::kHalf ? forward<HOPPER_FP16>(*a, device_sms) : forward<bf16>(*a, device_sms);
  });
}

int hopper_input_gradient(const HopperInputGradientArgs* a, int device_sms) {
  return caught([&] {
    a->dtype == Dtype::kHalf ? input_gradient<HOPPER_FP16>(*a, device_sms)
                             : input_gradient<bf16>(*a, device_sms);
  });
}

int hopper_choose_shape(
    int op, int64_t rows, int64_t cols, int64_t inner, int sms, unsigned linked) {
  return choose_shape(HopperOp(op), rows, cols, inner, sms, linked);
}

// rows, cols, cluster, stages and bytes of shared memory of an instance's tile, and its type.
void hopper_describe(int instance, int* out) {
  const HopperTile tile = instance_tile(instance);
  const int facts[] = {int(tile.op),   tile.rows(),  tile.cols,           tile.cluster,
                       tile.stages(), tile.shared_bytes(), int(instance_dtype(instance))};
  std::memcpy(out, facts, sizeof facts);
}
}
