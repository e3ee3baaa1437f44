// A CTA's share of the batch, found and walked by the producer warp: all of it in registers, the
// sequences dealt out to the lanes.  Consumers get their segments from it by the queue below.
#pragma once
#include <cstdint>
#include <cstring>

#include "../ptx/arith.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ptx/smem.cuh"
#include "common.cuh"
#include "decode_schedule.h"

namespace tq4 {

// A copy of an object in shared memory that the compiler cannot know from before.
template <typename T>
__device__ __forceinline__ T reload(const T& object) {
  static_assert(sizeof(T) % 4 == 0, "in words");
  uint32_t words[sizeof(T) / 4];
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 4); ++i) {
    words[i] = ptx::ld_shared_u32(ptx::smem_address(&object) + 4 * i);
  }
  T copy;
  memcpy(&copy, words, sizeof(T));
  return copy;
}

// A position in a ring, advanced tile by tile.
struct RingPosition {
  int stage;
  uint32_t parity;  // of the phase in which the stage is filled for this tile

  // By at most twice around.
  __device__ __forceinline__ void advance(int tiles, int num_stages) {
    stage += tiles;
    if (stage >= num_stages) {
      stage -= num_stages;
      parity ^= 1;
    }
    if (tiles > num_stages && stage >= num_stages) {
      stage -= num_stages;
      parity ^= 1;
    }
  }
};

// Where the share stands, in shared memory: the producer warp has few registers.
struct alignas(16) ShareWalk {
  SegmentWalker walker;
  int32_t first;               // sequence of tiles[0]
  TileRange tiles[kWarpSize];  // of the sequences from there on, each lane's its own
  DecodeSegment segment;       // the last that next() found; without tiles when the share is done

  // Finds the share: a scan over the sequences' costs, 32 sequences at a time.
  __device__ __forceinline__ void begin(const DecodeBatch& batch, const DecodeShares& shares) {
    const int lane = threadIdx.x % kWarpSize;
    TileRange range = load(batch, lane);
    tiles[lane] = range;
    int own = batch.unit_cost(range);
#pragma unroll 1
    for (int seq = kWarpSize + lane; seq < batch.num_seqs; seq += kWarpSize) {
      own += batch.unit_cost(batch.tiles(seq));
    }
    const int64_t total =
        static_cast<int64_t>(__reduce_add_sync(kFullWarp, own)) * batch.num_chunks;
    const DecodeShare share = share_of(total, blockIdx.x, shares);
    SegmentWalker start{};
    start.end = share.length;
    start.seq = batch.num_seqs;
    int window = 0, before = 0;  // cost of the sequences before the window
    const bool alone = batch.num_seqs == 1 && start.end > 0;
    if (alone) {  // nothing to look for
      const int cost = __shfl_sync(kFullWarp, own, 0);
      start.seq = 0;
      start.enter(cost, cost, share.begin, batch.num_chunks);
    }
#pragma unroll 1
    while (!alone && start.end > 0) {
      const int cost = batch.unit_cost(range);
      int sum = cost;
#pragma unroll 1
      for (int step = 1; step < kWarpSize; step *= 2) {
        const int other = __shfl_up_sync(kFullWarp, sum, step);
        if (lane >= step) sum += other;
      }
      sum += before;
      const bool reaches = share.begin < static_cast<int64_t>(sum) * batch.num_chunks;
      const uint32_t lanes = __ballot_sync(kFullWarp, reaches);
      if (lanes != 0) {
        const int at = __ffs(static_cast<int>(lanes)) - 1;
        start.seq = window + at;
        start.enter(__shfl_sync(kFullWarp, cost, at), __shfl_sync(kFullWarp, sum, at), share.begin,
                    batch.num_chunks);
        break;
      }
      before = __shfl_sync(kFullWarp, sum, kWarpSize - 1);
      window += kWarpSize;
      range = load(batch, window + lane);
      tiles[lane] = range;
    }
    if (lane == 0) {  // seen by the others after the next barrier of the warp, next()'s
      walker = start;
      first = window;
    }
  }

