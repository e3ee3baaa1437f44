// Warp-level matrix products (PTX ISA, "Warp-level matrix instructions: mma.sync"), sm_80 and up.
//
// Fragment maps used throughout, with g = lane / 4 and t = lane % 4:
//   C/D m16n8       c0,c1 = row g,     cols 2t, 2t+1      c2,c3 = row g + 8, cols 2t, 2t+1
//   A   m16n8k32 s8 a0 = row g,   k 4t..4t+3              a1 = row g + 8, k 4t..4t+3
//                   a2 = row g,   k 16+4t..               a3 = row g + 8, k 16+4t..
//   B   k32n8    s8 b0 = col g,   k 4t..4t+3              b1 = col g, k 16+4t..
//   A   m16n8k16 f16 a0 = row g,  k 2t,2t+1               a1 = row g + 8, k 2t,2t+1
//                   a2 = row g,   k 8+2t,8+2t+1           a3 = row g + 8, k 8+2t,8+2t+1
//   B   k16n8   f16 b0 = col g,   k 2t,2t+1               b1 = col g, k 8+2t,8+2t+1
// The k index may be permuted at will as long as A and B are permuted alike.
#pragma once
#include <cstdint>

namespace tq4::ptx {

// D = A B + C, s8 inputs, exact s32 accumulation.  D and C may be different registers, so an
// accumulator can start from a constant at no cost.
__device__ __forceinline__ void mma_m16n8k32_s8s8s32(int32_t (&d)[4], const uint32_t (&a)[4],
                                                     uint32_t b0, uint32_t b1,
                                                     const int32_t (&c)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]),
        "r"(c[2]), "r"(c[3]));
}

// D += A B, f16 inputs, f32 accumulation.
__device__ __forceinline__ void mma_m16n8k16_f16f16f32(float (&d)[4], const uint32_t (&a)[4],
                                                       uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace tq4::ptx
