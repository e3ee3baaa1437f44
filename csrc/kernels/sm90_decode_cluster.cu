// Decode of short contexts by clusters of CTAs: sm_90a.
#include <algorithm>
#include <stdexcept>

#include "../device/decode_cluster.cuh"
#include "../device/launch.h"
#include "decode_steps.h"

namespace tq4::sm90 {
namespace {

template <int D>
void launch_config(const AttentionParams& p, const DecodePlan& plan, Stream stream) {
  using Config = ClusterConfig<D, kClusterSize>;
  constexpr int kRings = Config::kWarps * Config::kStages * Config::kTileBytes;
  constexpr int kResults = Config::kWarps * Config::kRows * Config::kRowPitch * 4;
  constexpr int kSmemBytes = kDecodeTableBytes +
                             round_up(static_cast<int>(sizeof(ClusterShared<Config>)), 128) +
                             std::max(kRings, kResults);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = Config::kSize;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  const int ctas = p.num_seqs * p.cache.num_kv_heads * Config::kSize;
  launch_kernel_with(&attribute, 1, decode_cluster_kernel<Config>, dim3(ctas),
                     dim3(Config::kThreads), kSmemBytes, stream, p, plan);
}

}  // namespace

void launch_decode_cluster(const AttentionParams& p, const DecodePlan& plan, Stream stream) {
  switch (p.cache.head_dim) {
    case 64:
      return launch_config<64>(p, plan, stream);
    case 128:
      return launch_config<128>(p, plan, stream);
    default:
      throw std::logic_error("decode: no cluster kernel for this head dimension");
  }
}

}  // namespace tq4::sm90
