// CPU versions of csrc/ptx/mbarrier.cuh.
#pragma once
#include "../cuda_cpu.h"

namespace tq4::ptx {

inline void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  if (barrier % 8 != 0) emulation::fail("misaligned mbarrier");
  const int count = static_cast<int>(arrivals);
  emulation::machine().mbarriers[barrier] = {count, count, 0, 0};
}
inline void mbarrier_fence_init() {}
inline void mbarrier_arrive(uint32_t barrier) { emulation::machine().arrive(barrier); }
inline void mbarrier_arrive_on_cp_async(uint32_t barrier) {
  auto& machine = emulation::machine();
  machine.flying[machine.thread_index()].push_back([=] { emulation::machine().arrive(barrier); });
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  auto& machine = emulation::machine();
  machine.wait([&] { return (machine.mbarrier(barrier).phase & 1) != parity; });
}
inline void named_barrier_sync(uint32_t id, uint32_t threads) {
  emulation::barrier(static_cast<int>(id), static_cast<int>(threads));
}
inline void named_barrier_arrive(uint32_t id, uint32_t threads) {
  emulation::arrive_at_barrier(static_cast<int>(id), static_cast<int>(threads));
}

}  // namespace tq4::ptx
