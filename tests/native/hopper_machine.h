// The machine that csrc/common/hopper_roles.h is run on in the tests: a cluster of blocks whose
// parties are host threads, one at a time, with shared memory, barriers, the copy engine and
// asynchronous products as far as they can be told apart from outside.

#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <list>
#include <mutex>
#include <thread>
#include <vector>

#include "hopper_mask.h"
#include "hopper_roles.h"

namespace hopper_host {

using namespace decomp_kernels;

enum Wrong : int {
  kFine,
  kStageTaken = 1,   // a box writes where something still stands that may be read
  kOutsideBox = 2,   // a box leaves its part of shared memory
  kWrittenTwice = 3,
  kNotWritten = 4,
  kUnstaged = 5,     // the copy engine stores what nobody staged
  kSharedTooLarge = 6,
  kStuck = 7,        // every party waits
  kBytes = 8,        // a stage gets more bytes, or a barrier more arrivals, than it was promised
  kReadNothing = 9,  // products read a stage that is not filled, or given back too early
  kLeftOver = 10,    // a stage is still full when everyone is done
};

struct Failure {
  int what;
};

inline void require(bool good, Wrong wrong) {
  if (!good) throw Failure{wrong};
}

using Halves = std::vector<uint16_t>;
inline constexpr uint16_t kPoison = 0x7FFF;  // a NaN in both types that no operand here holds

// The copy engine's swizzle: bits 4 to 6 of a shared address change with bits 7 to 9.
inline size_t swizzled_address(size_t bytes) { return bytes ^ ((bytes >> 7 & 7) << 4); }

// Writes a box, zeros from outside, and returns its bytes.
inline int load_box(const TensorBox& t, int inner, int outer, Halves& shared, int offset) {
  require(t.box[0] * 2 == 128 && t.stride % 8 == 0, kOutsideBox);
  for (int o = 0; o < t.box[1]; ++o)
    for (int i = 0; i < t.box[0]; ++i) {
      const int64_t x = int64_t(inner) + i, y = int64_t(outer) + o;
      const bool inside = x >= 0 && x < t.extent[0] && y >= 0 && y < t.extent[1];
      const size_t at = swizzled_address(size_t(offset + o * t.box[0] + i) * 2) / 2;
      require(at < shared.size(), kOutsideBox);
      require(shared[at] == kPoison, kStageTaken);
      shared[at] = inside ? static_cast<const uint16_t*>(t.base)[y * t.stride + x] : uint16_t(0);
    }
  return t.box[0] * t.box[1] * 2;
}

template <typename T>
float value_of(uint16_t bits) {
  require(bits != kPoison, kReadNothing);
  return to_float(T{bits});
}
template <typename T>
uint16_t bits_of(float value) {
  return from_float<T>(value).bits;
}

// Parties run one at a time and wait for conditions.  If all of them wait, they would for ever.
class Parties {
 public:
  explicit Parties(int count) : running(count) {}

  void wait(std::unique_lock<std::mutex>& lock, std::function<bool()> ready) {
    const auto mine = waiting.insert(waiting.end(), ready);
    look();
    changed.notify_all();
    changed.wait(lock, [&] { return failure != kFine || ready(); });
    waiting.erase(mine);
    require(failure == kFine, Wrong(failure));
  }

  // A party's whole work, under the lock but where it waits.
  template <class Work>
  void run(Work work) {
    std::unique_lock<std::mutex> lock(mutex);
    try {
      work(lock);
    } catch (const Failure& seen) {
      if (failure == kFine) failure = seen.what;
    }
    --running;
    look();
    changed.notify_all();
  }

  int failure = kFine;

 private:
  void look() {
    const bool all_wait = running > 0 && int(waiting.size()) == running;
    const auto ready = [](const std::function<bool()>& f) { return f(); };
    if (failure == kFine && all_wait && std::none_of(waiting.begin(), waiting.end(), ready))
      failure = kStuck;
  }

  std::mutex mutex;
  std::condition_variable changed;
  std::list<std::function<bool()>> waiting;
  int running;
};

// A phase is over when all have arrived and all promised bytes have come.
struct Barrier {
  int expected = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;

  void init(int arrivals) { expected = pending = arrivals; }
  void arrive() {
    require(pending > 0, kBytes);
    --pending;
    turn();
  }
  void promise(int64_t more) {
    bytes += more;
    arrive();
  }
  void come(int64_t some) {
    bytes -= some;
    turn();
  }
  bool over(uint32_t parity) const { return phase % 2 != parity; }

