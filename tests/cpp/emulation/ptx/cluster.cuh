// CPU versions of csrc/ptx/cluster.cuh: clusters of one CTA.
#pragma once
#include "smem.cuh"

namespace tq4::ptx {

inline uint32_t cluster_rank() { return 0; }
inline void cluster_arrive() {}
inline void cluster_wait() {}
inline uint32_t map_to_cta(uint32_t address, uint32_t rank) {
  if (rank != 0) emulation::fail("a cluster has one CTA here");
  return address;
}

template <int kCount>
void st_async(uint32_t address, uint32_t barrier, const std::array<float, kCount>& values) {
  auto& machine = emulation::machine();
  machine.flying[machine.thread_index()].push_back([=] {
    store_shared(address, values);
    emulation::Mbarrier& arrived = emulation::machine().mbarrier(barrier);
    arrived.bytes -= sizeof values;
    emulation::machine().finish_phase(arrived);
  });
}
inline void st_async_v2(uint32_t address, uint32_t barrier, float x, float y) {
  st_async<2>(address, barrier, {x, y});
}
inline void st_async_v4(uint32_t address, uint32_t barrier, float x, float y, float z, float w) {
  st_async<4>(address, barrier, {x, y, z, w});
}

}  // namespace tq4::ptx
