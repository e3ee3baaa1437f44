// TQ4 prefill by mma.sync from images of unpacked tiles: sm_80 and up, INT8.
//
// The same products on the same rows as sm80_prefill.cuh; but K and V were unpacked by a kernel
// before (tile_expand.cuh), once for all CTAs, and arrive as they are to lie in shared memory; and
// queries were rotated and quantised by another one (query_units.cuh), to the bit as there:
//
//   workspace --cp.async--> ring of 3 images;  K --LDS.128--> and V --LDSM.T--> B fragments
//   workspace --LDG.128---> A fragments of q
//
// Copies run up to two tiles ahead.  Mbarriers order a copy before its use and a use before the
// next copy into its place (prefill_ring.cuh).  The matrix that rotates the output comes through
// the same ring, behind the last tile.
//
// Two forms, which compute the same bits:
//   8 warps   share a ring: a tile is copied for 256 rows (D = 256: 128)
//   4 warps   share one, for half as many rows.  A CTA has one ring (threads (128, 1)) or two of
//             them (threads (128, 2)) that know nothing of each other: threadIdx.y is the ring.
// The second is for grids that would not fill the device: of two rings one takes the work with most
// keys that is left and the other the one with fewest, so that no SM has more to do than others.
//
// The workspace may not hold all of the batch at once (tile_workspace.h): one launch a pass, in
// which works of other passes are left alone.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../device/prefill_config.cuh"
#include "../device/prefill_cta.cuh"
#include "../device/prefill_output.cuh"
#include "../device/prefill_ring.cuh"
#include "../device/prefill_steps.cuh"
#include "../device/query_units.cuh"
#include "../params.h"
#include "../ptx/dynamic_smem.cuh"
#include "../ptx/grid_dependency.cuh"
#include "../ptx/smem.cuh"

namespace tq4::sm80 {

template <typename Config>
__global__ void __launch_bounds__(256, 1)
    prefill_tiles_kernel(const __grid_constant__ AttentionParams p,
                         const __grid_constant__ TileWorkspace w,
                         const __grid_constant__ QueryBuffers queries, int pass) {
  constexpr int D = Config::D;
  uint8_t* const shared = ptx::dynamic_shared() + threadIdx.y * Config::kSmemBytes;
  const uint32_t smem = ptx::opaque(ptx::smem_address(shared));

  const int from_end = queries.num_works - 1 - static_cast<int>(blockIdx.x);
  const int index = threadIdx.y == 0 ? blockIdx.x : from_end;
  CtaWork work = find_work<Config>(p, queries.num_works, index);
  // The one in the middle of an odd number of works is the first ring's.
  if (threadIdx.y > 0 && from_end <= static_cast<int>(blockIdx.x)) work.seq = -1;
  UnitPlace place{-1, 0};
  UnitKeys unit{};
  if (work.seq >= 0) {
    unit = unit_keys(work.info.num_keys, work.q_len, p.window_left, w.tile_tokens);
    const int64_t before = sum_tiles_before<Config>(
        p, w, work.seq, reinterpret_cast<int64_t*>(shared + Config::kBuffers));
    place = unit_place(w, before, unit.tiles, p.cache.num_kv_heads, work.kv_head);
  }
  if (place.pass != pass) {
    // The end of this kernel stands for the end of those before it.
    ptx::wait_for_predecessor();
    return;
  }
  const ImageRing<Config> ring{smem, queries.rotation};
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
  // Infos and mbarriers are written; the sums of sum_tiles_before have been read.
  ring_barrier<Config>();

  ptx::wait_for_predecessor();
  ring.copy(0);
  ring.copy(1);
  QueryFragments<Config> q;
  load_fragments<Config>(p, queries, work, q);
  SoftmaxState<Config> state;
  start_softmax<Config>(smem, q.scale, state);
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

  using Rotation = RotationImage<Config>;
  const auto rotate = [&](const OutputFragments<Config>& a) {
    // Read again each time: all registers are taken.
    const auto tile = [&](int part) {
      return tile_info<Config>(smem, offsetof(TileInfo, num_tiles)) + part;
    };
#pragma unroll
    for (int part = 0; part < Rotation::kParts; ++part) {
      ring.wait(tile(part));
      multiply_rotation<Config, Rotation::kPartRows>(smem, ring.buffer(tile(part)),
                                                     part * (Rotation::kPartRows / 16), a, o);
      if (part + 2 < Rotation::kParts) ring.copy(tile(part + 2));
      if (part + Config::kStages < Rotation::kParts) ring.release(tile(part));
    }
  };
  write_output<Config, true>(p, smem, state, o, rotate,
                             [](int j, int t) { return PrefillImage<Config>::rotation_dim(j, t); });
}

}  // namespace tq4::sm80
