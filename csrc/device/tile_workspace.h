// Unpacked tiles of K and V in a bounded workspace, for prefill kernels that read each tile often.
//
// A unit is one (sequence, KV head): its keys from the first one that some query may see to the
// last, in tiles of `tile_tokens`.  Units are laid end to end in the order (sequence, head); where
// they start follows from the lengths, which only the device knows.  What does not fit in the
// workspace at once goes through it in passes: pass i holds the units that start in
//     [i * pass_tiles, (i + 1) * pass_tiles)
// and capacity = pass_tiles + the most tiles a unit can have - 1, so that every unit lies whole in
// its pass.  The host knows the number of passes from shapes alone; passes beyond the true lengths
// find nothing to do.
//
// Host-compilable.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common.cuh"
#include "prefill_schedule.cuh"

namespace tq4 {

// Bound of the workspace that prefill asks for beside its queries, and of the passes that it makes
// of a call whose keys may not fit.
constexpr int64_t kTileWorkspaceLimit = int64_t{512} << 20;
constexpr int kMaxTilePasses = 16;

struct TileWorkspace {
  uint8_t* tiles;      // images of `tile_bytes` each
  int64_t tile_bytes;  // a multiple of 128
  int64_t pass_tiles;
  int64_t capacity;  // tiles that there is room for
  int32_t tile_tokens;
  int32_t num_passes;
};

// Keys of a sequence that its units hold: whole tiles from `begin`, a multiple of the tile.
struct UnitKeys {
  int begin;
  int tiles;
};

// `q_len` query tokens at the end of `num_keys` keys.
TQ4_HOST_DEVICE UnitKeys unit_keys(int num_keys, int q_len, int window_left, int tile_tokens) {
  if (q_len <= 0 || num_keys <= 0) return {0, 0};
  const int64_t first = static_cast<int64_t>(num_keys) - q_len - window_or_max(window_left);
  const int begin = first <= 0 ? 0 : static_cast<int>(first) / tile_tokens * tile_tokens;
  return {begin, (num_keys - begin + tile_tokens - 1) / tile_tokens};
}

// Where the tiles of a unit lie; `tiles_before` of the sequences before it, of one head.
struct UnitPlace {
  int pass;
  int64_t first_tile;  // in the workspace
};

TQ4_HOST_DEVICE UnitPlace unit_place(const TileWorkspace& w, int64_t tiles_before, int tiles,
                                     int num_kv_heads, int kv_head) {
  const int64_t start = tiles_before * num_kv_heads + static_cast<int64_t>(kv_head) * tiles;
  if (w.num_passes == 1) return {0, start};
  int64_t pass = divide(start, w.pass_tiles);
  if (pass >= w.num_passes) pass = w.num_passes - 1;  // a unit without tiles, at the very end
  return {static_cast<int>(pass), start - pass * w.pass_tiles};
}

// From shapes alone: at most `max_keys` keys a sequence (the width of the block table), and at most
// `limit_bytes` of workspace.  num_passes is 0 where one unit alone may not fit.
inline TileWorkspace make_tile_workspace(int64_t num_seqs, int64_t num_kv_heads, int64_t max_keys,
                                         int tile_tokens, int64_t tile_bytes, int64_t limit_bytes) {
  TileWorkspace w{};
  w.tile_tokens = tile_tokens;
  w.tile_bytes = tile_bytes;
  const int64_t unit_tiles = std::max<int64_t>(1, (max_keys + tile_tokens - 1) / tile_tokens);
  const int64_t all_tiles = std::max<int64_t>(1, unit_tiles * num_kv_heads * num_seqs);
  const int64_t room = limit_bytes / tile_bytes;
  if (all_tiles <= room) {
    w.pass_tiles = all_tiles;
    w.capacity = all_tiles;
    w.num_passes = 1;
    return w;
  }
  w.capacity = room;
  w.pass_tiles = room - unit_tiles + 1;
  if (w.pass_tiles <= 0) return w;
  const int64_t passes = (all_tiles + w.pass_tiles - 1) / w.pass_tiles;
  w.num_passes = passes > INT32_MAX ? 0 : static_cast<int32_t>(passes);
  return w;
}

// The usual answers of an image policy (tile_expand.cuh).
template <int D, int kTokens>
struct TileImage {
  static constexpr int kHeadDim = D;
  static constexpr int kTileTokens = kTokens;
  static constexpr int kExpandThreads = 256;
  static constexpr int kKeyChunks = D / 16;
  static constexpr int kValueChunks = D / 8;
  TQ4_HOST_DEVICE static constexpr int key_dim(int chunk) { return 16 * chunk; }
  TQ4_HOST_DEVICE static constexpr int key_dims(int) { return 16; }
  // The columns of the matrix that rotates the output, columns 8 chunk + 2 pair and + 1, are
  // ordered so that the lane t = lane % 4 of a row receives dims 32 b + 8 t .. + 7 of each block b
  // of 32: 16 bytes of the output.
  TQ4_HOST_DEVICE static constexpr int rotation_dim(int chunk, int pair) {
    return chunk / 4 * 32 + 8 * pair + chunk % 4 * 2;
  }
};

}  // namespace tq4
