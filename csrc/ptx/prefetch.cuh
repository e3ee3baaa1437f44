// Prefetches into the caches (PTX ISA, "prefetch").  Hints: they never fault.
#pragma once

namespace tq4::ptx {

// The line of global memory at `p` into L2.
__device__ __forceinline__ void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

}  // namespace tq4::ptx
