// Warp-level TF32 product (PTX ISA: mma.m16n8k8 .tf32), sm_80 and up.
//
// With g = lane / 4, t = lane % 4:
//   A  a0 = row g, k t   a1 = row g + 8, k t   a2 = row g, k t + 4   a3 = row g + 8, k t + 4
//   B  b0 = col g, k t   b1 = col g, k t + 4         C as in mma.cuh
// The hardware reads the upper 19 bits of each operand.  An fp32 x is the sum of tf32_high(x) and
// tf32_low(x) up to 2^-22 of it; fp16 and bf16 values are exact in the high part alone.
#pragma once
#include <cstdint>

namespace tq4::ptx {

__device__ __forceinline__ uint32_t tf32_high(float x) { return __float_as_uint(x) & 0xffffe000u; }

__device__ __forceinline__ uint32_t tf32_low(float x) {
  return __float_as_uint(x - __uint_as_float(tf32_high(x)));
}

// D += A B
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                 uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace tq4::ptx
