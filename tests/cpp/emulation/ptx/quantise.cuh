// CPU version of csrc/ptx/quantise.cuh.
#pragma once
#include "../intrinsics.h"

namespace tq4::ptx {

inline float fma_sat(float a, float b, float c) {
  const float x = std::fma(a, b, c);
  return x > 0.f ? std::fmin(x, 1.f) : 0.f;
}
inline float sqrt_approx(float x) { return std::sqrt(x); }
inline float rsqrt_approx(float x) { return 1.f / std::sqrt(x); }

}  // namespace tq4::ptx
