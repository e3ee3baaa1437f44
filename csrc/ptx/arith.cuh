// Scalar instructions that CUDA C++ does not expose as one intrinsic.
#pragma once
#include <cuda_fp16.h>

#include <cstdint>

namespace tq4::ptx {

// threadIdx.x that the compiler re-reads at each use.  What is derived from it is then recomputed
// inside a loop instead of being kept in registers across it.
__device__ __forceinline__ uint32_t thread_idx_volatile() {
  uint32_t x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// A value the compiler must keep in a register rather than compute again.
__device__ __forceinline__ uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// 2^x, about 2 ulp; exp2(-inf) = 0 (PTX ISA: ex2.approx).
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// max that propagates NaN, unlike fmaxf: a NaN query must come out as NaN, not as zeros.
__device__ __forceinline__ float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// tanh to about 1e-7 absolute.  tanh.approx is off by 2^-11, which a soft cap of 50 turns
// into an error of 2 % in the probability.
__device__ __forceinline__ float tanh_accurate(float x) {
  const float e = exp2_approx(x * 2.885390081777927f);  // e^(2x)
  return 1.f - 2.f * rcp_approx(e + 1.f);
}

// Two floats to packed fp16, `lo` in the low half, round to nearest even.
__device__ __forceinline__ uint32_t pack_f16x2(float lo, float hi) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}

__device__ __forceinline__ uint32_t pack_bf16x2(float lo, float hi) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}

__device__ __forceinline__ uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

// Byte permute: byte i of the result is byte (selector nibble i) of {hi, lo}.
__device__ __forceinline__ uint32_t prmt(uint32_t lo, uint32_t hi, uint32_t selector) {
  uint32_t y;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(lo), "r"(hi), "r"(selector));
  return y;
}

// c plus the dot product of the four unsigned bytes of a and b.  Runs beside the integer multiplier.
__device__ __forceinline__ uint32_t dot_u8x4(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t y;
  asm("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
}

// Bits of a where the mask is set, of b elsewhere: one LOP3 for any mask.
__device__ __forceinline__ uint32_t bit_select(uint32_t mask, uint32_t a, uint32_t b) {
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(y) : "r"(a), "r"(b), "r"(mask));
  return y;
}

}  // namespace tq4::ptx
