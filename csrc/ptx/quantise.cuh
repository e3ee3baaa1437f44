// Scalar instructions of the quantiser (PTX ISA, "Floating-point instructions").
#pragma once

namespace tq4::ptx {

// a * b + c, rounded once and clamped to [0, 1]; NaN becomes 0.
__device__ __forceinline__ float fma_sat(float a, float b, float c) {
  float d;
  asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
  return d;
}

// About 1 ulp; sqrt(0) = 0, subnormals kept (PTX ISA: sqrt.approx).
__device__ __forceinline__ float sqrt_approx(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Relative error 2^-22.9 (PTX ISA: rsqrt.approx).
__device__ __forceinline__ float rsqrt_approx(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace tq4::ptx
