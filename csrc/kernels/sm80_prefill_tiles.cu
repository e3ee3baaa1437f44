// INT8 prefill by mma.sync from tiles that were unpacked ahead, pass by pass.
#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "../device/launch.h"
#include "../device/query_units.cuh"
#include "../device/tile_expand.cuh"
#include "head_dim.h"
#include "sm80_prefill.h"
#include "sm80_prefill_tiles.cuh"

namespace tq4::sm80 {
namespace {

// Rows share a ring 8 warps at a time, or 4.
template <int D>
using WideConfig = PrefillConfig<D, true, true>;
template <int D>
using NarrowConfig = PrefillConfig<D, true, true, 4>;

// The workspace: units | rotation | tiles.
struct Plan {
  TileWorkspace tiles;
  QueryBuffers queries;  // num_works is that of the launch
  int64_t rotation_offset, tiles_offset, bytes;
};

int count(int64_t things) {
  if (things > INT32_MAX) throw std::invalid_argument("q: too many query tokens for one call");
  return static_cast<int>(things);
}

template <int D>
Plan make_plan(const AttentionParams& p) {
  using Image = PrefillImage<WideConfig<D>>;
  constexpr int64_t kAlign = 256;
  Plan plan{};
  const int64_t heads = p.cache.num_kv_heads;
  const int group = p.num_q_heads / p.cache.num_kv_heads;
  const int64_t units = heads * prefill_slots(p.num_tokens, group, QueryUnit<D>::kRows, p.num_seqs);
  plan.queries.num_units = count(units);
  plan.rotation_offset = round_up(units * QueryUnit<D>::kBytes, kAlign);
  plan.tiles_offset =
      plan.rotation_offset + round_up<int64_t>(RotationImage<WideConfig<D>>::kBytes, kAlign);
  plan.tiles = make_tile_workspace(p.num_seqs, p.cache.num_kv_heads,
                                   static_cast<int64_t>(p.max_blocks) * p.cache.block_size,
                                   Image::kTileTokens, Image::kBytes, kTileWorkspaceLimit);
  plan.bytes = plan.tiles_offset + plan.tiles.capacity * plan.tiles.tile_bytes;
  return plan;
}

template <typename Config>
int num_works(const AttentionParams& p) {
  const int group = p.num_q_heads / p.cache.num_kv_heads;
  return count(prefill_slots(p.num_tokens, group, Config::kRows, p.num_seqs) *
               p.cache.num_kv_heads);
}

// How many rings of 4 warps a CTA has; 0: one of 8 warps.  Few works are spread over all SMs, one
// or two each; when there are more, 8 warps that share their copies are faster.
template <int D>
int rings_of_four(const AttentionParams& p, int max_smem_bytes) {
  using Narrow = NarrowConfig<D>;
  const int works = num_works<Narrow>(p);
  if (works <= p.num_sms) return 1;
  return works <= 2 * p.num_sms && 2 * Narrow::kSmemBytes <= max_smem_bytes ? 2 : 0;
}

template <int D>
void launch(const AttentionParams& p, Stream stream) {
  using Wide = WideConfig<D>;
  using Narrow = NarrowConfig<D>;
  const bool overlapped = waits_for_predecessors(prefill_tiles_kernel<WideConfig<128>>, p.arch);
  Plan plan = make_plan<D>(p);
  auto* const workspace = static_cast<uint8_t*>(p.workspace);
  plan.tiles.tiles = workspace + plan.tiles_offset;
  plan.queries.units = workspace;
  plan.queries.rotation = p.out_rotation != nullptr ? workspace + plan.rotation_offset : nullptr;

  // Queries and the first tiles are prepared side by side where kernels overlap.  The first one is
  // an ordinary launch, so that the second one may read pages that kernels before this call have
  // written; each waits for those before it at its end (or before it reads what they wrote).
  const int max_smem = device_properties().max_smem_bytes;
  const bool resident = QueryPanels<D>::bytes(true) <= max_smem;
  using Queries = QueryConfig<D>;
  const int query_grid =
      std::min(ceil_div(plan.queries.num_units, Queries::kWarps), std::max(p.num_sms, 1));
  launch_kernel(rotate_queries_kernel<Wide>, dim3(query_grid), dim3(Queries::kThreads),
                p.q_rotation != nullptr ? QueryPanels<D>::bytes(resident) : 0, stream, p,
                plan.queries, resident);

  const int64_t expand_grid = std::min<int64_t>(
      std::max(p.num_sms, 1) * kExpandCtas<PrefillImage<Wide>>, plan.tiles.capacity);
  const int rings = rings_of_four<D>(p, max_smem);
  plan.queries.num_works = rings > 0 ? num_works<Narrow>(p) : num_works<Wide>(p);
  for (int pass = 0; pass < plan.tiles.num_passes; ++pass) {
    launch_dependent_kernel(overlapped, expand_tiles_kernel<PrefillImage<Wide>>,
                            dim3(static_cast<unsigned>(expand_grid)),
                            dim3(PrefillImage<Wide>::kExpandThreads),
                            sizeof(PackedTile<PrefillImage<Wide>>), stream, p, plan.tiles, pass);
    if (rings > 0) {
      launch_dependent_kernel(overlapped, prefill_tiles_kernel<Narrow>,
                              dim3(ceil_div(plan.queries.num_works, rings)),
                              dim3(Narrow::kThreads, rings), rings * Narrow::kSmemBytes, stream, p,
                              plan.tiles, plan.queries, pass);
    } else {
      launch_dependent_kernel(overlapped, prefill_tiles_kernel<Wide>, dim3(plan.queries.num_works),
                              dim3(Wide::kThreads), Wide::kSmemBytes, stream, p, plan.tiles,
                              plan.queries, pass);
    }
  }
}

}  // namespace

int64_t prefill_tiles_workspace_bytes(const AttentionParams& p) {
  return dispatch_head_dim(p.cache.head_dim, [&](auto d) {
    const Plan plan = make_plan<d>(p);
    return plan.tiles.num_passes > 0 && plan.tiles.num_passes <= kMaxTilePasses ? plan.bytes : 0;
  });
}

void launch_prefill_tiles(const AttentionParams& p, Stream stream) {
  dispatch_head_dim(p.cache.head_dim, [&](auto d) { launch<d>(p, stream); });
}

}  // namespace tq4::sm80
