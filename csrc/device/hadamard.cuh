// Products with Sylvester's Hadamard matrix H, by butterflies.
#pragma once
#include <cstdint>

#include "common.cuh"

namespace tq4 {

// x H (which is H x) of a vector that a warp holds, kCount values a lane.  The bits of a value's
// place in the vector are those of its lane and of its index in x, in any order.
template <int kCount>
__device__ __forceinline__ void transform_hadamard(float (&x)[kCount]) {
#pragma unroll
  for (int step = 1; step < kCount; step *= 2) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      if (e & step) continue;
      const float sum = x[e] + x[e + step];
      x[e + step] = x[e] - x[e + step];
      x[e] = sum;
    }
  }
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const float sign = threadIdx.x & step ? -1.f : 1.f;
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      x[e] = fmaf(sign, x[e], __shfl_xor_sync(kFullWarp, x[e], step));
    }
  }
}

// What makes H orthogonal: 1 / sqrt(D), rounded once, as in the matrices of tq4.rotation.
template <int D>
constexpr float kHadamardUnit = D == 64    ? 0.125f
                                : D == 128 ? 0.08838834764831845f
                                           : 0.0625f;

}  // namespace tq4
