// Loads and stores of global memory whose addresses are numbers or whose predicates are data (PTX
// ISA, "ld.global.nc", "st"): no branch, and no generic address.
#pragma once
#include <cstdint>

namespace tq4::ptx {

// value = *p if `condition`.  For what nobody writes while the kernel runs.
__device__ __forceinline__ void ld_global_if(int64_t& value, const int64_t* p, bool condition) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %2, 0;\n"
      "@p ld.global.nc.b64 %0, [%1];\n"
      "}"
      : "+l"(value)
      : "l"(p), "r"(static_cast<int32_t>(condition)));
}

// What another kernel may be writing at the moment: some value that is or was there, and nothing
// that the L1 keeps for later loads (PTX ISA, "ld", .relaxed).
__device__ __forceinline__ int32_t ld_global_relaxed(const int32_t* p) {
  int32_t value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

__device__ __forceinline__ void st_global(int64_t address, const uint32_t (&words)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

__device__ __forceinline__ void st_global(int64_t address, const uint32_t (&words)[2]) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(words[0]), "r"(words[1])
               : "memory");
}

__device__ __forceinline__ void st_global(int64_t address, float value) {
  asm volatile("st.global.f32 [%0], %1;" ::"l"(address), "f"(value) : "memory");
}

}  // namespace tq4::ptx
