// Rounding of a rotated query row to INT8 codes, once for all kernels (the INT8 recipe):
//   s_q = max|q_rot| / 127,  q8 = round half to even(q_rot / s_q)
#pragma once
#include <cstdint>

#include "../ptx/arith.cuh"

namespace tq4 {

// Rows of zeros (or of nothing representable) get codes 0 and any unit.
constexpr float kSmallestRow = 1e-30f;

// s_q, the value of one unit of a row's codes; NaN stays.
__device__ __forceinline__ float query_unit(float largest) {
  return largest < kSmallestRow ? 1.f : __fdiv_rn(largest, 127.f);
}

// What query_quotient wants beside the unit, which may have been given a sign.
__device__ __forceinline__ float query_inverse(float largest, float unit) {
  return largest < kSmallestRow ? 0.f : __frcp_rn(unit);
}

// v / unit, correctly rounded but for a few cases in a million: 16-bit inputs hit exact ties, which
// a plain product with the reciprocal would break either way.
__device__ __forceinline__ float query_quotient(float v, float unit, float inverse) {
  const float estimate = v * inverse;
  return fmaf(fmaf(-estimate, unit, v), inverse, estimate);
}

// The codes of four values, the first in the lowest byte.  |v / unit| <= 127, so that adding
// 3 * 2^22 leaves the rounded quotient in the low byte.
__device__ __forceinline__ uint32_t query_codes(float v0, float v1, float v2, float v3, float unit,
                                                float inverse) {
  const auto code = [&](float v) {
    return __float_as_uint(query_quotient(v, unit, inverse) + 12582912.f);
  };
  return ptx::prmt(ptx::prmt(code(v0), code(v1), 0x0040), ptx::prmt(code(v2), code(v3), 0x0040),
                   0x5410);
}

}  // namespace tq4
