// TQ4 prefill by mma.sync from images of unpacked tiles: sm_80 and up, INT8.
//
// The same products on the same rows as sm80_prefill.cuh; but K and V were unpacked by a kernel
// before (tile_expand.cuh), once for all CTAs, and arrive as they are to lie in shared memory:
//
//   workspace --cp.async--> ring of 3 images;  K --LDS.128--> and V --LDSM.T--> B fragments
//
// Copies run up to two tiles ahead.  Mbarriers order a copy before its use and a use before the
// next copy into its place (prefill_ring.cuh).
//
// The workspace may not hold all of the batch at once (tile_workspace.h): one launch a pass, in
// which CTAs of other passes leave.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../device/prefill_config.cuh"
#include "../device/prefill_cta.cuh"
#include "../device/prefill_output.cuh"
#include "../device/prefill_query.cuh"
#include "../device/prefill_ring.cuh"
#include "../device/prefill_steps.cuh"
#include "../params.h"
#include "../ptx/dynamic_smem.cuh"
#include "../ptx/grid_dependency.cuh"
#include "../ptx/smem.cuh"

namespace tq4::sm80 {

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    prefill_tiles_kernel(const __grid_constant__ AttentionParams p,
                         const __grid_constant__ TileWorkspace w, int pass) {
  constexpr int D = Config::D;
  uint8_t* const shared = ptx::dynamic_shared();
  const uint32_t smem = ptx::opaque(ptx::smem_address(shared));

  const CtaWork work = find_cta_work<Config>(p);
  UnitPlace place{-1, 0};
  UnitKeys unit{};
  if (work.seq >= 0) {
    unit = unit_keys(work.info.num_keys, work.q_len, p.window_left, w.tile_tokens);
    const int64_t before = sum_tiles_before<Config::kThreads>(
        p, w, work.seq, reinterpret_cast<int64_t*>(shared + Config::kBuffers));
    place = unit_place(w, before, unit.tiles, p.cache.num_kv_heads, work.kv_head);
  }
  if (place.pass != pass) {
    // The end of this kernel stands for the end of the expansion before it.
    ptx::wait_for_predecessor();
    return;
  }
  const ImageRing<Config> ring{smem};
  if (threadIdx.x == 0) {
    ring.init();
    const int64_t first = place.first_tile + (work.key_begin - unit.begin) / Config::kTile;
    *reinterpret_cast<ImageInfo*>(shared + Config::kPageInfo) = {
        w.tiles + first * PrefillImage<Config>::kBytes, work.key_begin,
        work.key_begin + work.info.num_tiles * Config::kTile};
  }
  write_cta_info<Config>(p, work, shared);
  reinterpret_cast<uint32_t*>(shared + Config::kLaneOffsets)[threadIdx.x] =
      make_lane_offsets<Config>();
  __syncthreads();  // infos and mbarriers are written; the sums of sum_tiles_before have been read

  // CTAs of the first wave rotate q while the expansion ends; later ones find it done, and can load
  // tile 0 beside the rotation.
  const bool first_wave = static_cast<int>(blockIdx.x) < p.num_sms;
  const auto load_first = [&] {
    ptx::wait_for_predecessor();
    ring.copy(0);
    ring.copy(1);
  };
  if (!first_wave) load_first();
  QueryFragments<Config> q;
  load_query<Config>(p, smem, q);
  if (first_wave) load_first();
  __syncthreads();  // the rotation panel has been read: tile 2 may take its place

  SoftmaxState<Config> state;
  start_softmax<Config>(p, p.k_code_scale, smem, q, state);
  float o[Config::kMTiles][D / 8][4] = {};

  // One loop over steps, not one over tiles and one inside: the steps lie one after the other in
  // the ring, and two counters less matter here.
  const auto image_info = [&](size_t field) {
    return static_cast<int>(ptx::ld_shared_volatile(smem + Config::kPageInfo + field));
  };
  uint32_t part = smem + Config::kBuffers;
  int key = image_info(offsetof(ImageInfo, key_begin));  // first one of the step
#pragma unroll 1
  for (; key < image_info(offsetof(ImageInfo, key_end)); key += Config::kInner) {
    const auto tile = [&] {
      return (key - image_info(offsetof(ImageInfo, key_begin))) / Config::kTile;
    };
    const bool first_part = key % Config::kTile == 0;
    if (first_part) ring.wait(tile());
    if (warp_keys<Config>(smem).sees(key, Config::kInner)) {
      attend_step<Config>(p, smem, part, 0, key, q, state, o);
    }
    // Not at the beginning of the tile: that would wait for the slowest warp to end the one before.
    if (first_part) ring.copy(tile() + 2);
    if ((key + Config::kInner) % Config::kTile == 0) ring.release(tile());
    part += Config::kPartBytes;
    if (part == smem + Config::kBuffersEnd) part = smem + Config::kBuffers;
  }
  write_output<Config>(p, smem, state, o);
}

}  // namespace tq4::sm80
