// The Hopper product as one persistent kernel: a warpgroup that fetches, two that compute.
//
//     D [rows, cols] = left right + small_left small_right        (common/rank_loop.h)
//
// One thread keeps the ring full: for each tile, kDepth inner elements of the base pair a stage,
// and of the small pair as further iterations of the same loop.  Two orders, by operation: the
// small pair last (forward), or first, with the dropout mask on the accumulator between the two
// (input gradient).  Here are the device's barriers and instructions; what is done with them, in
// which order, is hopper_roles.h's.

#pragma once

#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/pipeline/pipeline.hpp>

#include "../common/hopper_mask.h"
#include "../common/hopper_roles.h"
#include "hopper_problem.h"
#include "hopper_product.cuh"
#include "hopper_store.cuh"

namespace decomp_kernels::cuda {

inline constexpr int kHopperThreads = 128 * (1 + kConsumers);
inline constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // of 65,536 for 384

template <typename T, HopperTile tile>
struct HopperShared {
  using Element = typename MatrixElement<T>::type;
  using Ring = cutlass::PipelineTmaAsync<tile.stages()>;
  using Order = cutlass::OrderedSequenceBarrier<1, kConsumers>;

  alignas(1024) Element left[tile.stages() * tile.left_elements()];
  alignas(1024) Element right[tile.stages() * tile.right_elements()];
  alignas(1024) uint16_t staged[kConsumers][tile.buffers()][tile.buffer_elements()];
  std::conditional_t<tile.op == HopperOp::kInputGradient, float[kConsumers][4][kChunkCols], char>
      sums;
  typename Ring::SharedStorage ring;
  typename Order::SharedStorage order;
};

// The thread that fetches (hopper_roles.h).
template <typename T, HopperTile tile>
struct Fetcher {
  HopperShared<T, tile>& shared;
  const HopperMaps& maps;
  int rank_in_cluster;

  CUTLASS_DEVICE void await_empty(RingPlace place) {
    shared.ring.empty_barrier_[place.stage].wait(place.phase);
  }
  CUTLASS_DEVICE void expect(int stage, int bytes) {
    shared.ring.full_barrier_[stage].arrive_and_expect_tx(bytes);
  }

  CUTLASS_DEVICE void fetch(
      int stage, const RankLoop& loop, int step, int first_row, int first_col) {
    constexpr uint64_t hint = uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL);
    auto* full = reinterpret_cast<uint64_t*>(&shared.ring.full_barrier_[stage]);
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
};

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

// A warpgroup that computes (hopper_roles.h).
template <typename T, HopperTile tile, class Fragments, class Accumulator>
struct Computer {
  using Shared = HopperShared<T, tile>;
  using Ring = typename Shared::Ring;

  Shared& shared;
  const HopperMaps& maps;
  const HopperProblem<tile.op>& problem;
  Ring& ring;
  typename Shared::Order& order;
  Fragments& fragments;
  Accumulator& acc;
  Store<T, tile>& store_buffers;
  MaskDraw<tile.cols / kChunkCols>& mask;
  uint64_t seed;
  int thread, consumer;

  CUTLASS_DEVICE void await_full(RingPlace place) {
    const typename Ring::PipelineState state(place.stage, place.phase, 0);
    ring.consumer_wait(state, ring.consumer_try_wait(state));
    cute::warpgroup_fence_operand(acc);
  }
  CUTLASS_DEVICE void release(int stage) {
    ring.consumer_release(typename Ring::PipelineState(stage, 0, 0));
  }
  CUTLASS_DEVICE void open_products() { cute::warpgroup_arrive(); }
  CUTLASS_DEVICE void multiply(int stage, int block) {
    Product<T, tile>::multiply(fragments, acc, stage, block);
  }
  CUTLASS_DEVICE void close_products() { cute::warpgroup_commit_batch(); }
  CUTLASS_DEVICE void await_products_but_last() {
    cute::warpgroup_wait<1>();
    cute::warpgroup_fence_operand(acc);
  }
  CUTLASS_DEVICE void await_products() {
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(acc);
  }
  CUTLASS_DEVICE void clear() { cute::clear(acc); }

