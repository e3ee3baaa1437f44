// Prefill from images of unpacked tiles: where the images of a CTA's rows lie, and their way into
// shared memory.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../params.h"
#include "../ptx/arith.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ptx/smem.cuh"
#include "prefill_cta.cuh"
#include "prefill_image.cuh"
#include "tile_workspace.h"

namespace tq4::sm80 {

// Kept in shared memory, like TileInfo: read once a tile.
struct alignas(16) ImageInfo {
  const uint8_t* images;  // of the CTA's tile 0
  int key_begin;          // first key of tile 0
  int key_end;            // of the last tile
};
static_assert(sizeof(ImageInfo) == 16, "read as one vector");

// A barrier of the threads that share a ring: those with the same threadIdx.y.
template <typename Config>
__device__ __forceinline__ void ring_barrier() {
  ptx::named_barrier_sync(1 + threadIdx.y, Config::kThreads);
}

// Tiles of one KV head of the sequences before `seq`, summed by the threads of a ring.  `scratch`:
// 8 bytes a warp of shared memory that nobody else uses before the next barrier.
template <typename Config>
__device__ __forceinline__ int64_t sum_tiles_before(const AttentionParams& p,
                                                    const TileWorkspace& w, int seq,
                                                    int64_t* scratch) {
  constexpr int kThreads = Config::kThreads;
  int64_t sum = 0;
#pragma unroll 1
  for (int s = threadIdx.x; s < seq; s += kThreads) {
    sum += unit_keys(p.seq_lens[s], prefill_queries(p.query_start_loc, s, p.short_query_len),
                     p.window_left, w.tile_tokens)
               .tiles;
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = sum;
  ring_barrier<Config>();  // every warp's sum is written
  sum = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) sum += scratch[i];
  return sum;
}

// Starts this thread's part of the copy of kBytes bytes.
template <typename Config, int kBytes>
__device__ __forceinline__ void copy_part(uint32_t dst, const uint8_t* src) {
  constexpr int kStep = 16 * Config::kThreads, kWhole = kBytes / kStep * kStep;
  const uint32_t first = 16 * ptx::thread_idx_volatile();
#pragma unroll
  for (int i = 0; i < kWhole; i += kStep) ptx::cp_async<16>(dst + first + i, src + first + i);
  if (kWhole < kBytes && first + kWhole < kBytes) {
    ptx::cp_async<16>(dst + first + kWhole, src + first + kWhole);
  }
}

// The ring of images: tile i lies in buffer i % kStages, where it is use i / kStages.  The parts of
// the matrix that rotates the output follow the last tile, as if they were tiles.
//
// Two mbarriers a buffer instead of a barrier a tile: `full` ends a phase when every thread's part
// of a copy has landed, `empty` when every thread is done with a tile.  Warps may then be half a
// tile apart, and the two of a scheduler in different parts of a step.
template <typename Config>
struct ImageRing {
  uint32_t smem;
  const uint8_t* rotation;  // RotationImage, or null

  using Rotation = RotationImage<Config>;
  static constexpr int kFull = Config::kRingBarriers, kEmpty = kFull + 8 * Config::kStages;

  // By one thread; visible to the others after their next barrier.
  __device__ __forceinline__ void init() const {
#pragma unroll
    for (int i = 0; i < Config::kStages; ++i) {
      ptx::mbarrier_init(smem + kFull + 8 * i, Config::kThreads);
      ptx::mbarrier_init(smem + kEmpty + 8 * i, Config::kThreads);
    }
  }

  __device__ __forceinline__ uint32_t buffer(int tile) const {
    return smem + Config::kBuffers + tile % Config::kStages * Config::kBufferBytes;
  }

  // Starts this thread's part of the copy of a tile, once the tile before it in the buffer has been
  // released; nothing beyond the last one.
  __device__ __forceinline__ void copy(int tile) const {
    const uint4 info = ptx::ld_shared_v4(smem + Config::kPageInfo);  // ImageInfo
    const int num_tiles = static_cast<int>(info.w - info.z) / Config::kTile;
    if (tile >= num_tiles + (rotation != nullptr ? Rotation::kParts : 0)) return;
    // At the first use a fresh barrier, for which the phase before has ended.
    ptx::mbarrier_wait(smem + kEmpty + 8 * (tile % Config::kStages),
                       (tile / Config::kStages + 1) & 1);
    if (tile < num_tiles) {
      const auto* images =
          reinterpret_cast<const uint8_t*>(static_cast<uint64_t>(info.y) << 32 | info.x);
      constexpr int kBytes = PrefillImage<Config>::kBytes;
      copy_part<Config, kBytes>(buffer(tile), images + static_cast<int64_t>(tile) * kBytes);
    } else {
      copy_part<Config, Rotation::kPartBytes>(buffer(tile),
                                              rotation + (tile - num_tiles) * Rotation::kPartBytes);
    }
    ptx::mbarrier_arrive_on_cp_async(smem + kFull + 8 * (tile % Config::kStages));
  }

  __device__ __forceinline__ void wait(int tile) const {
    ptx::mbarrier_wait(smem + kFull + 8 * (tile % Config::kStages), tile / Config::kStages & 1);
  }

  // Each thread for what it has read: an arrival releases the arriving thread's accesses, others'
  // only by way of one more barrier, which racecheck does not follow.
  __device__ __forceinline__ void release(int tile) const {
    ptx::mbarrier_arrive(smem + kEmpty + 8 * (tile % Config::kStages));
  }
};

}  // namespace tq4::sm80
