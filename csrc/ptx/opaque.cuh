// Hides where a value comes from, so that the compiler keeps it in a register instead of folding
// its computation into every use.
#pragma once
#include <cstdint>

namespace tq4::ptx {

template <typename T>
__device__ __forceinline__ T* opaque(T* p) {
  asm volatile("" : "+l"(p));
  return p;
}

// Offsets to a pointer from outside: the pointer itself, made opaque, would no longer be known to
// point to global memory.
__device__ __forceinline__ int64_t opaque_offset(int64_t offset) {
  asm volatile("" : "+l"(offset));
  return offset;
}

}  // namespace tq4::ptx
