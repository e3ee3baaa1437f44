// Clusters of CTAs and their distributed shared memory (PTX ISA, "barrier.cluster", "mapa",
// "st.async"), sm_90.
#pragma once
#include <cstdint>

namespace tq4::ptx {

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Orders nothing by itself: a thread that has initialised mbarriers says mbarrier_fence_init
// before.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// Until all threads of the cluster have arrived.
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same place in the shared memory of another CTA of the cluster.
__device__ __forceinline__ uint32_t map_to_cta(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

// Stores to another CTA's shared memory that arrive as bytes at a barrier beside them.
__device__ __forceinline__ void st_async_v2(uint32_t mapped, uint32_t mapped_barrier, float x,
                                            float y) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::
          "r"(mapped),
      "r"(__float_as_uint(x)), "r"(__float_as_uint(y)), "r"(mapped_barrier)
      : "memory");
}

__device__ __forceinline__ void st_async_v4(uint32_t mapped, uint32_t mapped_barrier, float x,
                                            float y, float z, float w) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(mapped),
      "r"(__float_as_uint(x)), "r"(__float_as_uint(y)), "r"(__float_as_uint(z)),
      "r"(__float_as_uint(w)), "r"(mapped_barrier)
      : "memory");
}

}  // namespace tq4::ptx
