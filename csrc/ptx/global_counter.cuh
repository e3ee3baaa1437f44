// Counters in global memory by which the CTAs of one kernel tell those of another how far they are
// (PTX ISA, "Memory consistency model": release and acquire patterns at the scope of the GPU).
#pragma once
#include <cstdint>

namespace tq4::ptx {

// Adds; whoever has seen the sum and then fenced sees what this thread wrote before, and what other
// threads of its warp wrote before a __syncwarp.
__device__ __forceinline__ void add_release(uint64_t* counter, uint64_t value) {
  asm volatile("red.release.gpu.global.add.u64 [%0], %1;" ::"l"(counter), "l"(value) : "memory");
}

// Not an acquire, which would empty the SM's L1 each time.
__device__ __forceinline__ uint64_t load_counter(const uint64_t* counter) {
  uint64_t value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(counter) : "memory");
  return value;
}

__device__ __forceinline__ void acquire_fence() {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

// Between two looks at a counter: leaves the issue slots to others.
__device__ __forceinline__ void nap() { asm volatile("nanosleep.u32 200;" ::: "memory"); }

}  // namespace tq4::ptx
