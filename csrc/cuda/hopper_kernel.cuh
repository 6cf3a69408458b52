// The Hopper product as one persistent kernel: a warpgroup that fetches, two that compute.
//
//     D [rows, cols] = left right + small_left small_right        (common/rank_loop.h)
//
// One thread keeps the ring full: for each tile, kDepth inner elements of the base pair a stage,
// and of the small pair as further iterations of the same loop.  Who computes sees one sequence of
// full stages.  Two orders, by operation: the small pair last (forward), or first, with the dropout
// mask on the accumulator between the two (input gradient).

#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "../common/hopper_mask.h"
#include "hopper_problem.h"
#include "hopper_product.cuh"
#include "hopper_store.cuh"

namespace decomp_kernels::cuda {

inline constexpr int kHopperThreads = 128 * (1 + kConsumers);
inline constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // of 65,536 for 384

template <typename T, HopperTile tile>
struct HopperShared {
  using Element = typename MatrixElement<T>::type;
  using Order = cutlass::OrderedSequenceBarrier<1, kConsumers>;

  alignas(1024) Element left[tile.stages() * tile.left_elements()];
  alignas(1024) Element right[tile.stages() * tile.right_elements()];
  alignas(1024) uint16_t staged[kConsumers][tile.buffers()][tile.buffer_elements()];
  std::conditional_t<tile.op == HopperOp::kInputGradient, float[kConsumers][4][kChunkCols], char>
      sums;
  typename Product<T, tile>::Ring::SharedStorage ring;
  typename Order::SharedStorage order;
};

// Fills one stage with what ``step`` multiplies.
template <typename T, HopperTile tile>
CUTLASS_DEVICE void fetch(
    HopperShared<T, tile>& shared, const HopperMaps& maps, const RankLoop& loop, int step,
    int first_row, int first_col, int rank_in_cluster, int stage, uint64_t* full) {
  constexpr uint64_t hint = uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  const bool small = loop.is_small(step);
  const int inner = loop.first_inner(step);

  const BoxPlace left = left_box(first_row, inner);
  cute::SM90_TMA_LOAD_2D::copy(
      small ? &maps.small_left : &maps.left, full, hint,
      shared.left + stage * tile.left_elements() + left.offset, left.inner, left.outer);

  const CUtensorMap* map = small ? &maps.small_right : &maps.right;
  CUTLASS_PRAGMA_UNROLL
  for (int box = 0; box < right_boxes(tile); ++box) {
    const BoxPlace right = right_box(tile, rank_in_cluster, box, first_col, inner);
    auto* place = shared.right + stage * tile.right_elements() + right.offset;
    if constexpr (tile.cluster == 1) {
      cute::SM90_TMA_LOAD_2D::copy(map, full, hint, place, right.inner, right.outer);
    } else {
      constexpr uint16_t all = (1 << tile.cluster) - 1;
      cute::SM90_TMA_LOAD_MULTICAST_2D::copy(
          map, full, all, hint, place, right.inner, right.outer);
    }
  }
}

// The mask on the accumulator of the small product alone.
template <int kParts, class Accumulator>
CUTLASS_DEVICE void drop(Accumulator& acc, const MaskDraw<kParts>& mask, int thread) {
  CUTLASS_PRAGMA_UNROLL
  for (int part = 0; part < kParts; ++part) {
    const uint32_t mine = mask.bits[part], other = __shfl_xor_sync(0xFFFFFFFFu, mine, 1);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kMaskRegisters; ++i) {
      float& held = acc(part * kMaskRegisters + i);
      held = register_kept(mine, other, thread, i) ? held : 0.0f;
    }
  }
}