 private:
  void turn() {
    if (pending != 0 || bytes != 0) return;
    ++phase;
    pending = expected;
  }
};

struct Stage {
  Halves left, right;
  Barrier full, empty;
  int given_back = 0;
};

struct Block {
  std::vector<Stage> ring;
  Barrier turn[kConsumers];
};

struct Operands {
  TensorBox left, right, small_left, small_right;
};

struct Accumulator {
  int cols;
  std::vector<float> held;  // [128 threads, cols / 2]
  explicit Accumulator(int cols) : cols(cols), held(size_t(128) * (cols / 2)) {}
  float& at(int thread, int i) { return held[size_t(thread) * (cols / 2) + i]; }
};

struct Fetcher {
  const HopperTile& tile;
  const Operands& operands;
  std::vector<Block>& cluster;
  Parties& parties;
  std::unique_lock<std::mutex>& lock;
  int rank;

  void await_empty(RingPlace place) {
    const Barrier& empty = cluster[rank].ring[place.stage].empty;
    parties.wait(lock, [&empty, place] { return empty.over(place.phase); });
  }
  void expect(int stage, int bytes) { cluster[rank].ring[stage].full.promise(bytes); }

  void fetch(int stage, const RankLoop& loop, int step, int first_row, int first_col) {
    const bool small = loop.is_small(step);
    const int inner = loop.first_inner(step);
    const BoxPlace left = left_box(first_row, inner);
    Stage& own = cluster[rank].ring[stage];
    own.full.come(load_box(small ? operands.small_left : operands.left, left.inner, left.outer,
                           own.left, left.offset));
    for (int box = 0; box < right_boxes(tile); ++box) {
      const BoxPlace right = right_box(tile, rank, box, first_col, inner);
      for (Block& block : cluster) {  // to every block of the cluster
        Stage& to = block.ring[stage];
        to.full.come(load_box(small ? operands.small_right : operands.right, right.inner,
                              right.outer, to.right, right.offset));
      }
    }
  }
};

// store: void(Accumulator&, int first_row, int first_col)
template <typename T, int kParts, class StoreTile>
struct Computer {
  const HopperTile& tile;
  std::vector<Block>& cluster;
  Parties& parties;
  std::unique_lock<std::mutex>& lock;
  StoreTile& store_tile;
  int64_t rows, cols;
  uint64_t seed;
  uint32_t threshold;
  int rank, consumer;
  uint32_t turn = 0;

  Accumulator acc{kParts * kChunkCols};
  std::vector<MaskDraw<kParts>> masks = std::vector<MaskDraw<kParts>>(128);
  using Products = std::vector<std::pair<int, int>>;  // stage, block
  std::vector<Products> groups{};                     // closed, not yet done
  Products open{};

  Stage& stage_at(int stage) { return cluster[rank].ring[stage]; }

  void await_full(RingPlace place) {
    const Barrier& full = stage_at(place.stage).full;
    parties.wait(lock, [&full, place] { return full.over(place.phase); });
  }
  // Arrives at every block of the cluster: each of them writes to this one's stage.
  void release(int stage) {
    Stage& mine = stage_at(stage);
    if (++mine.given_back == (tile.ping_pong() ? 1 : kConsumers)) {
      mine.given_back = 0;
      std::fill(mine.left.begin(), mine.left.end(), kPoison);
      std::fill(mine.right.begin(), mine.right.end(), kPoison);
    }
    for (Block& block : cluster) block.ring[stage].empty.arrive();
  }

  void open_products() {}
  void multiply(int stage, int block) {
    open.push_back({stage, block});
  }
  void close_products() {
    groups.push_back(open);
    open.clear();
  }
  void await_products_but_last() { done(1); }
  void await_products() { done(0); }
  void clear() { std::fill(acc.held.begin(), acc.held.end(), 0.0f); }

  void begin_mask(Element first) {
    for (int thread = 0; thread < 128; ++thread)
      masks[thread].begin(cols, first.row, first.col, thread);
  }
  void draw_mask() {
    for (auto& mask : masks) mask.step(seed, threshold);
  }
  void finish_mask() {
    for (auto& mask : masks) mask.finish(seed, threshold);
  }
  void drop() {
    for (int thread = 0; thread < 128; ++thread)
      for (int part = 0; part < kParts; ++part)
        for (int i = 0; i < kMaskRegisters; ++i)
          if (!register_kept(masks[thread].bits[part], masks[thread ^ 1].bits[part], thread, i))
            acc.at(thread, part * kMaskRegisters + i) = 0.0f;
  }

