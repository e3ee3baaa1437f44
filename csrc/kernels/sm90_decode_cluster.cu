// Decode of short contexts by clusters of CTAs: sm_90a.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <stdexcept>

#include "../device/decode_cluster.cuh"
#include "../device/launch.h"
#include "decode_steps.h"
#include "page_maps.h"

namespace tq4::sm90 {
namespace {

cudaLaunchAttribute cluster_attribute(int size) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(size);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

// Larger clusters than kClusterSize that are tried, the largest first.  An SM takes one CTA, and
// how many SMs a cluster can be spread over differs from part to part.
constexpr int kLargeSizes[] = {kLargestCluster, 14, 12, 10};

// How many clusters of each of these sizes run at the same time on the current device, 8 bits each.
uint32_t count_clusters(const void* kernel, int threads, int smem_bytes) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes),
             "opting into shared memory");
  uint32_t counts = 0;
  for (int i = 0; i < 4; ++i) {
    cudaLaunchAttribute attribute = cluster_attribute(kLargeSizes[i]);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(attribute.val.clusterDim.x);
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(smem_bytes);
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "counting clusters");
    counts |= static_cast<uint32_t>(std::min(clusters, 255)) << (8 * i);
  }
  return counts;
}

template <int D, bool kBoxes>
void launch_config(const AttentionParams& p, const DecodePlan& plan, Stream stream) {
  using Config = ClusterConfig<D, kBoxes>;
  constexpr int kRings = Config::kWarps * Config::kStages * Config::kTileBytes;
  constexpr int kResults = Config::kWarps * Config::kRows * Config::kRowPitch * 4;
  constexpr int kSmemBytes = kDecodeTableBytes +
                             round_up(static_cast<int>(sizeof(ClusterShared<Config>)), 128) +
                             std::max(kRings, kResults);
  const auto kernel = decode_cluster_kernel<Config>;
  const auto* function = reinterpret_cast<const void*>(kernel);
  check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
             "allowing large clusters");
  // Counts of the last device asked about, and above them its number, from 1.
  static std::atomic<uint64_t> counts{0};
  uint64_t known = counts.load(std::memory_order_relaxed);
  const auto device = static_cast<uint64_t>(current_device()) + 1;
  if (known >> 32 != device) {
    known = device << 32 | count_clusters(function, Config::kThreads, kSmemBytes);
    counts.store(known, std::memory_order_relaxed);
  }
  const int clusters = p.num_seqs * p.cache.num_kv_heads;
  DecodePlan sized = plan;
  for (int i = 3; i >= 0; --i) {
    if (static_cast<int>(known >> (8 * i) & 255) >= clusters) sized.cluster = kLargeSizes[i];
  }
  const cudaLaunchAttribute attribute = cluster_attribute(sized.cluster);
  PageMaps maps{};
  if constexpr (kBoxes) maps = make_page_maps(p.cache, plan.copy.stage);
  launch_kernel_with(&attribute, 1, kernel, dim3(clusters * sized.cluster), dim3(Config::kThreads),
                     kSmemBytes, stream, p, sized, maps);
}

template <int D>
void launch(const AttentionParams& p, const DecodePlan& plan, Stream stream) {
  return plan.cluster_copy == ClusterCopy::kBoxes ? launch_config<D, true>(p, plan, stream)
                                                  : launch_config<D, false>(p, plan, stream);
}

}  // namespace

void launch_decode_cluster(const AttentionParams& p, const DecodePlan& plan, Stream stream) {
  switch (p.cache.head_dim) {
    case 64:
      return launch<64>(p, plan, stream);
    case 128:
      return launch<128>(p, plan, stream);
    default:
      throw std::logic_error("decode: no cluster kernel for this head dimension");
  }
}

}  // namespace tq4::sm90
