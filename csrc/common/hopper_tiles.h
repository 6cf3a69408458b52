// The tiles of the Hopper product D [rows, cols], who computes which, and in which order.
//
// A warpgroup computes 64 rows of a tile.  Cooperative: the two that compute share a tile of 128
// rows.  Ping-pong: each has its own tile of 64 rows, and one computes while the other stores.
// The blocks of a cluster take neighbouring tiles of one column of tiles and share its operand.

#pragma once

#include <cstdint>

#include "dtype.h"
#include "host_device.h"
#include "rank_loop.h"

namespace decomp_kernels {

inline constexpr int kGroupRows = 64;  // rows of the accumulator of a warpgroup
inline constexpr int kConsumers = 2;   // warpgroups that compute; a third one fetches
inline constexpr int kChunkCols = 64;  // columns that leave together: 128 bytes, one swizzled row
inline constexpr int kSharedLimit = 232448;  // bytes a block may ask for on sm_90
inline constexpr int kSharedSpare = 1024;    // of them for the barriers

enum class Schedule : int { kPingPong, kCooperative };
enum class HopperOp : int { kForward, kInputGradient };

struct HopperTile {
  HopperOp op;
  Schedule schedule;
  int cols, cluster;

  constexpr bool operator==(const HopperTile&) const = default;

  DK_HOST_DEVICE constexpr bool ping_pong() const { return schedule == Schedule::kPingPong; }
  DK_HOST_DEVICE constexpr int rows() const { return ping_pong() ? kGroupRows : 2 * kGroupRows; }

  // Forward reads W [N, K] along the inner dimension; the gradient reads it along the columns.
  DK_HOST_DEVICE constexpr bool right_by_cols() const { return op == HopperOp::kInputGradient; }
  DK_HOST_DEVICE constexpr bool small_first() const { return op == HopperOp::kInputGradient; }

  // Shared memory.  Wide tiles spend it on the ring, not on a second buffer to store from.
  DK_HOST_DEVICE constexpr int left_elements() const { return rows() * kDepth; }
  DK_HOST_DEVICE constexpr int right_elements() const { return cols * kDepth; }
  DK_HOST_DEVICE constexpr int stage_bytes() const {
    return 2 * (left_elements() + right_elements());
  }
  DK_HOST_DEVICE constexpr int buffers() const { return cols > 128 ? 1 : 2; }
  DK_HOST_DEVICE constexpr int buffer_elements() const { return kGroupRows * kChunkCols; }
  DK_HOST_DEVICE constexpr int staging_bytes() const {
    const int sums = op == HopperOp::kInputGradient ? 4 * kChunkCols * 4 : 0;  // float, by warp
    return kConsumers * (buffers() * buffer_elements() * 2 + sums);
  }
  DK_HOST_DEVICE constexpr int stages() const {
    return (kSharedLimit - kSharedSpare - staging_bytes()) / stage_bytes();
  }
  DK_HOST_DEVICE constexpr int shared_bytes() const {
    return kSharedSpare + staging_bytes() + stages() * stage_bytes();
  }
};

// What is compiled: every shape for both operations and both types.  The number of an instance is
// (op * 2 + (fp16 ? 1 : 0)) * kHopperShapes + shape.
struct HopperShape {
  Schedule schedule;
  int cols, cluster;
};
inline constexpr HopperShape kHopperShape[] = {
    {Schedule::kPingPong, 128, 1},
    {Schedule::kPingPong, 256, 2},
    {Schedule::kCooperative, 128, 1},
    {Schedule::kCooperative, 256, 2},
};
inline constexpr int kHopperShapes = 4;
inline constexpr int kHopperInstances = 2 * 2 * kHopperShapes;

constexpr HopperTile hopper_tile(HopperOp op, int shape) {
  const HopperShape& s = kHopperShape[shape];
  return {op, s.schedule, s.cols, s.cluster};
}
constexpr int hopper_instance(HopperOp op, Dtype dtype, int shape) {
  return (int(op) * 2 + (dtype == Dtype::kHalf ? 1 : 0)) * kHopperShapes + shape;
}
constexpr HopperTile instance_tile(int instance) {
  return hopper_tile(HopperOp(instance / kHopperShapes / 2), instance % kHopperShapes);
}
constexpr Dtype instance_dtype(int instance) {
  return instance / kHopperShapes % 2 ? Dtype::kHalf : Dtype::kBFloat16;
}

struct TilePlace {
  int row_tile, col_tile;
};

// The tiles in units of a cluster: ``rows`` of it are cluster * tile.rows() of D.
struct TileGrid {
  int row_units, col_tiles, group;

  DK_HOST_DEVICE int64_t units() const { return int64_t(row_units) * col_tiles; }

  // ``group`` rows of units go together, down first: what they read is still in the L2 cache.
  DK_HOST_DEVICE TilePlace place(int unit) const {
    const int in_group = group * col_tiles, first = unit / in_group * group;
    const int within = unit % in_group;
    const int left = row_units - first, height = left < group ? left : group;
    return {first + within % height, within / height};
  }
};

inline constexpr int kUnitGroup = 8;

DK_HOST_DEVICE TileGrid tile_grid(const HopperTile& tile, int64_t rows, int64_t cols) {
  const int64_t unit_rows = int64_t(tile.rows()) * tile.cluster;
  return {int((rows + unit_rows - 1) / unit_rows), int((cols + tile.cols - 1) / tile.cols),
          kUnitGroup};
}

// Unit after unit of one cluster, as one of the parties sees it: who fetches takes every one, the
// consumers of a cooperative tile too; those of ping-pong take turns.
struct UnitWalk {
  int first, step;
};

inline constexpr int kProducer = -1;

DK_HOST_DEVICE UnitWalk unit_walk(
    const HopperTile& tile, int cluster_index, int clusters, int consumer) {
  const bool by_turns = tile.ping_pong() && consumer != kProducer;
  if (!by_turns) return {cluster_index, clusters};
  return {cluster_index + consumer * clusters, kConsumers * clusters};
}

// First row of the tile of a block of the cluster, and of a consumer's part of it.
DK_HOST_DEVICE int tile_first_row(const HopperTile& tile, TilePlace place, int rank_in_cluster) {
  return (place.row_tile * tile.cluster + rank_in_cluster) * tile.rows();
}
DK_HOST_DEVICE int consumer_row(const HopperTile& tile, int consumer) {
  return tile.ping_pong() ? 0 : consumer * kGroupRows;
}

}  // namespace decomp_kernels
