// Decode of short contexts by clusters of CTAs: sm_90a.
#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "../device/decode_cluster.cuh"
#include "../device/launch.h"
#include "decode_steps.h"

namespace tq4::sm90 {
namespace {

// How many clusters of a size that not every device takes run at the same time; 0: none.
int most_clusters(const void* kernel, cudaLaunchAttribute attribute, int threads, int smem_bytes) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes),
             "opting into shared memory");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(attribute.val.clusterDim.x);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = smem_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "counting clusters");
  return clusters;
}

// Enqueues the kernel, or returns false if the device cannot run all clusters side by side.
template <int D, int kSize>
bool launch_config(const AttentionParams& p, const DecodePlan& plan, Stream stream) {
  using Config = ClusterConfig<D, kSize>;
  constexpr int kRings = Config::kWarps * Config::kStages * Config::kTileBytes;
  constexpr int kResults = Config::kWarps * Config::kRows * Config::kRowPitch * 4;
  constexpr int kSmemBytes = kDecodeTableBytes +
                             round_up(static_cast<int>(sizeof(ClusterShared<Config>)), 128) +
                             std::max(kRings, kResults);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = Config::kSize;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  const int clusters = p.num_seqs * p.cache.num_kv_heads;
  const auto kernel = decode_cluster_kernel<Config>;
  if constexpr (kSize > kClusterSize) {
    if (clusters * kSize > p.num_sms) return false;
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
               "allowing large clusters");
    // 4096 * device + clusters that it has room for, of the last device asked about.
    static std::atomic<int> room{-1};
    int known = room.load(std::memory_order_relaxed);
    const int device = current_device();
    if (known / 4096 != device || known < 0) {
      known = 4096 * device + most_clusters(reinterpret_cast<const void*>(kernel), attribute,
                                            Config::kThreads, kSmemBytes);
      room.store(known, std::memory_order_relaxed);
    }
    if (clusters > known % 4096) return false;
  }
  launch_kernel_with(&attribute, 1, kernel, dim3(clusters * kSize), dim3(Config::kThreads),
                     kSmemBytes, stream, p, plan);
  return true;
}

template <int D>
void launch_head_dim(const AttentionParams& p, const DecodePlan& plan, Stream stream) {
  if (!launch_config<D, kLargeClusterSize>(p, plan, stream)) {
    launch_config<D, kClusterSize>(p, plan, stream);
  }
}

}  // namespace

void launch_decode_cluster(const AttentionParams& p, const DecodePlan& plan, Stream stream) {
  switch (p.cache.head_dim) {
    case 64:
      return launch_head_dim<64>(p, plan, stream);
    case 128:
      return launch_head_dim<128>(p, plan, stream);
    default:
      throw std::logic_error("decode: no cluster kernel for this head dimension");
  }
}

}  // namespace tq4::sm90
