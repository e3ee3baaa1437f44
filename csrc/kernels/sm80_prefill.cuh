// TQ4 prefill by mma.sync: sm_80 and up.
//
//   q_rot = q R^T;  q8 = round(q_rot / s_q)            once a CTA
//   S = s_q s_c sm_scale n_k (q8 . k8)                 INT8 tensor cores, K unpacked once a CTA
//   O = softmax(S) V',  V' = fp16(c) n_v               FP16 tensor cores
//   out = (O / l) R
//
// A CTA owns kRows packed rows (row = token * G + head of the group) of one sequence and KV head,
// and walks the visible keys in tiles.  Roles: 8 warps, all alike; warp w owns rows
// [16 kMTiles w, 16 kMTiles (w + 1)) for both products, so S and P never leave its registers.
//
//   global pages --cp.async--> raw ring (3 stages of codes and norms, one slice a thread)
//        raw slice --PRMT--> K tile int8 and V tile fp16 (2 buffers), by the thread that copied it
//            K tile --LDS.128--> B fragments;  V tile --LDSM.T--> B fragments
//
// One barrier a tile: it orders the unpacking of tile i + 1 (during the products of tile i) before
// the products of tile i + 1, and the products of tile i before the unpacking of tile i + 2 into
// the same buffer.  Raw slices need no barrier: each thread unpacks what it copied itself; the V
// norm comes from another lane of the same warp.
//
// Of the two warps on each scheduler (w and w + 4) one unpacks before its products, the other
// after: the tensor core always has a warp to serve.
//
// Shared memory: raw ring | 2 x {K tile, V tile, column scales} | tables.  A panel of the rotation
// matrix takes the tiles' place before the first and after the last tile.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "../device/codebook.cuh"
#include "../device/prefill_config.cuh"
#include "../device/prefill_loader.cuh"
#include "../device/prefill_output.cuh"
#include "../device/prefill_query.cuh"
#include "../device/prefill_schedule.cuh"
#include "../device/prefill_steps.cuh"
#include "../params.h"
#include "../ptx/dynamic_smem.cuh"
#include "../ptx/smem.cuh"