template <int kInstance>
__global__ void __launch_bounds__(kHopperThreads, 1) hopper_kernel(
    const __grid_constant__ HopperMaps maps,
    const __grid_constant__ HopperProblem<instance_tile(kInstance).op> problem) {
  constexpr HopperTile tile = instance_tile(kInstance);
  constexpr bool small_first = tile.small_first();
  using T = std::conditional_t<instance_dtype(kInstance) == Dtype::kHalf, fp16, bf16>;
  using Shared = HopperShared<T, tile>;
  using Ring = typename Product<T, tile>::Ring;
  using Cluster = cute::Shape<cute::Int<tile.cluster>, cute::_1, cute::_1>;
  static_assert(sizeof(Shared) <= tile.shared_bytes());
  static_assert(tile.shared_bytes() <= kSharedLimit);

  // The swizzle is of addresses, so what is swizzled starts at a multiple of 1024 bytes.
  extern __shared__ __align__(1024) char raw[];
  if (cute::cast_smem_ptr_to_uint(raw) % 1024 != 0) __trap();
  Shared& shared = *reinterpret_cast<Shared*>(raw);

  const int group = cutlass::canonical_warp_group_idx(), thread = threadIdx.x % 128;
  const int consumer = group - 1;
  const int rank_in_cluster = tile.cluster == 1 ? 0 : int(cute::block_rank_in_cluster());
  const int clusters = gridDim.x / tile.cluster, cluster_index = blockIdx.x / tile.cluster;
  const int units = int(problem.grid.units());
  const RankLoop loop{problem.inner, problem.rank, small_first};

  typename Ring::Params ring_params;
  ring_params.role =
      group == 0 ? Ring::ThreadCategory::Producer : Ring::ThreadCategory::Consumer;
  ring_params.is_leader = threadIdx.x == 0;
  ring_params.num_consumers = tile.ping_pong() ? 128 : 128 * kConsumers;
  ring_params.transaction_bytes = tile.stage_bytes();  // zeros from outside count too
  Ring ring(shared.ring, ring_params, Cluster{});
  typename Shared::Order order(shared.order, {uint32_t(consumer), 128});
  cutlass::pipeline_init_arrive_relaxed(tile.cluster);
  cutlass::pipeline_init_wait(tile.cluster);

  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(&maps.left);
    cute::prefetch_tma_descriptor(&maps.right);
  }
  if (group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<kProducerRegisters>();
    if (threadIdx.x != 0) return;
    auto state = cutlass::make_producer_start_state<Ring>();
    const UnitWalk walk = unit_walk(tile, cluster_index, clusters, kProducer);
    for (int unit = walk.first; unit < units; unit += walk.step) {
      const TilePlace place = problem.grid.place(unit);
      const int first_row = tile_first_row(tile, place, rank_in_cluster);
      for (int step = 0; step < loop.steps(); ++step) {
        ring.producer_acquire(state);
        fetch<T, tile>(shared, maps, loop, step, first_row, place.col_tile * tile.cols,
                       rank_in_cluster, state.index(), ring.producer_get_barrier(state));
        ++state;
      }
    }
    ring.producer_tail(state);  // a block of a cluster stays until nobody writes to it any more
    return;
  }

  cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
  Product<T, tile> product(ring);
  if (tile.ping_pong() && consumer == 1) product.skip(loop.steps());
  auto fragments = product.fragments(shared, consumer);
  Store<T, tile> store{shared.staged[consumer], thread, consumer};
  const bool masked = small_first && problem.seed != nullptr && problem.rank > 0;
  const uint64_t seed = masked ? uint64_t(*problem.seed) : 0;

  const UnitWalk walk = unit_walk(tile, cluster_index, clusters, consumer);
  const auto first_of = [&](int unit) {  // the first element of this warpgroup's part
    const TilePlace place = problem.grid.place(unit);
    return decomp_kernels::Element{
        tile_first_row(tile, place, rank_in_cluster) + consumer_row(tile, consumer),
        place.col_tile * tile.cols};
  };
  MaskDraw<tile.cols / kChunkCols> mask;
  mask.left = 0;
  const auto begin_mask = [&](int unit) {
    const decomp_kernels::Element first = first_of(unit);
    mask.begin(problem.cols, first.row, first.col, thread);
  };
  if (masked && walk.first < units) begin_mask(walk.first);

  for (int unit = walk.first; unit < units; unit += walk.step) {
    const decomp_kernels::Element first = first_of(unit);
    auto acc = product.accumulator();
    cute::clear(acc);

    if constexpr (small_first) {
      if (masked) mask.finish(seed, problem.threshold);
      product.small(fragments, acc, loop);
      product.drain(acc);
      if (masked) {
        drop(acc, mask, thread);
        if (unit + walk.step < units) begin_mask(unit + walk.step);
      }
    }
    if constexpr (tile.ping_pong()) order.wait();
    product.base(fragments, acc, loop.base_steps(), [&] {
      if constexpr (small_first) mask.step(seed, problem.threshold);
    });
    if constexpr (!small_first) product.small(fragments, acc, loop);
    if constexpr (tile.ping_pong()) order.arrive();
    product.drain(acc);
    if constexpr (tile.ping_pong()) product.skip(loop.steps());

    if constexpr (tile.op == HopperOp::kForward)
      store_forward(store, problem.end, maps.out, maps.z, acc, first.row, first.col);
    else
      store_gradient(store, problem.end, maps.out, shared.sums[consumer], acc, first.row,
                     first.col);
  }
  store.finish();
}

}  // namespace decomp_kernels::cuda
