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
#include <cstddef>
#include <cstdint>

#include "../device/codebook.cuh"
#include "../device/prefill_config.cuh"
#include "../device/prefill_cta.cuh"
#include "../device/prefill_loader.cuh"
#include "../device/prefill_output.cuh"
#include "../device/prefill_query.cuh"
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
  const CtaWork work = find_work<Config>(p, gridDim.x, blockIdx.x);
  if (work.seq < 0) return;
  if (warp == 0) {
    write_codebook_tables(reinterpret_cast<CodebookTables*>(shared + Config::kTables), p.k_codes,
                          p.k_centroids, p.v_centroids);
  }
  if (threadIdx.x == 0) {
    *reinterpret_cast<PageInfo*>(shared + Config::kPageInfo) = {
        p.block_table + work.seq * p.block_table_stride, work.key_begin, work.key_end};
  }
  write_cta_info<Config>(p, work, shared);

  const PageLoader<Config> loader{smem, copy_bytes, block_shift};
  loader.write_slot(p.cache, work.kv_head);
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
  for (float& scale : q.scale) scale = score_scale(p, k_unit, scale);
  start_softmax<Config>(smem, q.scale, state);
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
      const int tile = static_cast<int>(ptx::opaque(i));
      const uint32_t buffer = smem + Config::kBuffers + tile % 2 * Config::kBufferBytes;
      const int first_key = key_begin_of(tile) + inner * Config::kInner;
      if (!warp_keys<Config>(smem).sees(first_key, Config::kInner)) continue;
      attend_step<Config>(p, smem, buffer, inner, first_key, q, state, o);
    }
    if (!unpacks_first() && i + 1 < num_tiles()) unpack_tile<Config>(smem, i + 1);
  }
  ptx::cp_async_wait<0>();
  write_output_by_panels<Config>(p, smem, state, o);
}

}  // namespace tq4::sm80
