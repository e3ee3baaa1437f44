// Shape of the mma.sync prefill kernel: tile sizes, shared-memory map, and what the warps of a CTA
// know about their rows and keys.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../params.h"
#include "../ptx/arith.cuh"
#include "../ptx/smem.cuh"
#include "common.cuh"
#include "rotate.cuh"
#include "swizzle.cuh"

namespace tq4::sm80 {

// kTiles: K and V come as images of unpacked tiles (prefill_image.cuh), INT8 only; else as pages,
// unpacked by the kernel itself.  kWarps: that share a ring of tiles.
template <int D_, bool kInt8_, bool kTiles_ = false, int kWarps_ = 8>
struct PrefillConfig {
  static constexpr int D = D_;
  static constexpr bool kInt8 = kInt8_;
  static constexpr bool kTiles = kTiles_;
  static_assert(kInt8 || !kTiles, "images hold int8 keys");
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;
  // 32-row warps halve the shared-memory reads a row; beyond D = 128, and with fp16 q fragments,
  // the accumulators of 32 rows do not fit in registers.
  static constexpr int kMTiles = (D <= 128 && kInt8) ? 2 : 1;
  static constexpr int kWarpRows = 16 * kMTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kTile = D <= 128 ? 64 : 32;  // tokens unpacked at once
  // Tokens a softmax step.  64 spill where O takes 128 registers a thread; at D = 64 they are 15 %
  // faster.
  static constexpr int kInner = kTiles && D == 64 ? 64 : 32;
  // Sums of the probabilities by a product with ones: 4 % more MMAs for 9 % fewer instructions, and
  // the numerator and the denominator see the same rounding.
  static constexpr bool kSumByMma = kTiles;
  static constexpr int kColumns = kInner / 8;  // MMA tiles along the tokens of a step
  static constexpr int kStages = 3;            // raw tiles, or images

  static constexpr int kThreadsPerToken = kThreads / kTile;
  static constexpr int kCodeBytes = D / 2;
  static constexpr int kSlice = kCodeBytes / kThreadsPerToken;  // bytes copied by a thread
  static constexpr int kSliceWords = kSlice / 4;
  static constexpr int kKeyChunksPerSlice = kInt8 ? kSliceWords / 2 : kSliceWords;
  static constexpr int kKeySteps = kInt8 ? D / 32 : D / 16;  // MMAs along the head dimension

  using Key = KeyTile<D, kInt8 ? 1 : 2>;
  using Value = HalfTile<D>;

