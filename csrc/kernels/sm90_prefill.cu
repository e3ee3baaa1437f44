// INT8 prefill by wgmma, sm_90a: queries and tiles are prepared in the workspace, pass by pass.
#include <algorithm>
#include <stdexcept>

#include "../device/launch.h"
#include "../device/prefill_prepare.cuh"
#include "../device/tile_expand.cuh"
#include "../device/wgmma_prefill.cuh"
#include "head_dim.h"
#include "sm90_prefill.h"

namespace tq4::sm90 {
namespace {

struct Plan {
  TileWorkspace tiles;
  PrefillBuffers buffers;
  int64_t tiles_offset, bytes;
  int64_t num_images;
};

template <int D>
Plan make_plan(const AttentionParams& p) {
  using Image = WgmmaImage<D>;
  Plan plan{};
  const int group = p.num_q_heads / p.cache.num_kv_heads;
  const int64_t slots = prefill_slots(p.num_tokens, group, QueryImage<D>::kRows, p.num_seqs);
  plan.num_images = slots * p.cache.num_kv_heads;
  if (plan.num_images >= INT32_MAX / 2) {
    throw std::invalid_argument("q: too many query tokens for one call");
  }
  plan.buffers.num_slots = static_cast<int32_t>(slots);
  plan.buffers.counters = 0;
  plan.buffers.queries = round_up(4 * kMaxTilePasses, PrefillConfig<D>::kAlign);
  plan.buffers.rotation = round_up<int64_t>(
      plan.buffers.queries + plan.num_images * QueryImage<D>::kBytes, PrefillConfig<D>::kAlign);
  plan.tiles_offset = plan.buffers.rotation + int64_t{Image::kRotationTiles} * Image::Value::kBytes;
  plan.tiles = make_tile_workspace(p.num_seqs, p.cache.num_kv_heads,
                                   static_cast<int64_t>(p.max_blocks) * p.cache.block_size,
                                   Image::kTileTokens, Image::kBytes, kTileWorkspaceLimit);
  plan.bytes = plan.tiles_offset + plan.tiles.capacity * plan.tiles.tile_bytes;
  return plan;
}

template <int D>
void launch(const AttentionParams& p, Stream stream) {
  using Config = PrefillConfig<D>;
  using Prepare = PrepareConfig<D>;
  Plan plan = make_plan<D>(p);
  auto* workspace = static_cast<uint8_t*>(p.workspace);
  plan.tiles.tiles = workspace + plan.tiles_offset;
  const auto images = static_cast<unsigned>(plan.num_images);
  const auto expand = [&](int pass) {
    const int64_t grid =
        std::min<int64_t>(p.num_sms * kExpandCtas<WgmmaImage<D>>, plan.tiles.capacity);
    launch_dependent_kernel(true, expand_tiles_kernel<WgmmaImage<D>>,
                            dim3(static_cast<unsigned>(grid)), dim3(WgmmaImage<D>::kExpandThreads),
                            sizeof(PackedTile<WgmmaImage<D>>), stream, p, plan.tiles, pass);
  };
  // Each kernel starts when the one before leaves room, and waits for all before it at its end (or
  // before it reads what they wrote).  Queries first, as that takes longer: one CTA an SM, so that
  // none of them has to wait for another and those of the expansion start beside them.
  const unsigned prepare_grid =
      std::min(ceil_div(images * Prepare::kParts, static_cast<unsigned>(Prepare::kGroups)),
               static_cast<unsigned>(p.num_sms));
  launch_kernel(prepare_queries_kernel<D>, dim3(prepare_grid), dim3(Prepare::kThreads),
                Prepare::kSmemBytes, stream, p, workspace + plan.buffers.queries,
                static_cast<int>(images), workspace + plan.buffers.rotation,
                reinterpret_cast<int32_t*>(workspace + plan.buffers.counters),
                plan.tiles.num_passes);
  for (int pass = 0; pass < plan.tiles.num_passes; ++pass) {
    expand(pass);
    launch_dependent_kernel(
        true, wgmma_prefill_kernel<D>, dim3(std::min(images, static_cast<unsigned>(p.num_sms))),
        dim3(Config::kThreads), Config::kSmemBytes, stream, p, plan.tiles, plan.buffers, pass);
  }
}

}  // namespace

int64_t prefill_workspace_bytes(const AttentionParams& p) {
  return dispatch_head_dim(p.cache.head_dim, [&](auto d) {
    const Plan plan = make_plan<d>(p);
    return plan.tiles.num_passes > 0 && plan.tiles.num_passes <= kMaxTilePasses ? plan.bytes : 0;
  });
}

void launch_prefill(const AttentionParams& p, Stream stream) {
  dispatch_head_dim(p.cache.head_dim, [&](auto d) { launch<d>(p, stream); });
}

}  // namespace tq4::sm90
