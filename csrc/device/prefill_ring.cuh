// Prefill from images of unpacked tiles: where a CTA's images lie, and their way into shared
// memory.
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

// Tiles of one KV head of the sequences before `seq`, summed by the whole CTA.  `scratch`: 8 bytes
// a warp of shared memory that nobody else uses before the next barrier.
template <int kThreads>
__device__ __forceinline__ int64_t sum_tiles_before(const AttentionParams& p,
                                                    const TileWorkspace& w, int seq,
                                                    int64_t* scratch) {
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
  __syncthreads();  // every warp's sum is written
  sum = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) sum += scratch[i];
  return sum;
}

// The ring of images: tile i lies in buffer i % kStages, where it is use i / kStages.
//
// Two mbarriers a buffer instead of a CTA barrier a tile: `full` ends a phase when every thread's
// part of a copy has landed, `empty` when every warp is done with a tile.  Warps may then be half a
// tile apart, and the two of a scheduler in different parts of a step.
template <typename Config>
struct ImageRing {
  uint32_t smem;

  static constexpr int kFull = Config::kRingBarriers, kEmpty = kFull + 8 * Config::kStages;

  // By one thread; visible to the CTA after its next barrier.
  __device__ __forceinline__ void init() const {
#pragma unroll
    for (int i = 0; i < Config::kStages; ++i) {
      ptx::mbarrier_init(smem + kFull + 8 * i, Config::kThreads);
      ptx::mbarrier_init(smem + kEmpty + 8 * i, Config::kWarps);
    }
  }

  // Starts this thread's part of the copy of a tile, once the tile before it in the buffer has been
  // released; nothing beyond the last tile.
  __device__ __forceinline__ void copy(int tile) const {
    constexpr int kBytes = PrefillImage<Config>::kBytes, kStep = 16 * Config::kThreads;
    const uint4 info = ptx::ld_shared_v4(smem + Config::kPageInfo);  // ImageInfo
    if (static_cast<int>(info.z) + tile * Config::kTile >= static_cast<int>(info.w)) return;
    const uint32_t buffer = tile % Config::kStages;
    // At the first use a fresh barrier, for which the phase before has ended.
    ptx::mbarrier_wait(smem + kEmpty + 8 * buffer, (tile / Config::kStages + 1) & 1);
    const uint32_t first = 16 * ptx::thread_idx_volatile();
    const uint8_t* src =
        reinterpret_cast<const uint8_t*>(static_cast<uint64_t>(info.y) << 32 | info.x) +
        static_cast<int64_t>(tile) * kBytes + first;
    const uint32_t dst = smem + Config::kBuffers + buffer * Config::kBufferBytes + first;
#pragma unroll
    for (int i = 0; i + kStep <= kBytes; i += kStep) ptx::cp_async<16>(dst + i, src + i);
    constexpr int kWhole = kBytes / kStep * kStep;
    if (kWhole < kBytes && first + kWhole < kBytes) ptx::cp_async<16>(dst + kWhole, src + kWhole);
    ptx::mbarrier_arrive_on_cp_async(smem + kFull + 8 * buffer);
  }

  __device__ __forceinline__ void wait(int tile) const {
    ptx::mbarrier_wait(smem + kFull + 8 * (tile % Config::kStages), tile / Config::kStages & 1);
  }

  // By whole warps.
  __device__ __forceinline__ void release(int tile) const {
    __syncwarp();  // the whole warp has read the tile
    if (ptx::thread_idx_volatile() % 32 == 0) {
      ptx::mbarrier_arrive(smem + kEmpty + 8 * (tile % Config::kStages));
    }
  }
};

}  // namespace tq4::sm80
