// First kernel of decode: rotated and quantised queries in the workspace.
//
//   q_rot = q R^T                     TF32 tensor cores, R as a sum of two TF32 values: fp32-accurate
//   INT8   q_rot / s = q8 + r8 / 256  s = max|q_rot| / 127 of the row
//   fp16   q_rot / s = q16 + r16      s = the power of two that brings the row into fp16's range
//   scale = s * sm_scale * log2 e * k_code_scale, or / softcap instead of * log2 e
//
// A CTA takes 16 rows (token, head); warp w computes dims 16 w .. 16 w + 15, and the warps meet once
// for the rows' maxima.  The k index of the product is permuted so that both operands are read four
// neighbours at a time: within 16 dims, lane t has 4 t .. 4 t + 3, two for each k8 step.
#pragma once
#include <cstdint>

#include "../params.h"
#include "../ptx/arith.cuh"
#include "../ptx/grid_dependency.cuh"
#include "../ptx/mma_tf32.cuh"
#include "common.cuh"
#include "decode_plan.h"
#include "rotate.cuh"

namespace tq4 {

constexpr int kPrepareRows = 16;

template <int D>
constexpr int prepare_threads() {
  return D / 16 * kWarpSize;
}

// Four neighbouring values of a row of q.
__device__ __forceinline__ void load_query4(const uint16_t* p, DType dtype, bool aligned8,
                                            float (&x)[4]) {
  uint2 raw;
  if (aligned8) {
    raw = *reinterpret_cast<const uint2*>(p);
  } else {
    raw.x = p[0] | static_cast<uint32_t>(p[1]) << 16;
    raw.y = p[2] | static_cast<uint32_t>(p[3]) << 16;
  }
  const float2 a = unpack_pair(raw.x, dtype), b = unpack_pair(raw.y, dtype);
  x[0] = a.x, x[1] = a.y, x[2] = b.x, x[3] = b.y;
}

template <int D>
__global__ void __launch_bounds__(prepare_threads<D>())
    decode_prepare_kernel(const __grid_constant__ AttentionParams p,
                          const __grid_constant__ DecodePlan plan) {
  constexpr int kWarps = D / 16;
  __shared__ float warp_max[kPrepareRows][kWarps];
  ptx::allow_dependent_launch();

  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const int64_t num_rows = static_cast<int64_t>(p.num_tokens) * p.num_q_heads;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kPrepareRows;
  const bool aligned8 = (reinterpret_cast<uintptr_t>(p.q) | static_cast<uint64_t>(p.q_token_stride * 2) |
                         static_cast<uint64_t>(p.q_head_stride * 2)) % 8 == 0;
  const uint16_t* row[2];  // rows g and g + 8; null past the end
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t index = first_row + 8 * i + g;
    const int64_t token = index / p.num_q_heads;
    row[i] = index < num_rows ? static_cast<const uint16_t*>(p.q) + token * p.q_token_stride +
                                    (index - token * p.num_q_heads) * p.q_head_stride
                              : nullptr;
  }
  const auto load = [&](int i, int dim, float(&x)[4]) {
    x[0] = x[1] = x[2] = x[3] = 0.f;
    if (row[i] != nullptr) load_query4(row[i] + dim, p.dtype, aligned8, x);
  };