  // Finds the next segment, but for what SegmentWalker::take leaves open.
  __device__ __forceinline__ void next(const DecodeBatch& batch) {
    const int lane = threadIdx.x % kWarpSize;
    __syncwarp();  // all lanes are done with the last segment
    SegmentWalker at = reload(walker);
    DecodeSegment found{};  // of a unit without tiles in the share it has none either
#pragma unroll 1
    while (!at.is_done(batch)) {
      const int window = reload(first);
      if (at.seq - window == kWarpSize) {
        __syncwarp();  // all lanes have read the old sequence
        tiles[lane] = load(batch, at.seq + lane);
        if (lane == 0) first = at.seq;
        __syncwarp();
        continue;
      }
      const TileRange own = reload(tiles[lane]);
      const TileRange range = {__shfl_sync(kFullWarp, own.begin, at.seq - window),
                               __shfl_sync(kFullWarp, own.end, at.seq - window)};
      if (at.take(batch, range, found)) break;
    }
    __syncwarp();  // all lanes have read the old position
    if (lane == 0) {
      segment = found;
      walker = at;
    }
    __syncwarp();
  }

 private:
  __device__ __forceinline__ static TileRange load(const DecodeBatch& batch, int seq) {
    return seq < batch.num_seqs ? batch.tiles(seq) : TileRange{0, 0};
  }
};

// The segments of the share on their way from the producer warp to the consumers.
struct SegmentQueue {
  static constexpr int kLength = 8;  // segments that the producer may be ahead
  uint64_t full[kLength], empty[kLength];
  DecodeSegment segments[kLength];  // one without tiles: there are no more

  // By one lane for each position.  An mbarrier_fence_init follows.
  __device__ __forceinline__ void init(int at, int consumers) {
    ptx::mbarrier_init(ptx::smem_address(&full[at]), kWarpSize);
    ptx::mbarrier_init(ptx::smem_address(&empty[at]), consumers * kWarpSize);
  }

  // The producer warp.  `segment` and `position` are its own, in shared memory.
  __device__ __forceinline__ void push(const DecodeBatch& batch, DecodeSegment& segment,
                                       RingPosition& position) {
    const uint32_t lane = threadIdx.x % kWarpSize;
    RingPosition at = reload(position);
    ptx::mbarrier_wait(ptx::smem_address(&empty[at.stage]), at.parity ^ 1);
    if (lane == 0 && reload(segment.tile_begin) < reload(segment.tile_end)) {
      segment.describe(batch);
    }
    __syncwarp();  // the segment is described
    copy_words(segment, segments[at.stage]);
    ptx::mbarrier_arrive(ptx::smem_address(&full[at.stage]));  // each lane for what it has written
    __syncwarp();                                              // the position is read
    if (lane == 0) {
      at.advance(1, kLength);
      position = at;
    }
    __syncwarp();
  }

  // A consumer warp, likewise; false when there are no more.
  __device__ __forceinline__ bool pop(DecodeSegment& segment, RingPosition& position) {
    const uint32_t lane = threadIdx.x % kWarpSize;
    __syncwarp();  // all lanes are done with the last segment
    RingPosition at = reload(position);
    ptx::mbarrier_wait(ptx::smem_address(&full[at.stage]), at.parity);
    copy_words(segments[at.stage], segment);
    ptx::mbarrier_arrive(ptx::smem_address(&empty[at.stage]));  // each lane for what it has read
    __syncwarp();  // the segment is copied, the position read
    if (lane == 0) {
      at.advance(1, kLength);
      position = at;
    }
    return reload(segment.tile_begin) < reload(segment.tile_end);
  }

 private:
  // From shared memory to shared memory, a word a lane.
  __device__ __forceinline__ static void copy_words(const DecodeSegment& from, DecodeSegment& to) {
    // Volatile: nothing of it is kept in the producer's few registers from one call to the next.
    const uint32_t lane = ptx::thread_idx_volatile() % kWarpSize;
    if (lane < sizeof(DecodeSegment) / 4) {
      const uint32_t word = ptx::ld_shared_u32(ptx::smem_address(&from) + 4 * lane);
      ptx::st_shared_u32(ptx::smem_address(&to) + 4 * lane, word);
    }
  }
};

}  // namespace tq4
