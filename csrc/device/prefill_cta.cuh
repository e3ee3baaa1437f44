// Prefill: what a CTA works on, and what its warps know of it.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "../params.h"
#include "../ptx/smem.cuh"
#include "codebook.cuh"
#include "prefill_config.cuh"
#include "prefill_query.cuh"
#include "prefill_schedule.cuh"
#include "prefill_steps.cuh"

namespace tq4::sm80 {

struct CtaWork {
  int seq;  // -1: nothing to do
  int kv_head;
  int q_len;
  int key_begin, key_end;  // keys to visit; key_begin is a multiple of kTile
  TileInfo info;
};

// Work `index` of num_works, which are the slots (prefill_schedule.cuh) times the KV heads; those
// with most keys first.
template <typename Config>
__device__ __forceinline__ CtaWork find_work(const AttentionParams& p, int num_works, int index) {
  const int group = p.num_q_heads / p.cache.num_kv_heads;
  // KV heads innermost: CTAs that share a sequence's pages run side by side.
  const int64_t slots = num_works / p.cache.num_kv_heads;
  const PrefillTile tile =
      find_prefill_tile(p.query_start_loc, p.num_seqs, group, Config::kRows, p.short_query_len,
                        slots - 1 - index / p.cache.num_kv_heads);
  CtaWork work;
  work.seq = tile.seq;
  if (tile.seq < 0) return work;
  work.kv_head = index % p.cache.num_kv_heads;
  work.q_len = tile.q_len;
  TileInfo& info = work.info;
  info.num_keys = p.seq_lens[tile.seq];
  info.pos0 = info.num_keys - tile.q_len;
  info.num_rows = tile.q_len * group;
  info.first_row = tile.first_row;
  info.q_begin = tile.q_begin;
  info.group = group;
  const int last_row = min(tile.first_row + Config::kRows, info.num_rows) - 1;
  const KeyRange keys =
      visible_keys(info.pos0 + tile.first_row / group, info.pos0 + last_row / group, p.window_left,
                   p.window_right, info.num_keys);
  work.key_begin = keys.begin / Config::kTile * Config::kTile;
  work.key_end = keys.end;
  info.first_head = work.kv_head * group;
  info.num_tiles = keys.end > work.key_begin
                       ? (keys.end - work.key_begin + Config::kTile - 1) / Config::kTile
                       : 0;
  return work;
}

// TileInfo, row tokens and WarpKeys; visible to the CTA after its next barrier.
template <typename Config>
__device__ __forceinline__ void write_cta_info(const AttentionParams& p, const CtaWork& work,
                                               uint8_t* shared) {
  const TileInfo& info = work.info;
  if (threadIdx.x == 0) *reinterpret_cast<TileInfo*>(shared + Config::kInfo) = info;
  if (threadIdx.x < Config::kRows) {
    reinterpret_cast<int*>(shared + Config::kRowTokens)[threadIdx.x] =
        (info.first_row + static_cast<int>(threadIdx.x)) / info.group;
  }
  const int warp = threadIdx.x / 32;
  const int first = info.first_row + warp * Config::kWarpRows;
  const int last = min(first + Config::kWarpRows, info.num_rows) - 1;
  const int pos_first = info.pos0 + first / info.group, pos_last = info.pos0 + last / info.group;
  const KeyRange seen =
      visible_keys(pos_first, pos_last, p.window_left, p.window_right, info.num_keys);
  const bool active = first < info.num_rows;
  ptx::st_shared_v4(
      ptx::smem_address(shared) + Config::kWarpKeys + 16 * warp, seen.begin, active ? seen.end : 0,
      pos_last - window_or_max(p.window_left),
      min(info.num_keys, pos_first + min(window_or_max(p.window_right), kMaxWindow - 1) + 1));
}

// Row scales (score_scale) and maxima before the first key; visible to the warp.
template <typename Config>
__device__ __forceinline__ void start_softmax(uint32_t smem,
                                              const float (&scale)[2 * Config::kMTiles],
                                              SoftmaxState<Config>& state) {
  const uint32_t address = row_state_address<Config>(smem);
#pragma unroll
  for (int i = 0; i < 2 * Config::kMTiles; ++i) {
    if (ptx::thread_idx_volatile() % 4 == 0) {
      ptx::st_shared_v2(address + 8 * sizeof(RowState) * i, __float_as_uint(scale[i]),
                        __float_as_uint(kMinusHuge));
    }
  }
  __syncwarp();  // all lanes of a row read what one has written
  for (float& l : state.l) l = 0.f;
}

}  // namespace tq4::sm80
