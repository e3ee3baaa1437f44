// INT8 prefill by mma.sync from tiles that were unpacked ahead, pass by pass.
#include <algorithm>
#include <atomic>

#include "../device/launch.h"
#include "../device/tile_expand.cuh"
#include "sm80_prefill.h"
#include "sm80_prefill_launch.cuh"
#include "sm80_prefill_tiles.cuh"

namespace tq4::sm80 {
namespace {

template <int D>
using TilesConfig = PrefillConfig<D, true, true>;

template <int D>
TileWorkspace plan_tiles(const AttentionParams& p) {
  using Image = PrefillImage<TilesConfig<D>>;
  return make_tile_workspace(p.num_seqs, p.cache.num_kv_heads,
                             static_cast<int64_t>(p.max_blocks) * p.cache.block_size,
                             Image::kTileTokens, Image::kBytes, kTileWorkspaceLimit);
}

}  // namespace

int64_t prefill_tiles_workspace_bytes(const AttentionParams& p) {
  return dispatch_head_dim(p.cache.head_dim, [&](auto d) {
    const TileWorkspace w = plan_tiles<d>(p);
    return w.num_passes > 0 && w.num_passes <= kMaxTilePasses ? w.capacity * w.tile_bytes : 0;
  });
}

void launch_prefill_tiles(const AttentionParams& p, Stream stream) {
  const bool overlapped = waits_for_predecessors(prefill_tiles_kernel<TilesConfig<128>>, p.arch);
  dispatch_head_dim(p.cache.head_dim, [&](auto d) {
    using Config = TilesConfig<d>;
    TileWorkspace w = plan_tiles<d>(p);
    w.tiles = static_cast<uint8_t*>(p.workspace);
    const int64_t expand_grid = std::min<int64_t>(std::max(p.num_sms, 1) * kExpandCtas, w.capacity);
    for (int pass = 0; pass < w.num_passes; ++pass) {
      // The first one reads pages that kernels before this call may have written, and reads them
      // before it waits.
      launch_dependent_kernel(overlapped && pass > 0, expand_tiles_kernel<PrefillImage<Config>>,
                              dim3(static_cast<unsigned>(expand_grid)), dim3(kExpandThreads),
                              sizeof(PackedTile<PrefillImage<Config>>), stream, p, w, pass);
      launch_dependent_kernel(overlapped, prefill_tiles_kernel<Config>,
                              dim3(prefill_grid<Config>(p)), dim3(Config::kThreads),
                              Config::kSmemBytes, stream, p, w, pass);
    }
  });
}

}  // namespace tq4::sm80