  // The first may start at once; each passes the turn to the other.
  void await_turn() {
    const Barrier& mine = cluster[rank].turn[consumer];
    const uint32_t parity = (turn++ + (consumer == 0 ? 1 : 0)) % 2;
    parties.wait(lock, [&mine, parity] { return mine.over(parity); });
  }
  void pass_turn() { cluster[rank].turn[1 - consumer].arrive(); }

  void store(Element first) {
    require(groups.empty() && open.empty(), kReadNothing);
    if (first.row < rows) store_tile(acc, first.row, first.col);
  }
  void finish_stores() {}

 private:
  void done(size_t but) {
    while (groups.size() > but) {
      for (const auto& [stage, block] : groups.front()) product(stage_at(stage), block);
      groups.erase(groups.begin());
    }
  }

  void product(const Stage& stage, int block) {
    const int first_row = consumer_row(tile, consumer), first = block * kBlockDepth;
    std::vector<float> left(kGroupRows * kBlockDepth), right(tile.cols * kBlockDepth);
    for (int k = 0; k < kBlockDepth; ++k) {
      for (int row = 0; row < kGroupRows; ++row)
        left[row * kBlockDepth + k] =
            value_of<T>(stage.left[left_element(first_row + row, first + k)]);
      for (int col = 0; col < tile.cols; ++col)
        right[col * kBlockDepth + k] =
            value_of<T>(stage.right[right_element(tile, col, first + k)]);
    }
    for (int thread = 0; thread < 128; ++thread)
      for (int i = 0; i < tile.cols / 2; ++i) {
        const Element e = accumulator_element(thread, i);
        float sum = acc.at(thread, i);
        for (int k = 0; k < kBlockDepth; ++k)
          sum += left[e.row * kBlockDepth + k] * right[e.col * kBlockDepth + k];
        acc.at(thread, i) = sum;
      }
  }
};

// The whole product; store_tile sees each warpgroup's part of each tile.
template <typename T, int kParts, class StoreTile>
void run(
    const HopperTile& tile, const Operands& operands, int64_t rows, int64_t cols,
    const RankLoop& loop, const int64_t* seed, uint32_t threshold, int device_sms,
    StoreTile store_tile) {
  require(tile.shared_bytes() <= kSharedLimit && tile.stages() >= 2, kSharedTooLarge);
  const TileGrid grid = tile_grid(tile, rows, cols);
  const bool masked = tile.small_first() && seed != nullptr && loop.rank > 0;
  const int clusters = std::clamp<int>(device_sms / tile.cluster, 1, int(grid.units()));
  for (int c = 0; c < clusters; ++c) {
    Stage empty{Halves(tile.left_elements(), kPoison), Halves(tile.right_elements(), kPoison),
                {}, {}, 0};
    empty.full.init(1);
    empty.empty.init(tile.cluster * (tile.ping_pong() ? 1 : kConsumers));
    Block block{std::vector<Stage>(tile.stages(), empty), {}};
    for (Barrier& turn : block.turn) turn.init(1);
    std::vector<Block> cluster(tile.cluster, block);

    Parties parties(tile.cluster * (1 + kConsumers));
    std::vector<std::thread> threads;
    for (int rank = 0; rank < tile.cluster; ++rank) {
      const BlockPlace place{c, clusters, rank};
      threads.emplace_back([&, rank, place] {
        parties.run([&](auto& lock) {
          Fetcher fetcher{tile, operands, cluster, parties, lock, rank};
          produce(fetcher, tile, grid, loop, place);
        });
      });
      for (int consumer = 0; consumer < kConsumers; ++consumer)
        threads.emplace_back([&, rank, place, consumer] {
          parties.run([&](auto& lock) {
            Computer<T, kParts, StoreTile> computer{
                tile, cluster, parties, lock, store_tile, rows, cols,
                masked ? uint64_t(*seed) : 0, threshold, rank, consumer};
            for (auto& mask : computer.masks) mask.left = 0;
            compute(computer, tile, grid, loop, place, consumer, masked);
          });
        });
    }
    for (std::thread& thread : threads) thread.join();
    require(parties.failure == kFine, Wrong(parties.failure));
    for (const Block& b : cluster)
      for (const Stage& stage : b.ring)
        for (const Halves* part : {&stage.left, &stage.right})
          require(std::count(part->begin(), part->end(), kPoison) == int64_t(part->size()),
                  kLeftOver);
  }
}

}  // namespace hopper_host