namespace tq4::sm80 {

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    prefill_kernel(const __grid_constant__ AttentionParams p, int copy_bytes, int block_shift) {
  constexpr int D = Config::D;
  uint8_t* const shared = ptx::dynamic_shared();
  const uint32_t smem = ptx::opaque(ptx::smem_address(shared));
  const int warp = threadIdx.x / 32;
  const int group = p.num_q_heads / p.cache.num_kv_heads;

  // KV heads innermost: CTAs that share a sequence's pages run side by side.
  const int kv_head = blockIdx.x % p.cache.num_kv_heads;
  const int64_t slots = gridDim.x / p.cache.num_kv_heads;
  const PrefillTile tile = find_prefill_tile(p.query_start_loc, p.num_seqs, group, Config::kRows,
                                             slots - 1 - blockIdx.x / p.cache.num_kv_heads);
  if (tile.seq < 0) return;
  TileInfo info;
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
  const int key_begin = keys.begin / Config::kTile * Config::kTile;
  info.first_head = kv_head * group;
  info.num_tiles =
      keys.end > key_begin ? (keys.end - key_begin + Config::kTile - 1) / Config::kTile : 0;

  if (warp == 0) {
    write_codebook_tables(reinterpret_cast<CodebookTables*>(shared + Config::kTables), p.k_codes,
                          p.k_centroids, p.v_centroids);
  }
  if (threadIdx.x == 0) {
    *reinterpret_cast<TileInfo*>(shared + Config::kInfo) = info;
    *reinterpret_cast<PageInfo*>(shared + Config::kPageInfo) = {
        p.block_table + tile.seq * p.block_table_stride, key_begin, keys.end};
  }
  if (threadIdx.x < Config::kRows) {
    reinterpret_cast<int*>(shared + Config::kRowTokens)[threadIdx.x] =
        (tile.first_row + static_cast<int>(threadIdx.x)) / group;
  }
  {
    const int first = tile.first_row + warp * Config::kWarpRows;
    const int last = min(first + Config::kWarpRows, info.num_rows) - 1;
    const int pos_first = info.pos0 + first / group, pos_last = info.pos0 + last / group;
    const KeyRange seen =
        visible_keys(pos_first, pos_last, p.window_left, p.window_right, info.num_keys);
    const bool active = first < info.num_rows;
    ptx::st_shared_v4(
        smem + Config::kWarpKeys + 16 * warp, seen.begin, active ? seen.end : 0,
        pos_last - window_or_max(p.window_left),
        min(info.num_keys, pos_first + min(window_or_max(p.window_right), kMaxWindow - 1) + 1));
  }

  const PageLoader<Config> loader{smem, copy_bytes, block_shift};
  loader.write_slot(p.cache, kv_head);
  __syncthreads();  // tables, infos and row tokens are written

  // The first tiles travel while q is rotated.
  if (threadIdx.x % Config::kThreadsPerToken == 2) {
#pragma unroll
    for (int i = 0; i < Config::kStages; ++i) {
      loader.copy_page_id(i, threadIdx.x / Config::kThreadsPerToken, p.cache);
    }
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();  // page ids were fetched by a neighbouring lane
#pragma unroll
  for (int i = 0; i < Config::kStages; ++i) {
    loader.copy(i, p.cache);
    ptx::cp_async_commit();
  }

  QueryFragments<Config> q;
  load_query<Config>(p, smem, q);
  __syncthreads();  // the rotation panel has been read: tile 0 may take its place

  SoftmaxState<Config> state;
  const float k_unit =
      Config::kInt8 ? p.k_code_scale
                    : ptx::ld_shared_f32(smem + Config::kTables + offsetof(CodebookTables, k_unit));
#pragma unroll
  for (int i = 0; i < 2 * Config::kMTiles; ++i) {
    float scale = q.scale[i] * k_unit * fabsf(p.sm_scale) * kLog2e;
    if (scale == 0.f) scale = 1e-30f;  // 0 * (-inf) must not turn into NaN
    if (threadIdx.x % 4 == 0) {
      const int row = warp * Config::kWarpRows + threadIdx.x % 32 / 4 + 8 * i;
      ptx::st_shared_v2(smem + Config::kRowStates + sizeof(RowState) * row, __float_as_uint(scale),
                        __float_as_uint(kMinusHuge));
    }
    state.l[i] = 0.f;
  }
  float o[Config::kMTiles][D / 8][4] = {};

  const auto num_tiles = [&] { return tile_info<Config>(smem, offsetof(TileInfo, num_tiles)); };
  const auto key_begin_of = [&](int i) {
    return static_cast<int>(
        ptx::ld_shared_volatile(smem + Config::kPageInfo + offsetof(PageInfo, key_begin)) +
        i * Config::kTile);
  };
  if (num_tiles() > 0) {
    ptx::cp_async_wait<Config::kStages - 1>();
    __syncwarp();  // the V norm was copied by a neighbouring lane
    unpack_tile<Config>(smem, 0);
  }
  for (int i = 0; i < num_tiles(); ++i) {
    // Tile i is unpacked; buffer (i + 1) % 2 and raw stage i % 3 are free.
    __syncthreads();
    loader.copy(i + Config::kStages, p.cache);
    ptx::cp_async_commit();
    // Raw tile i + 1 and the page ids of tile i + 4 have landed, as far as this thread copied them;
    // the V norm and the page id come from neighbouring lanes.
    ptx::cp_async_wait<Config::kStages - 1>();
    __syncwarp();

    const auto unpacks_first = [] { return ptx::thread_idx_volatile() < Config::kThreads / 2; };
    if (unpacks_first() && i + 1 < num_tiles()) unpack_tile<Config>(smem, i + 1);

#pragma unroll 1
    for (int inner = 0; inner < Config::kTile / Config::kInner; ++inner) {
      // Opaque: what is derived from it is recomputed, not carried through the loop.
      const uint32_t buffer = ptx::opaque(smem + Config::kBuffers + i % 2 * Config::kBufferBytes);
      const int first_key = key_begin_of(i) + inner * Config::kInner;
      const int last_key = first_key + Config::kInner - 1;
      const uint4 seen =
          ptx::ld_shared_v4(smem + Config::kWarpKeys + 16 * (ptx::thread_idx_volatile() / 32));
      if (first_key >= static_cast<int>(seen.y) || last_key < static_cast<int>(seen.x)) continue;
      float s[Config::kMTiles][4][4];
      compute_qk<Config>(buffer, inner, q, s);
      if (p.softcap > 0.f) apply_softcap<Config>(p.softcap, smem, s);
      if (first_key < static_cast<int>(seen.z) || last_key >= static_cast<int>(seen.w)) {
        apply_mask<Config>(first_key, smem, p.window_left, p.window_right, s);
      }
      update_softmax<Config>(smem, s, state, o);
      compute_pv<Config>(buffer, inner, s, o);
    }
    if (!unpacks_first() && i + 1 < num_tiles()) unpack_tile<Config>(smem, i + 1);
  }
  ptx::cp_async_wait<0>();
  write_output<Config>(p, smem, state, o);
}

}  // namespace tq4::sm80