  // v[i][e]: row 8 i + g, dim 16 warp + 4 t + e.
  float v[2][4];
  if (p.q_rotation != nullptr) {
    // Column g of n-tile j is dim 16 warp + 2 g + j: a lane's results are four neighbours.
    float c[2][4] = {};
    const float* rotation = p.q_rotation + (16 * warp + 2 * g) * D + 4 * t;
#pragma unroll 4
    for (int k = 0; k < D; k += 16) {
      float x[2][4];
      load(0, k + 4 * t, x[0]);
      load(1, k + 4 * t, x[1]);
      const uint32_t a0[4] = {__float_as_uint(x[0][0]), __float_as_uint(x[1][0]),
                              __float_as_uint(x[0][1]), __float_as_uint(x[1][1])};
      const uint32_t a1[4] = {__float_as_uint(x[0][2]), __float_as_uint(x[1][2]),
                              __float_as_uint(x[0][3]), __float_as_uint(x[1][3])};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float4 r = *reinterpret_cast<const float4*>(rotation + j * D + k);
        ptx::mma_m16n8k8_tf32(c[j], a0, ptx::tf32_low(r.x), ptx::tf32_low(r.y));
        ptx::mma_m16n8k8_tf32(c[j], a1, ptx::tf32_low(r.z), ptx::tf32_low(r.w));
        ptx::mma_m16n8k8_tf32(c[j], a0, ptx::tf32_high(r.x), ptx::tf32_high(r.y));
        ptx::mma_m16n8k8_tf32(c[j], a1, ptx::tf32_high(r.z), ptx::tf32_high(r.w));
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      v[i][0] = c[0][2 * i], v[i][1] = c[1][2 * i];
      v[i][2] = c[0][2 * i + 1], v[i][3] = c[1][2 * i + 1];
    }
  } else {
    load(0, 16 * warp + 4 * t, v[0]);
    load(1, 16 * warp + 4 * t, v[1]);
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float largest = 0.f;
#pragma unroll
    for (int e = 0; e < 4; ++e) largest = ptx::max_nan(largest, fabsf(v[i][e]));
    largest = quad_max_nan(largest);
    if (t == 0) warp_max[8 * i + g][warp] = largest;
  }
  __syncthreads();  // every warp's maxima are there

  auto* workspace = static_cast<uint8_t*>(p.workspace);
  const float unit_scale = p.sm_scale * (p.softcap != 0.f ? 1.f / p.softcap : 1.4426950408889634f) *
                           (p.int8 ? p.k_code_scale : 1.f);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float largest = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) largest = ptx::max_nan(largest, warp_max[8 * i + g][w]);
    const int64_t index = first_row + 8 * i + g;
    if (index >= num_rows) continue;
    const int64_t at = index * D + 16 * warp + 4 * t;
    // Rows of zeros (or of nothing representable) get codes 0 and any unit; a NaN goes into the unit,
    // and so into every score of the row.
    float unit, inverse;
    if (p.int8) {
      unit = largest < 1e-30f ? 1.f : __fdiv_rn(largest, 127.f);
      inverse = largest < 1e-30f ? 0.f : __fdiv_rn(127.f, largest);
      uint32_t codes = 0, residuals = 0;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float x = v[i][e] * inverse;
        const int code = max(-127, min(127, __float2int_rn(x)));
        const int rest = max(-127, min(127, __float2int_rn((x - code) * 256.f)));
        const int shift = 8 * swapped_dim(e);
        codes |= static_cast<uint32_t>(code & 0xff) << shift;
        residuals |= static_cast<uint32_t>(rest & 0xff) << shift;
      }
      *reinterpret_cast<uint32_t*>(workspace + plan.query_codes + at) = codes;
      if (plan.mode == DecodeMode::kInt8Rows8) {
        *reinterpret_cast<uint32_t*>(workspace + plan.query_residual + at) = residuals;
      }
    } else {
      inverse = fp16_row_scale(largest);
      unit = largest != largest ? largest : __fdiv_rn(1.f, inverse);
      uint32_t high[2], low[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float x = v[i][2 * e] * inverse, y = v[i][2 * e + 1] * inverse;
        high[e] = ptx::pack_f16x2(x, y);
        const float2 rounded = unpack_pair(high[e], DType::kFloat16);
        low[e] = ptx::pack_f16x2(x - rounded.x, y - rounded.y);
      }
      *reinterpret_cast<uint2*>(workspace + plan.query_codes + 2 * at) = make_uint2(high[0], high[1]);
      *reinterpret_cast<uint2*>(workspace + plan.query_residual + 2 * at) = make_uint2(low[0], low[1]);
    }
    if (warp == 0 && t == 0) {
      reinterpret_cast<float*>(workspace + plan.query_scale)[index] = unit * unit_scale;
    }
  }
}

}  // namespace tq4
