// bf16 counterpart of mma_m16n8k16_f16f16f32 in mma.cuh: the same fragment maps.
#pragma once
#include <cstdint>

namespace tq4::ptx {

// D += A B, bf16 inputs, f32 accumulation.
__device__ __forceinline__ void mma_m16n8k16_bf16bf16f32(float (&d)[4], const uint32_t (&a)[4],
                                                         uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace tq4::ptx
