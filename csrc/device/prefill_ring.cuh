// Prefill from images of unpacked tiles: where a CTA's images lie, and their way into shared
// memory.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../params.h"
#include "../ptx/arith.cuh"
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
    sum += unit_keys(p.seq_lens[s], p.query_start_loc[s + 1] - p.query_start_loc[s], p.window_left,
                     w.tile_tokens)
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

// Tile i lies in buffer i % kStages.
template <typename Config>
__device__ __forceinline__ uint32_t image_buffer(uint32_t smem, int tile) {
  return smem + Config::kBuffers + tile % Config::kStages * Config::kBufferBytes;
}

// Starts this thread's part of the copy of a tile; nothing beyond the last one.
template <typename Config>
__device__ __forceinline__ void copy_image(uint32_t smem, int tile) {
  constexpr int kBytes = PrefillImage<Config>::kBytes, kStep = 16 * Config::kThreads;
  const uint4 info = ptx::ld_shared_v4(smem + Config::kPageInfo);  // ImageInfo
  if (static_cast<int>(info.z) + tile * Config::kTile >= static_cast<int>(info.w)) return;
  const uint32_t first = 16 * ptx::thread_idx_volatile();
  const uint8_t* src =
      reinterpret_cast<const uint8_t*>(static_cast<uint64_t>(info.y) << 32 | info.x) +
      static_cast<int64_t>(tile) * kBytes + first;
  const uint32_t dst = image_buffer<Config>(smem, tile) + first;
#pragma unroll
  for (int i = 0; i + kStep <= kBytes; i += kStep) ptx::cp_async<16>(dst + i, src + i);
  constexpr int kWhole = kBytes / kStep * kStep;
  if (kWhole < kBytes && first + kWhole < kBytes) ptx::cp_async<16>(dst + kWhole, src + kWhole);
}

}  // namespace tq4::sm80