  CUTLASS_DEVICE void begin_mask(decomp_kernels::Element first) {
    mask.begin(problem.cols, first.row, first.col, thread);
  }
  CUTLASS_DEVICE void draw_mask() {
    if constexpr (tile.small_first()) mask.step(seed, problem.threshold);
  }
  CUTLASS_DEVICE void finish_mask() { mask.finish(seed, problem.threshold); }
  CUTLASS_DEVICE void drop() { decomp_kernels::cuda::drop(acc, mask, thread); }

  CUTLASS_DEVICE void await_turn() { order.wait(); }
  CUTLASS_DEVICE void pass_turn() { order.arrive(); }

  CUTLASS_DEVICE void store(decomp_kernels::Element first) {
    if constexpr (tile.op == HopperOp::kForward)
      store_forward(store_buffers, problem.end, maps.out, maps.z, acc, first.row, first.col);
    else
      store_gradient(store_buffers, problem.end, maps.out, shared.sums[consumer], acc, first.row,
                     first.col);
  }
  CUTLASS_DEVICE void finish_stores() { store_buffers.finish(); }
};

template <int kInstance>
__global__ void __launch_bounds__(kHopperThreads, 1) hopper_kernel(
    const __grid_constant__ HopperMaps maps,
    const __grid_constant__ HopperProblem<instance_tile(kInstance).op> problem) {
  constexpr HopperTile tile = instance_tile(kInstance);
  using T = std::conditional_t<instance_dtype(kInstance) == Dtype::kHalf, fp16, bf16>;
  using Shared = HopperShared<T, tile>;
  using Ring = typename Shared::Ring;
  using Cluster = cute::Shape<cute::Int<tile.cluster>, cute::_1, cute::_1>;
  static_assert(sizeof(Shared) <= tile.shared_bytes());
  static_assert(tile.shared_bytes() <= kSharedLimit);

  // The swizzle is of addresses, so what is swizzled starts at a multiple of 1024 bytes.
  extern __shared__ __align__(1024) char raw[];
  if (cute::cast_smem_ptr_to_uint(raw) % 1024 != 0) __trap();
  Shared& shared = *reinterpret_cast<Shared*>(raw);

  const int group = cutlass::canonical_warp_group_idx(), thread = threadIdx.x % 128;
  const int consumer = group - 1;
  const BlockPlace block{int(blockIdx.x) / tile.cluster, int(gridDim.x) / tile.cluster,
                         tile.cluster == 1 ? 0 : int(cute::block_rank_in_cluster())};
  const RankLoop loop{problem.inner, problem.rank, tile.small_first()};

  typename Ring::Params ring_params;
  ring_params.role =
      group == 0 ? Ring::ThreadCategory::Producer : Ring::ThreadCategory::Consumer;
  ring_params.is_leader = threadIdx.x == 0;
  ring_params.num_consumers = tile.ping_pong() ? 128 : 128 * kConsumers;
  ring_params.transaction_bytes = tile.stage_bytes();
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
    Fetcher<T, tile> fetcher{shared, maps, block.rank};
    produce(fetcher, tile, problem.grid, loop, block);
    return;
  }

  cutlass::arch::warpgroup_reg_alloc<kConsumerRegisters>();
  auto fragments = Product<T, tile>::fragments(shared, consumer);
  auto acc = Product<T, tile>::accumulator();
  Store<T, tile> store{shared.staged[consumer], thread, consumer};
  MaskDraw<tile.cols / kChunkCols> mask;
  mask.left = 0;
  const bool masked = tile.small_first() && problem.seed != nullptr && problem.rank > 0;
  Computer<T, tile, decltype(fragments), decltype(acc)> computer{
      shared, maps, problem, ring, order, fragments, acc, store, mask,
      masked ? uint64_t(*problem.seed) : 0, thread, consumer};
  compute(computer, tile, problem.grid, loop, block, consumer, masked);
}

}  // namespace decomp_kernels::cuda
