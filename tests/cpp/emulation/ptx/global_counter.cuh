// CPU versions of csrc/ptx/global_counter.cuh.
#pragma once
#include "../cuda_cpu.h"

namespace tq4::ptx {

inline void add_release(uint64_t* counter, uint64_t value) { *counter += value; }
inline uint64_t load_counter(const uint64_t* counter) { return *counter; }
inline void acquire_fence() {}
inline void nap() { emulation::fail("a kernel waits for one that has ended"); }

}  // namespace tq4::ptx
