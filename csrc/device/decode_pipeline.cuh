// How a tile gets from its page into a stage of shared memory: the only part of decode that differs
// between architectures.
//
// A call reads a page once, and the next one comes when the other layers' pages have passed through
// the L2: copies ask to be evicted first, so that they leave other data alone.
//
// Both are run by producer warps, all lanes alike: wait until the stage is empty, copy, arrive at
// `full` when everything has landed.  batch() tiles are handled a step; lane_tile() is the lane's.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../params.h"
#include "../ptx/bulk_copy.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ptx/smem.cuh"
#include "decode_key_codes.cuh"
#include "decode_plan.h"
#include "decode_share.cuh"
#include "page_boxes.cuh"
#include "parameter_lines.cuh"
#include "tensor_map.h"

namespace tq4 {

// A consumer warp's place in the CTA.
struct ConsumerPlace {
  int32_t team, slot;
  int32_t head;                // of the chunk
  int32_t first_row;           // of the KV head's rows
  float key_unit, value_unit;  // of the tables
};

// What a consumer warp needs between tiles of different segments only, kept out of the registers of
// the tile loop.
struct WarpScratch {
  DecodeSegment segment;
  RingPosition queue;  // of the next segment
  ConsumerPlace place;
  RingPosition ring;  // of the segment's first tile
};

struct DecodeShared {
  uint64_t full[kDecodeMaxStages], empty[kDecodeMaxStages];
  PlainKeyCodes::Tables plain_codes;
  ShareWalk share[kDecodeProducers];
  SegmentQueue queue;
  RingPosition queue_end;  // where the producer adds the next segment
  WarpScratch warps[16];
  CopyPiece pieces[kMaxCopyPieces];  // of a tile, for bulk copies
  SplitKeyCodes::Tables split_codes;
  ParameterLines lines[16];
};
static_assert(sizeof(DecodeShared) <= kDecodeSharedBytes, "reserved by the plan");

// What both have.
struct DecodeRing {
  const PageView& cache;
  const DecodePlan& plan;
  DecodeShared& shared;
  uint32_t stages;

  __device__ __forceinline__ uint32_t full(int stage) const {
    return ptx::smem_address(&shared.full[stage]);
  }
  __device__ __forceinline__ uint32_t empty(int stage) const {
    return ptx::smem_address(&shared.empty[stage]);
  }
  // Where a run or piece of the tile begins.  Offsets within a page fit in 32 bits.
  template <typename Run>
  __device__ __forceinline__ const uint8_t* source(int page, const Run& run, int tile_in_block,
                                                   int chunk) const {
    return cache.base + page * cache.block_stride +
           (run.src + tile_in_block * run.tile_stride + chunk * run.chunk_stride);
  }
};

// sm_80: cp.async, 16 bytes a lane where alignment allows.  An instruction moves 512 bytes at most
// and takes several others, so that one warp would be what decode waits for: several take the tiles
// in turn.
struct CpAsyncPipeline : DecodeRing {
  struct Maps {};
  static constexpr int kMostProducers = kDecodeProducers;
  TQ4_DEVICE static constexpr bool copies_tiles(const DecodePlan&) { return false; }
  TQ4_DEVICE static constexpr bool copies_pieces(const DecodePlan&) { return false; }
  TQ4_DEVICE static void copy_tiles(const Maps&, int, int, int, int, RingPosition&) {}
  static constexpr int kFullArrivals = kWarpSize;
  TQ4_DEVICE static constexpr int batch() { return 1; }
  TQ4_DEVICE static constexpr int lane_tile() { return 0; }

  // Contiguous bytes.  The copies of an unrolled step differ in nothing but constants.
  template <int kBytes>
  __device__ __forceinline__ static void copy_span(uint32_t dst, const uint8_t* src, int bytes) {
    constexpr int kStep = kBytes * kWarpSize, kUnrolled = 8;
    const int own = kBytes * static_cast<int>(threadIdx.x % kWarpSize);
    const uint64_t policy = ptx::read_once_policy();
    int left = bytes - own;
    dst += own;
    src += own;
#pragma unroll 1
    for (; left > (kUnrolled - 1) * kStep; left -= kUnrolled * kStep) {
#pragma unroll
      for (int i = 0; i < kUnrolled; ++i) {
        ptx::cp_async_once<kBytes>(dst + i * kStep, src + i * kStep, policy);
      }
      dst += kUnrolled * kStep;
      src += kUnrolled * kStep;
    }
#pragma unroll 1
    for (; left > 0; left -= kStep) {
      ptx::cp_async_once<kBytes>(dst, src, policy);
      dst += kStep;
      src += kStep;
    }
  }

