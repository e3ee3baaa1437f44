// Prefetches into the caches (PTX ISA, "prefetch").  Hints: they never fault.
#pragma once
#include <cstdint>

namespace tq4::ptx {

// The line of global memory at `p` into L2.
__device__ __forceinline__ void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// The first `bytes` of a kernel's code into L2, a line a caller: caller `index` of `count`.  Code
// lies in global memory, and the first SM to run through it waits for each line of it to come from
// there.
template <typename Kernel>
__device__ __forceinline__ void prefetch_code(Kernel* kernel, int bytes, int index, int count) {
  constexpr int kLine = 128;
  const auto* code = reinterpret_cast<const uint8_t*>(kernel);
#pragma unroll 1
  for (int at = index * kLine; at < bytes; at += count * kLine) prefetch_l2(code + at);
}

}  // namespace tq4::ptx
