// What the parties of a block of the Hopper product do, step by step: one thread that fetches, two
// warpgroups that compute, and a ring of stages of shared memory between them.
//
// Written against a machine: on the device its barriers and instructions (cuda/hopper_kernel.cuh),
// in tests/native threads of the host that keep the same barriers, so that order, turns and the
// reuse of stages are run and not only read.
//
// A stage's barriers have phases: await(phase) returns once the phase of that parity is over, and a
// fresh barrier is in phase 0, so a producer that starts with 1 finds every stage empty.

#pragma once

#include "hopper_epilogue.h"

#ifdef __CUDACC__
#define DK_ROLE __device__ __forceinline__
#define DK_UNROLL _Pragma("unroll")
#define DK_NO_UNROLL _Pragma("unroll 1")
#else
#define DK_ROLE inline
#define DK_UNROLL
#define DK_NO_UNROLL
#endif

namespace decomp_kernels {

struct RingPlace {
  int stage;
  uint32_t phase;

  DK_HOST_DEVICE void next(int stages) {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
  DK_HOST_DEVICE void skip(int count, int stages) {
    const int to = stage + count;
    phase ^= to / stages & 1;
    stage = to % stages;
  }
};

// Where a block stands: its cluster among the clusters, itself in the cluster.
struct BlockPlace {
  int cluster, clusters, rank;
};

template <class Machine>
DK_ROLE void produce(
    Machine& m, const HopperTile& tile, const TileGrid& grid, const RankLoop& loop,
    const BlockPlace& block) {
  const int units = int(grid.units());
  const UnitWalk walk = unit_walk(tile, block.cluster, block.clusters, kProducer);
  RingPlace place{0, 1};
  DK_NO_UNROLL
  for (int unit = walk.first; unit < units; unit += walk.step) {
    const TilePlace at = grid.place(unit);
    const int first_row = tile_first_row(tile, at, block.rank);
    DK_NO_UNROLL
    for (int step = 0; step < loop.steps(); ++step) {
      m.await_empty(place);
      m.expect(place.stage, tile.stage_bytes());  // zeros from outside a tensor count too
      m.fetch(place.stage, loop, step, first_row, at.col_tile * tile.cols);
      place.next(tile.stages());
    }
  }
  // A block of a cluster stays until nobody writes to its memory or barriers any more.
  for (int stage = 0; stage < tile.stages(); ++stage) {
    m.await_empty(place);
    place.next(tile.stages());
  }
}

// One warpgroup's reading of the ring.  One stage's products stay in flight while the next stage is
// waited for; a stage is given back once its products are done.
template <class Machine>
struct RingReader {
  Machine& m;
  RingPlace place;
  int held;        // the stage whose products are in flight
  bool in_flight;

  DK_ROLE void give_back() {
    if (in_flight) m.release(held);
    in_flight = false;
  }
  DK_ROLE void finish_stage(int stages) {
    m.await_products_but_last();  // this stage's last group, so the stage before it is done
    give_back();
    held = place.stage;
    in_flight = true;
    place.next(stages);
  }
  DK_ROLE void drain() {
    m.await_products();
    give_back();
  }
};

// The base pair's stages; the mask of the tile after is drawn with products in flight.
template <class Machine>
DK_ROLE void multiply_base(RingReader<Machine>& ring, const HopperTile& tile, int steps) {
  DK_NO_UNROLL
  for (int step = 0; step < steps; ++step) {
    ring.m.await_full(ring.place);
    ring.m.open_products();
    DK_UNROLL
    for (int block = 0; block < kStageBlocks; ++block) ring.m.multiply(ring.place.stage, block);
    ring.m.close_products();
    ring.m.draw_mask();
    ring.finish_stage(tile.stages());
  }
}

// The small pair's stages: only as many blocks as the rank fills, a group each.
template <class Machine>
DK_ROLE void multiply_small(
    RingReader<Machine>& ring, const HopperTile& tile, const RankLoop& loop) {
  DK_NO_UNROLL
  for (int first = 0; first < loop.rank; first += kDepth) {
    ring.m.await_full(ring.place);
    const int blocks = loop.small_blocks(first);
    DK_NO_UNROLL
    for (int block = 0; block < blocks; ++block) {
      ring.m.open_products();
      ring.m.multiply(ring.place.stage, block);
      ring.m.close_products();
    }
    ring.finish_stage(tile.stages());
  }
}

template <class Machine>
DK_ROLE void compute(
    Machine& m, const HopperTile& tile, const TileGrid& grid, const RankLoop& loop,
    const BlockPlace& block, int consumer, bool masked) {
  const int units = int(grid.units());
  const UnitWalk walk = unit_walk(tile, block.cluster, block.clusters, consumer);
  const auto first_of = [&](int unit) {  // the first element of this warpgroup's part
    const TilePlace place = grid.place(unit);
    return Element{tile_first_row(tile, place, block.rank) + consumer_row(tile, consumer),
                   place.col_tile * tile.cols};
  };
  RingReader<Machine> ring{m, {0, 0}, 0, false};
  if (tile.ping_pong() && consumer == 1) ring.place.skip(loop.steps(), tile.stages());
  if (masked && walk.first < units) m.begin_mask(first_of(walk.first));

  DK_NO_UNROLL
  for (int unit = walk.first; unit < units; unit += walk.step) {
    m.clear();
    if (tile.small_first()) {
      if (masked) m.finish_mask();
      multiply_small(ring, tile, loop);
      ring.drain();
      if (masked) {
        m.drop();
        if (unit + walk.step < units) m.begin_mask(first_of(unit + walk.step));
      }
    }
    // In ping-pong the matrix units belong to one warpgroup at a time; the other one stores.
    if (tile.ping_pong()) m.await_turn();
    multiply_base(ring, tile, loop.base_steps());
    if (!tile.small_first()) multiply_small(ring, tile, loop);
    if (tile.ping_pong()) m.pass_turn();
    ring.drain();
    if (tile.ping_pong()) ring.place.skip(loop.steps(), tile.stages());  // the other one's tile
    m.store(first_of(unit));
  }
  m.finish_stores();
}

}  // namespace decomp_kernels
