// Prefetch into the L2 cache (PTX ISA: prefetch.global.L2).
#pragma once

namespace tq4::ptx {

// The cache line that holds `p`, on its way while the caller goes on.
__device__ __forceinline__ void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

}  // namespace tq4::ptx
