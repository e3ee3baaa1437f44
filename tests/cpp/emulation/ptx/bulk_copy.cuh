// CPU versions of csrc/ptx/bulk_copy.cuh.  Every copy is its own queue: they land in any order.
#pragma once
#include "../cuda_cpu.h"
#include "smem.cuh"

namespace tq4::ptx {

inline void mbarrier_arrive_expect_bytes(uint32_t barrier, uint32_t bytes) {
  auto& machine = emulation::machine();
  machine.mbarrier(barrier).bytes += bytes;
  machine.arrive(barrier);
}

inline void bulk_copy_to_shared(uint32_t dst, const void* src, uint32_t bytes, uint32_t barrier) {
  if (reinterpret_cast<uintptr_t>(src) % 16 != 0 || bytes % 16 != 0)
    emulation::fail("misaligned bulk copy");
  auto& machine = emulation::machine();
  static int queue = 0;
  uint8_t* to = shared_pointer(dst, 16);
  shared_pointer(dst + bytes - 16, 16);
  machine.flying[100000 + queue++ % 100000].push_back([=] {
    std::memcpy(to, src, bytes);
    auto& m = emulation::machine();
    emulation::Mbarrier& target = m.mbarrier(barrier);
    target.bytes -= bytes;
    m.finish_phase(target);
  });
}

inline void bulk_copy_once_to_shared(uint32_t dst, const void* src, uint32_t bytes, uint32_t barrier,
                                     uint64_t) {
  bulk_copy_to_shared(dst, src, bytes, barrier);
}

}  // namespace tq4::ptx
