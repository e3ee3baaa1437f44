// Decode of short contexts by clusters of CTAs: sm_90a.
#include <algorithm>
#include <stdexcept>
#include <unordered_map>

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

template <int D, bool kBoxes>
constexpr int cluster_smem_bytes() {
  using Config = ClusterConfig<D, kBoxes>;
  constexpr int kRings = Config::kWarps * Config::kStages * Config::kTileBytes;
  constexpr int kResults = Config::kWarps * Config::kRows * Config::kRowPitch * 4;
  return kDecodeTableBytes + round_up(static_cast<int>(sizeof(ClusterShared<Config>)), 128) +
         std::max(kRings, kResults);
}

// A kernel that may be launched in clusters of any size.
template <int D, bool kBoxes>
auto cluster_kernel() {
  const auto kernel = decode_cluster_kernel<ClusterConfig<D, kBoxes>>;
  const auto* function = reinterpret_cast<const void*>(kernel);
  check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
             "allowing large clusters");
  return kernel;
}

// By the largest of the kernels; of any of them an SM takes one CTA.
ClusterRoom count_clusters() {
  const auto* kernel = reinterpret_cast<const void*>(cluster_kernel<128, true>());
  constexpr int kSmemBytes = cluster_smem_bytes<128, true>();
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes),
             "opting into shared memory");
  ClusterRoom room{};
  for (int size = kSmallestCluster; size <= kLargestCluster; ++size) {
    cudaLaunchAttribute attribute = cluster_attribute(size);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(attribute.val.clusterDim.x);
    config.blockDim = dim3(ClusterConfig<128, true>::kThreads);
    config.dynamicSmemBytes = kSmemBytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    check_cuda(cudaOccupancyMaxActiveClusters(&room.clusters[size], kernel, &config),
               "counting clusters");
  }
  return room;
}

template <int D, bool kBoxes>
void launch_config(const AttentionParams& p, const DecodePlan& plan, Stream stream) {
  const cudaLaunchAttribute attribute = cluster_attribute(plan.cluster);
  PageMaps maps{};
  if constexpr (kBoxes) maps = make_page_maps(p.cache, plan.copy.stage);
  launch_kernel_with(&attribute, 1, cluster_kernel<D, kBoxes>(),
                     dim3(p.num_seqs * p.cache.num_kv_heads * plan.cluster),
                     dim3(ClusterConfig<D, kBoxes>::kThreads), cluster_smem_bytes<D, kBoxes>(),
                     stream, p, plan, maps);
}

template <int D>
void launch(const AttentionParams& p, const DecodePlan& plan, Stream stream) {
  return plan.cluster_copy == ClusterCopy::kBoxes ? launch_config<D, true>(p, plan, stream)
                                                  : launch_config<D, false>(p, plan, stream);
}

}  // namespace

ClusterRoom find_cluster_room() {
  static thread_local std::unordered_map<int, ClusterRoom> known;  // by device
  const int device = current_device();
  const auto found = known.find(device);
  return found != known.end() ? found->second : known[device] = count_clusters();
}

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