  // All repetitions in one sequence, whose elements are dealt to the lanes in turn.
  template <int kBytes>
  __device__ __forceinline__ void copy_rows(const CopyRun& run, uint32_t dst,
                                            const uint8_t* src) const {
    const int lane = threadIdx.x % kWarpSize;
    const int bytes = run.bytes, elements = static_cast<int>(run.row.divisor);
    const int step_rep = static_cast<int>(run.row.quotient(kWarpSize));
    const int step = (kWarpSize - step_rep * elements) * kBytes;
    const int dst_step = step_rep * plan.copy.dst_stride + step;
    const int src_step = step_rep * plan.copy.src_stride + step;
    // To the next repetition, where a step leads past the end of one.
    const int dst_carry = plan.copy.dst_stride - bytes;
    const int src_carry = plan.copy.src_stride - bytes;
    const uint64_t policy = ptx::read_once_policy();
    const int rep = static_cast<int>(run.row.quotient(lane));
    int at = (lane - rep * elements) * kBytes;  // in its repetition
    dst += rep * plan.copy.dst_stride + at;
    uint32_t offset = rep * plan.copy.src_stride + at;
#pragma unroll 4
    for (int left = plan.copy.reps * elements - lane; left > 0; left -= kWarpSize) {
      ptx::cp_async_once<kBytes>(dst, src + offset, policy);
      dst += dst_step;
      offset += src_step;
      at += step;
      if (at >= bytes) {
        at -= bytes;
        dst += dst_carry;
        offset += src_carry;
      }
    }
  }

  template <int kBytes>
  __device__ __forceinline__ void copy_run(const CopyRun& run, uint32_t dst,
                                           const uint8_t* src) const {
    if (plan.copy.reps == 1) {
      copy_span<kBytes>(dst, src, run.bytes);
    } else {
      copy_rows<kBytes>(run, dst, src);
    }
  }

  __device__ __forceinline__ void copy(bool, int page, int tile_in_block, int chunk,
                                       RingPosition at) const {
    ptx::mbarrier_wait(empty(at.stage), at.parity ^ 1);  // its last readers are done
    const uint32_t stage = stages + at.stage * plan.copy.stage_bytes;
#pragma unroll 1
    for (int i = 0; i < plan.copy.num_runs; ++i) {
      const CopyRun& run = plan.copy.run[i];
      const uint8_t* src = source(page, run, tile_in_block, chunk);
      if (run.width == 16) {
        copy_run<16>(run, stage + run.dst, src);
      } else if (run.width == 8) {
        copy_run<8>(run, stage + run.dst, src);
      } else {
        copy_run<4>(run, stage + run.dst, src);
      }
    }
    ptx::mbarrier_arrive_on_cp_async(full(at.stage));
  }
};

// sm_90: bulk copies, one a run and repetition, one lane each.  Where a tile is a single run, one
// lane copies tile after tile; where stages are many and small as well (few KV heads), several
// tiles are handled a step, a lane each.  Some heads of token-major pages are boxes of a tensor
// map: all rows of a tile, which take the copy engine less time than one of them as a copy of its
// own would.
struct BulkPipeline : DecodeRing {
  using Maps = PageMaps;
  static constexpr int kMostProducers = 1;
  static constexpr int kFullArrivals = 1;

  // Tile after tile, by copy_tiles().
  __device__ __forceinline__ static bool copies_tiles(const DecodePlan& plan) {
    return plan.whole_tiles || plan.boxes;
  }
  // copy() takes them from shared memory.
  __device__ __forceinline__ static bool copies_pieces(const DecodePlan& plan) {
    return !copies_tiles(plan);
  }