  // Byte offsets in shared memory.
  static constexpr int kRawBytes = kTile * (2 * kCodeBytes + 8);
  static constexpr int kAlign = 512;  // longest row: the swizzles XOR addresses within a row
  // A page kernel's buffer is K tile | V tile | column scales.  An image is cut into steps that
  // have all three each: one address then leads to everything of a step.
  static constexpr int kPartTokens = kTiles ? kInner : kTile;
  static constexpr int kValuePart = kPartTokens * Key::kRowBytes;
  static constexpr int kScalePart = kValuePart + kPartTokens * Value::kRowBytes;
  static constexpr int kScaleBytes = kTiles ? 4 : 8;  // norm; with -magic * norm
  static constexpr int kPartBytes = round_up(kScalePart + kPartTokens * kScaleBytes, kAlign);
  static constexpr int kParts = kTile / kPartTokens;
  static constexpr int kBufferBytes = kParts * kPartBytes;
  static constexpr int kTables = 0;                                       // CodebookTables
  static constexpr int kRingBarriers = kTables;                           // with kTiles
  static constexpr int kInfo = 96;                                        // TileInfo
  static constexpr int kPageInfo = 128;                                   // PageInfo or ImageInfo
  static constexpr int kWarpKeys = 160;                                   // WarpKeys [kWarps]
  static constexpr int kRowTokens = 288;                                  // int [kRows]
  static constexpr int kRowStates = round_up(kRowTokens + 4 * kRows, 8);  // RowState [kRows]
  static constexpr int kSlots = round_up(kRowStates + 8 * kRows, 16);     // ThreadSlot [kThreads]
  static constexpr int kPages = kSlots + 16 * kThreads;                   // int [kPageSlots][kTile]
  static constexpr int kPageSlots = kStages + 1;
  static constexpr int kRaw = kPages + 4 * kPageSlots * kTile;
  static constexpr int kLaneOffsets = kSlots;  // uint32_t [kThreads], with kTiles
  static constexpr int kBuffers =
      round_up(kTiles ? kLaneOffsets + 4 * kThreads : kRaw + kStages * kRawBytes, kAlign);
  static constexpr int kNumBuffers = kTiles ? kStages : 2;
  static constexpr int kBuffersEnd = kBuffers + kNumBuffers * kBufferBytes;
  // Without kTiles a panel of the rotation matrix takes the tiles' place before and after the main
  // loop.
  static constexpr int kPanel = kBuffers;
  static constexpr int kPanelEnd = kTiles ? 0 : kPanel + RotationPanel<D>::kBytes;
  static constexpr int kSmemBytes = kBuffersEnd > kPanelEnd ? kBuffersEnd : kPanelEnd;
  static_assert(kSmemBytes <= 99 * 1024, "sm_86 and sm_89 offer 99 KB a CTA");
  static_assert(kValuePart % kAlign == 0, "the V tile starts aligned");
};

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
// Finite floor of the running maximum: (-inf) - (-inf) never occurs.
constexpr float kMinusHuge = -1e30f;
// The maximum is only moved when it grows by more than this (log2): P <= 2^8 in fp16 is as exact
// as P <= 1, and most rescales of O disappear.
constexpr float kLazyRescale = 8.f;
// An int32 accumulator that starts at the bits of 1.5 * 2^23 reads as the float 12582912 + score:
// no conversion.  |score| <= 127 * 127 * 256 < 2^22 keeps it exact.
constexpr int32_t kMagicBits = 0x4B400000;
constexpr float kMagic = 12582912.f;

// First dim of chunk `chunk` of the V tile (and of O): the inverse of unpack_tile's chunk order.
// Images are in natural order.
template <typename Config>
TQ4_HOST_DEVICE constexpr int value_dim(int chunk) {
  if (Config::kTiles) return 8 * chunk;
  return chunk % Config::kThreadsPerToken * (Config::D / Config::kThreadsPerToken) +
         chunk / Config::kThreadsPerToken * 8;
}

// What a CTA works on, kept in shared memory: needed before, after and on the edges of the main
// loop only, whose registers are all taken.
struct TileInfo {
  int num_keys;    // L
  int pos0;        // position of the sequence's first query token: L - T
  int num_rows;    // packed rows of the sequence
  int first_row;   // first packed row of this tile
  int q_begin;     // first query token of the sequence
  int group;       // query heads of a KV head
  int first_head;  // first query head of the KV head
  int num_tiles;   // key tiles to visit
};
static_assert(sizeof(TileInfo) == 32, "fits its place in shared memory");

// Keys of one warp's rows: steps outside [begin, end) are skipped, steps inside
// [full_begin, full_end) are seen whole by every row.
struct WarpKeys {
  int begin, end, full_begin, full_end;

  // Anything of the `count` keys from `first` on?
  __device__ __forceinline__ bool sees(int first, int count) const {
    return first < end && first + count > begin;
  }
};

// The keys of this thread's warp: read where needed, like TileInfo.
template <typename Config>
__device__ __forceinline__ WarpKeys warp_keys(uint32_t smem) {
  const uint4 words =
      ptx::ld_shared_v4(smem + Config::kWarpKeys + 16 * (ptx::thread_idx_volatile() / 32));
  return {static_cast<int>(words.x), static_cast<int>(words.y), static_cast<int>(words.z),
          static_cast<int>(words.w)};
}

// The rows a lane sees: index 2 mt + i is row 16 mt + 8 i + lane / 4 of the warp.
template <typename Config>
struct LaneRows {
  int first;  // packed row of index 0 in the sequence
  int count;  // packed rows of the sequence
  int group;
  uint32_t tokens;  // shared address of index 0's token

  __device__ __forceinline__ int row(int index) const { return first + 8 * index; }
  __device__ __forceinline__ bool valid(int index) const { return row(index) < count; }
  // From a table: four integer divisions at once would not fit in the main loop's registers.
  __device__ __forceinline__ int token(int index) const {
    return ptx::ld_shared_u32(tokens + 32 * index);
  }
  // Query head, counted from the first of the group.
  __device__ __forceinline__ int head(int index, int token) const {
    return row(index) - token * group;
  }
};

// Read where needed (the loads are volatile), never carried through the main loop in registers.
template <typename Config>
__device__ __forceinline__ int tile_info(uint32_t smem, size_t field) {
  return ptx::ld_shared_volatile(smem + Config::kInfo + field);
}

template <typename Config>
__device__ __forceinline__ LaneRows<Config> lane_rows(uint32_t smem) {
  const unsigned thread = ptx::thread_idx_volatile();
  const int row = thread / 32 * Config::kWarpRows + thread % 32 / 4;
  return {tile_info<Config>(smem, offsetof(TileInfo, first_row)) + row,
          tile_info<Config>(smem, offsetof(TileInfo, num_rows)),
          tile_info<Config>(smem, offsetof(TileInfo, group)),
          ptx::opaque(smem) + Config::kRowTokens + 4 * row};
}

}  // namespace tq4::sm80
