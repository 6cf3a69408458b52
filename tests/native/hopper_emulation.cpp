// The Hopper product walked on the host, through the same headers that the kernel is made of.
//
// Block by block, unit by unit, iteration by iteration: boxes of tensors go into stages of shared
// memory as the copy engine moves them (128-byte swizzle of addresses, zeros from outside), the
// accumulator is held by 128 threads' registers as the matrix instructions hold it, and leaves by
// matrix stores and boxes that drop what is outside.  What the device is known to do is written
// here from its documentation and not taken from those headers; where things are, how much, and in
// which order, is theirs.  Returns 0, or the number of the first thing seen to be wrong.

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "hopper_args.h"
#include "hopper_epilogue.h"
#include "hopper_mask.h"

using namespace decomp_kernels;

namespace {

enum Wrong : int {
  kFine,
  kStageHole = 1,    // a stage is read that the boxes left parts of unwritten, or wrote twice
  kTurn = 2,         // a consumer's tile is not the one the producer put at that place of the ring
  kOutsideBox = 3,   // a box leaves its part of shared memory
  kWrittenTwice = 4,
  kNotWritten = 5,
  kUnstaged = 6,     // the copy engine stores what nobody staged
  kSharedTooLarge = 7,
};

constexpr uint16_t kPoison = 0x7FFF;  // a NaN in both types that no arithmetic here produces

struct Failure {
  int what;
};

void require(bool good, Wrong wrong) {
  if (!good) throw Failure{wrong};
}

// The copy engine's swizzle: bits 4 to 6 of a shared address change with bits 7 to 9.
size_t swizzled_address(size_t bytes) { return bytes ^ ((bytes >> 7 & 7) << 4); }

using Halves = std::vector<uint16_t>;

void load_box(const TensorBox& t, int inner, int outer, Halves& shared, int offset) {
  require(t.box[0] * 2 == 128 && t.stride % 8 == 0, kOutsideBox);
  for (int o = 0; o < t.box[1]; ++o)
    for (int i = 0; i < t.box[0]; ++i) {
      const int64_t x = int64_t(inner) + i, y = int64_t(outer) + o;
      const bool inside = x >= 0 && x < t.extent[0] && y >= 0 && y < t.extent[1];
      const uint16_t value =
          inside ? static_cast<const uint16_t*>(t.base)[y * t.stride + x] : uint16_t(0);
      const size_t at = swizzled_address(size_t(offset + o * t.box[0] + i) * 2) / 2;
      require(at < shared.size(), kOutsideBox);
      require(shared[at] == kPoison, kStageHole);
      shared[at] = value;
    }
}

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

template <typename T>
float value_of(uint16_t bits) {
  return to_float(T{bits});
}
template <typename T>
uint16_t bits_of(float value) {
  return from_float<T>(value).bits;
}

struct Operands {
  TensorBox left, right, small_left, small_right;
};

struct Stage {
  Halves left, right;
};

// The stage at a place of the ring: tile unit ``place / steps`` of the producer's walk, filled by
// every block of the cluster.
Stage fetched(
    const HopperTile& tile, const TileGrid& grid, const RankLoop& loop, const Operands& operands,
    int unit, int step, int rank_in_cluster) {
  Stage stage{Halves(tile.left_elements(), kPoison), Halves(tile.right_elements(), kPoison)};
  const TilePlace place = grid.place(unit);
  const bool small = loop.is_small(step);
  const int inner = loop.first_inner(step);
  const BoxPlace left = left_box(tile_first_row(tile, place, rank_in_cluster), inner);
  load_box(small ? operands.small_left : operands.left, left.inner, left.outer, stage.left,
           left.offset);
  for (int rank = 0; rank < tile.cluster; ++rank)
    for (int box = 0; box < right_boxes(tile); ++box) {
      const BoxPlace right = right_box(tile, rank, box, place.col_tile * tile.cols, inner);
      load_box(small ? operands.small_right : operands.right, right.inner, right.outer,
               stage.right, right.offset);
    }
  for (const Halves* part : {&stage.left, &stage.right})
    for (uint16_t half : *part) require(half != kPoison, kStageHole);
  return stage;
}

struct Accumulator {
  int cols;
  std::vector<float> held;  // [128 threads, cols / 2]
  explicit Accumulator(int cols) : cols(cols), held(size_t(128) * (cols / 2)) {}
  float& at(int thread, int i) { return held[size_t(thread) * (cols / 2) + i]; }
};

template <typename T>
void multiply(
    const HopperTile& tile, const Stage& stage, int first_row, int blocks, Accumulator& acc) {
  const int depth = blocks * kBlockDepth;
  std::vector<float> left(kGroupRows * kDepth), right(tile.cols * kDepth);
  for (int k = 0; k < depth; ++k) {
    for (int row = 0; row < kGroupRows; ++row)
      left[row * kDepth + k] = value_of<T>(stage.left[left_element(first_row + row, k)]);
    for (int col = 0; col < tile.cols; ++col)
      right[col * kDepth + k] = value_of<T>(stage.right[right_element(tile, col, k)]);
  }
  for (int thread = 0; thread < 128; ++thread)
    for (int i = 0; i < tile.cols / 2; ++i) {
      const Element e = accumulator_element(thread, i);
      float sum = acc.at(thread, i);
      for (int k = 0; k < depth; ++k) sum += left[e.row * kDepth + k] * right[e.col * kDepth + k];
      acc.at(thread, i) = sum;
    }
}

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

// finish(accumulator, first_row, first_col) for each warpgroup's part of each tile.
template <typename T, int kParts, class Finish>
void walk_parts(
    const HopperTile& tile, const Operands& operands, int64_t rows, int64_t cols,
    const RankLoop& loop, const int64_t* seed, uint32_t threshold, int device_sms, Finish finish) {
  require(tile.shared_bytes() <= kSharedLimit && tile.stages() >= 2, kSharedTooLarge);
  const TileGrid grid = tile_grid(tile, rows, cols);
  const int units = int(grid.units());
  const int clusters = std::max(1, std::min(device_sms / tile.cluster, units));
  for (int block = 0; block < clusters * tile.cluster; ++block) {
    const int cluster = block / tile.cluster, rank_in_cluster = block % tile.cluster;
    std::vector<int> order;  // the units as the producer fetches them
    const UnitWalk all = unit_walk(tile, cluster, clusters, kProducer);
    for (int unit = all.first; unit < units; unit += all.step) order.push_back(unit);

    for (int consumer = 0; consumer < kConsumers; ++consumer) {
      const UnitWalk mine = unit_walk(tile, cluster, clusters, consumer);
      int place_in_ring = tile.ping_pong() && consumer == 1 ? loop.steps() : 0;
      const auto first_of = [&](int unit) {
        const TilePlace place = grid.place(unit);
        return Element{tile_first_row(tile, place, rank_in_cluster) + consumer_row(tile, consumer),
                       place.col_tile * tile.cols};
      };
      const bool masked = tile.small_first() && seed != nullptr && loop.rank > 0;
      std::vector<MaskDraw<kParts>> masks(128);
      const auto begin_masks = [&](int unit) {
        const Element first = first_of(unit);
        for (int thread = 0; thread < 128; ++thread)
          masks[thread].begin(cols, first.row, first.col, thread);
      };
      if (masked && mine.first < units) begin_masks(mine.first);

      for (int unit = mine.first; unit < units; unit += mine.step) {
        const auto [first_row, first_col] = first_of(unit);
        const size_t turn = place_in_ring / loop.steps();
        require(turn < order.size() && order[turn] == unit, kTurn);
        Accumulator acc(tile.cols);

        const auto next_stage = [&](int blocks) {
          const Stage stage = fetched(tile, grid, loop, operands, order[turn],
                                      place_in_ring % loop.steps(), rank_in_cluster);
          multiply<T>(tile, stage, consumer_row(tile, consumer), blocks, acc);
          ++place_in_ring;
        };
        const auto small = [&] {
          for (int first = 0; first < loop.rank; first += kDepth)
            next_stage(loop.small_blocks(first));
        };
        if (tile.small_first()) {
          small();
          if (masked) {
            for (auto& mask : masks) mask.finish(uint64_t(*seed), threshold);
            for (int thread = 0; thread < 128; ++thread)
              for (int part = 0; part < tile.cols / kChunkCols; ++part)
                for (int i = 0; i < kMaskRegisters; ++i)
                  if (!register_kept(masks[thread].bits[part], masks[thread ^ 1].bits[part], thread,
                                     i))
                    acc.at(thread, part * kMaskRegisters + i) = 0.0f;
            if (unit + mine.step < units) begin_masks(unit + mine.step);
          }
        }
        for (int step = 0; step < loop.base_steps(); ++step) {
          next_stage(kStageBlocks);
          if (masked)
            for (auto& mask : masks) mask.step(uint64_t(*seed), threshold);
        }
        if (!tile.small_first()) small();
        if (tile.ping_pong()) place_in_ring += loop.steps();

        if (first_row < rows) finish(acc, first_row, first_col);
      }
    }
  }
}

template <typename T, class... Rest>
void walk(const HopperTile& tile, const Rest&... rest) {
  tile.cols == 128 ? walk_parts<T, 2>(tile, rest...) : walk_parts<T, 4>(tile, rest...);
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

int hopper_forward(const HopperForwardArgs* a, int device_sms) {
  return caught([&] {
    a->dtype == Dtype::kHalf ? forward<fp16>(*a, device_sms) : forward<bf16>(*a, device_sms);
  });
}

int hopper_input_gradient(const HopperInputGradientArgs* a, int device_sms) {
  return caught([&] {
    a->dtype == Dtype::kHalf ? input_gradient<fp16>(*a, device_sms)
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