  // `count` tiles; `page` and `tile_in_block` of tile i are lane i's, who works out where it is.
  __device__ __forceinline__ void copy_tiles(const Maps& maps, int page, int tile_in_block,
                                             int chunk, int count, RingPosition& ring) const {
    if (plan.boxes) return copy_boxes(maps, page, tile_in_block, chunk, count, ring);
    const uint64_t own =
        reinterpret_cast<uint64_t>(source(page, plan.copy.run[0], tile_in_block, chunk));
    constexpr uint32_t kEmpty = offsetof(DecodeShared, empty) - offsetof(DecodeShared, full);
    const uint32_t fulls = full(0);
    int stage = ring.stage;
    uint32_t parity = ring.parity;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const uint64_t src = __shfl_sync(kFullWarp, own, i);
      const uint32_t barrier = fulls + 8 * stage;
      ptx::mbarrier_wait(barrier + kEmpty, parity ^ 1);  // its last readers are done
      if (threadIdx.x % kWarpSize == 0) {
        ptx::mbarrier_arrive_expect_bytes(barrier, plan.copy.bytes);
        ptx::bulk_copy_once_to_shared(stages + stage * plan.copy.stage_bytes,
                                      reinterpret_cast<const uint8_t*>(src), plan.copy.bytes,
                                      barrier, ptx::read_once_policy());
      }
      if (++stage == plan.num_stages) stage = 0, parity ^= 1;
    }
    ring = {stage, parity};
  }

  __device__ __forceinline__ int batch() const { return plan.bulk_batch; }
  __device__ __forceinline__ int lane_tile() const {
    // Volatile: not kept in a register between tiles.
    return plan.bulk_batch > 1 ? static_cast<int>(ptx::thread_idx_volatile() % kWarpSize) : 0;
  }

  __device__ __forceinline__ void copy(bool active, int page, int tile_in_block, int chunk,
                                       RingPosition at) const {
    int piece = plan.bulk_batch > 1 ? 0 : static_cast<int>(threadIdx.x % kWarpSize);
    active = active && piece < plan.copy.num_pieces();
    at.advance(lane_tile(), plan.num_stages);
    if (active) {
      ptx::mbarrier_wait(empty(at.stage), at.parity ^ 1);  // its last readers are done
      if (piece == 0) ptx::mbarrier_arrive_expect_bytes(full(at.stage), plan.copy.bytes);
    }
    __syncwarp();  // the bytes are expected before any can land
    if (!active) return;
    const uint32_t stage = stages + at.stage * plan.copy.stage_bytes;
#pragma unroll 1
    for (; piece < plan.copy.num_pieces(); piece += kWarpSize) {
      const CopyPiece p = reload(shared.pieces[piece]);
      ptx::bulk_copy_once_to_shared(stage + p.dst, source(page, p, tile_in_block, chunk), p.bytes,
                                    full(at.stage), ptx::read_once_policy());
    }
  }

 private:
  // copy_tiles() of boxes.
  __device__ __forceinline__ void copy_boxes(const Maps& maps, int page, int tile_in_block,
                                             int chunk, int count, RingPosition& ring) const {
    constexpr uint32_t kEmpty = offsetof(DecodeShared, empty) - offsetof(DecodeShared, full);
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const int its_page = __shfl_sync(kFullWarp, page, i);
      const int token = __shfl_sync(kFullWarp, tile_in_block, i) * kTileTokens;
      const uint32_t barrier = full(ring.stage);
      ptx::mbarrier_wait(barrier + kEmpty, ring.parity ^ 1);  // its last readers are done
      if (threadIdx.x % kWarpSize == 0) {
        ptx::mbarrier_arrive_expect_bytes(barrier, plan.copy.bytes);
        const int heads = chunk * plan.heads_per_chunk;
        copy_page_boxes(maps, plan.copy.stage, heads * plan.copy.stage.code_head_stride, heads * 4,
                        its_page, token, stages + ring.stage * plan.copy.stage_bytes, barrier);
      }
      ring.advance(1, plan.num_stages);
    }
  }
};

}  // namespace tq4
