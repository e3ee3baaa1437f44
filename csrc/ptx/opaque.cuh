// Hides where a value comes from, so that the compiler keeps it in a register instead of folding its
// computation into every use.
#pragma once

namespace tq4::ptx {

template <typename T>
__device__ __forceinline__ T* opaque(T* p) {
  asm volatile("" : "+l"(p));
  return p;
}

}  // namespace tq4::ptx
