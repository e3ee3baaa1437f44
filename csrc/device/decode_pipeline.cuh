// How a tile gets from its page into a stage of shared memory: the only part of decode that differs
// between architectures.
//
// Both are run by the one producer warp, all lanes alike: wait until the stage is empty, copy, arrive
// at `full` when everything has landed.  `batch` tiles are handled a step; `lane_tile` is the lane's.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../params.h"
#include "../ptx/bulk_copy.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ptx/smem.cuh"
#include "decode_plan.h"
#include "decode_schedule.h"

namespace tq4 {

// A position in the stage ring, advanced tile by tile.
struct RingPosition {
  int stage;
  uint32_t parity;  // of the phase in which the stage is filled for this tile

  __device__ __forceinline__ void advance(int tiles, int num_stages) {
    stage += tiles;
    while (stage >= num_stages) {
      stage -= num_stages;
      parity ^= 1;
    }
  }
};

// A consumer warp's place in the CTA.
struct ConsumerPlace {
  int32_t team, slot;
  int32_t head;       // of the chunk
  int32_t first_row;  // of the KV head's rows
  float key_unit, value_unit;  // of the pair table
};

// What a consumer warp needs between tiles of different segments only, kept out of the registers of
// the tile loop.
struct WarpScratch {
  SegmentWalker walker;
  DecodeSegment segment;
  ConsumerPlace place;
  RingPosition ring;  // of the segment's first tile
};

struct DecodeShared {
  uint64_t full[kDecodeMaxStages], empty[kDecodeMaxStages];
  int32_t warp_sums[32];
  int8_t key_codes[16];
  uint32_t bit3_mask;
  int32_t start_seq, start_prefix, total;
  WarpScratch warps[16];
};
static_assert(sizeof(DecodeShared) <= kDecodeSharedBytes, "reserved by the plan");

// Addresses shared by both.
struct DecodeRing {
  const PageView& cache;
  const DecodePlan& plan;
  uint32_t full, empty, stages;

  __device__ __forceinline__ DecodeRing(const PageView& cache, const DecodePlan& plan,
                                        uint32_t barriers, uint32_t stages)
      : cache(cache),
        plan(plan),
        full(barriers + static_cast<uint32_t>(offsetof(DecodeShared, full))),
        empty(barriers + static_cast<uint32_t>(offsetof(DecodeShared, empty))),
        stages(stages) {}

  __device__ __forceinline__ const uint8_t* source(int page, const CopyRun& run, int tile_in_block,
                                                   int chunk) const {
    return cache.base + page * cache.block_stride + run.src + tile_in_block * run.tile_stride +
           static_cast<int64_t>(chunk) * run.chunk_stride;
  }
};

// sm_80: cp.async, 16 bytes a lane where alignment allows.
struct CpAsyncPipeline : DecodeRing {
  static constexpr int kFullArrivals = kWarpSize;
  static constexpr int batch = 1, lane_tile = 0;
  using DecodeRing::DecodeRing;

  // The elements of a run, all repetitions in one sequence, are dealt to the lanes in turn.
  template <int kBytes>
  __device__ __forceinline__ void copy_runs(int page, int tile_in_block, int chunk,
                                            uint32_t stage) const {
    const int lane = threadIdx.x % kWarpSize;
    for (int i = 0; i < plan.copy.num_runs; ++i) {
      const CopyRun& run = plan.copy.run[i];
      const uint8_t* src = source(page, run, tile_in_block, chunk);
      const uint32_t dst = stage + run.dst;
      const int elements = run.bytes / kBytes;
      int rep = lane / elements, at = (lane - rep * elements) * kBytes;
      const int step_rep = kWarpSize / elements;
      const int step_at = (kWarpSize - step_rep * elements) * kBytes;
#pragma unroll 4
      while (rep < plan.copy.reps) {
        ptx::cp_async<kBytes>(dst + rep * plan.copy.dst_stride + at,
                              src + rep * plan.copy.src_stride + at);
        rep += step_rep;
        at += step_at;
        if (at >= run.bytes) {
          at -= run.bytes;
          ++rep;
        }
      }
    }
  }

  __device__ __forceinline__ void copy(bool, int page, int tile_in_block, int chunk,
                                       RingPosition at) const {
    ptx::mbarrier_wait(empty + 8 * at.stage, at.parity ^ 1);  // its last readers are done
    const uint32_t stage = stages + at.stage * plan.copy.stage_bytes;
    if (plan.copy.width == 16) {
      copy_runs<16>(page, tile_in_block, chunk, stage);
    } else if (plan.copy.width == 8) {
      copy_runs<8>(page, tile_in_block, chunk, stage);
    } else {
      copy_runs<4>(page, tile_in_block, chunk, stage);
    }
    ptx::mbarrier_arrive_on_cp_async(full + 8 * at.stage);
  }
};

// sm_90: bulk copies, one a run and repetition, one lane each.  Where a tile is a single run and
// stages are many and small (few KV heads), several tiles are handled a step, a lane each.
struct BulkPipeline : DecodeRing {
  static constexpr int kFullArrivals = 1;
  int batch, lane_tile, lane_piece, pieces;

  __device__ __forceinline__ BulkPipeline(const PageView& cache, const DecodePlan& plan,
                                          uint32_t barriers, uint32_t stages)
      : DecodeRing(cache, plan, barriers, stages) {
    const int lane = threadIdx.x % kWarpSize;
    pieces = plan.copy.num_runs * plan.copy.reps;
    batch = pieces == 1 ? max(1, min(kWarpSize, plan.num_stages / 8)) : 1;
    lane_tile = batch > 1 ? lane : 0;
    lane_piece = batch > 1 ? 0 : lane;
  }

  __device__ __forceinline__ void copy(bool active, int page, int tile_in_block, int chunk,
                                       RingPosition at) const {
    const uint32_t barrier = full + 8 * at.stage;
    if (active && lane_piece < pieces) {
      ptx::mbarrier_wait(empty + 8 * at.stage, at.parity ^ 1);  // its last readers are done
      if (lane_piece == 0) ptx::mbarrier_arrive_expect_bytes(barrier, plan.copy.bytes);
    }
    __syncwarp();  // the bytes are expected before any can land
    if (!active) return;
    const uint32_t stage = stages + at.stage * plan.copy.stage_bytes;
    for (int piece = lane_piece; piece < pieces; piece += kWarpSize) {
      const int rep = piece % plan.copy.reps;
      const CopyRun& run = plan.copy.run[piece / plan.copy.reps];
      ptx::bulk_copy_to_shared(stage + run.dst + rep * plan.copy.dst_stride,
                               source(page, run, tile_in_block, chunk) + rep * plan.copy.src_stride,
                               run.bytes, barrier);
    }
  }
};

}  // namespace tq4
