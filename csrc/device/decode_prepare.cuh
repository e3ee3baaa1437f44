// First kernel of decode: rotated and quantised queries in the workspace.
//
//   q_rot = q R^T                     TF32 tensor cores, R as a sum of two TF32 values:
//   fp32-accurate INT8   q_rot / s = q8 + r8 / 256  s = max|q_rot| / 127 of the row fp16   q_rot /
//   s = q16 + r16      s = the power of two that brings the row into fp16's range scale = s *
//   sm_scale * log2 e * k_code_scale, or / softcap instead of * log2 e
//
// A CTA takes blocks of 16 rows (token, head), one MMA tile high.  Warp w computes dims 8 w .. 8 w
// + 7 of the product (D = 256: and 128 more), for which it keeps its part of R in registers; the
// warps meet once a block for the rows' maxima.  The k index of the product is permuted so that
// both operands are read four neighbours at a time: within 16 dims, lane t has 4 t .. 4 t + 3, two
// for each k8 step.
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
struct PrepareConfig {
  static constexpr int kWarps = D <= 128 ? D / 8 : 16;
  static constexpr int kTiles = D / 8 / kWarps;  // n8 tiles of a warp
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr bool kHoldsRotation = D <= 128;
};

// Four neighbouring values of a row of q; zeros without a row.
__device__ __forceinline__ void load_query4(const uint16_t* p, DType dtype, bool aligned8,
                                            float (&x)[4]) {
  uint2 raw = make_uint2(0, 0);
  if (p != nullptr) {
    if (aligned8) {
      raw = *reinterpret_cast<const uint2*>(p);
    } else {
      raw.x = p[0] | static_cast<uint32_t>(p[1]) << 16;
      raw.y = p[2] | static_cast<uint32_t>(p[3]) << 16;
    }
  }
  const float2 a = unpack_pair(raw.x, dtype), b = unpack_pair(raw.y, dtype);
  x[0] = a.x, x[1] = a.y, x[2] = b.x, x[3] = b.y;
}

// Rows dims `at`, `at` + 1 of one row: codes, residuals.
template <int D>
__device__ __forceinline__ void write_query(const AttentionParams& p, const DecodePlan& plan,
                                            int64_t at, float largest, float x, float y) {
  auto* codes = static_cast<uint8_t*>(p.workspace) + plan.query_codes;
  auto* residuals = static_cast<uint8_t*>(p.workspace) + plan.query_residual;
  if (p.int8) {
    // Rows of zeros (or of nothing representable) get codes 0 and any unit.
    const float inverse = largest < 1e-30f ? 0.f : __fdiv_rn(127.f, largest);
    const float v[2] = {x * inverse, y * inverse};
    uint32_t code = 0, rest = 0;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int rounded = max(-127, min(127, __float2int_rn(v[e])));
      const int left = max(-127, min(127, __float2int_rn((v[e] - rounded) * 256.f)));
      const int shift = 8 * swapped_dim(e);
      code |= static_cast<uint32_t>(rounded & 0xff) << shift;
      rest |= static_cast<uint32_t>(left & 0xff) << shift;
    }
    *reinterpret_cast<uint16_t*>(codes + at) = static_cast<uint16_t>(code);
    if (plan.mode == DecodeMode::kInt8Rows8) {
      *reinterpret_cast<uint16_t*>(residuals + at) = static_cast<uint16_t>(rest);
    }
  } else {
    const float inverse = fp16_row_scale(largest);
    const uint32_t high = ptx::pack_f16x2(x * inverse, y * inverse);
    const float2 rounded = unpack_pair(high, DType::kFloat16);
    *reinterpret_cast<uint32_t*>(codes + 2 * at) = high;
    *reinterpret_cast<uint32_t*>(residuals + 2 * at) =
        ptx::pack_f16x2(x * inverse - rounded.x, y * inverse - rounded.y);
  }
}

template <int D>
__global__ void __launch_bounds__(PrepareConfig<D>::kThreads, 1)
    decode_prepare_kernel(const __grid_constant__ AttentionParams p,
                          const __grid_constant__ DecodePlan plan) {
  using Config = PrepareConfig<D>;
  __shared__ float maxima[2][kPrepareRows][Config::kWarps];
  ptx::allow_dependent_launch();

  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const int64_t num_rows = static_cast<int64_t>(p.num_tokens) * p.num_q_heads;
  const bool aligned8 =
      (reinterpret_cast<uintptr_t>(p.q) | static_cast<uint64_t>(p.q_token_stride * 2) |
       static_cast<uint64_t>(p.q_head_stride * 2)) %
          8 ==
      0;
  const bool rotates = p.q_rotation != nullptr;
  // B[k][n] = R[n][k]: lane g's row of R, dims 16 k + 4 t ..
  const auto rotation = [&](int tile, int k) {
    const int n = 8 * (warp + tile * Config::kWarps) + g;
    return *reinterpret_cast<const float4*>(p.q_rotation + n * D + 16 * k + 4 * t);
  };
  float4 held[Config::kHoldsRotation ? D / 16 : 1];
  if constexpr (Config::kHoldsRotation) {
    if (rotates) {
#pragma unroll
      for (int k = 0; k < D / 16; ++k) held[k] = rotation(0, k);
    }
  }
  const float unit_scale = p.sm_scale * (p.softcap != 0.f ? 1.f / p.softcap : 1.4426950408889634f) *
                           (p.int8 ? p.k_code_scale : 1.f);

  int parity = 0;
#pragma unroll 1
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kPrepareRows; first < num_rows;
       first += static_cast<int64_t>(gridDim.x) * kPrepareRows, parity ^= 1) {
    const uint16_t* row[2];  // rows g and g + 8; null past the end
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t index = first + 8 * i + g;
      const int64_t token = index / p.num_q_heads;
      row[i] = index < num_rows ? static_cast<const uint16_t*>(p.q) + token * p.q_token_stride +
                                      (index - token * p.num_q_heads) * p.q_head_stride
                                : nullptr;
    }

    // c[tile][2 i + e]: row 8 i + g, dim 8 (warp + tile * kWarps) + 2 t + e.
    float c[Config::kTiles][4] = {};
    if (rotates) {
#pragma unroll(Config::kHoldsRotation ? D / 16 : 2)
      for (int k = 0; k < D / 16; ++k) {
        float x[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          load_query4(row[i] == nullptr ? nullptr : row[i] + 16 * k + 4 * t, p.dtype, aligned8,
                      x[i]);
        }
        const uint32_t a0[4] = {__float_as_uint(x[0][0]), __float_as_uint(x[1][0]),
                                __float_as_uint(x[0][1]), __float_as_uint(x[1][1])};
        const uint32_t a1[4] = {__float_as_uint(x[0][2]), __float_as_uint(x[1][2]),
                                __float_as_uint(x[0][3]), __float_as_uint(x[1][3])};
#pragma unroll
        for (int tile = 0; tile < Config::kTiles; ++tile) {
          float4 r;
          if constexpr (Config::kHoldsRotation) {
            r = held[k];
          } else {
            r = rotation(tile, k);
          }
          ptx::mma_m16n8k8_tf32(c[tile], a0, ptx::tf32_low(r.x), ptx::tf32_low(r.y));
          ptx::mma_m16n8k8_tf32(c[tile], a1, ptx::tf32_low(r.z), ptx::tf32_low(r.w));
          ptx::mma_m16n8k8_tf32(c[tile], a0, ptx::tf32_high(r.x), ptx::tf32_high(r.y));
          ptx::mma_m16n8k8_tf32(c[tile], a1, ptx::tf32_high(r.z), ptx::tf32_high(r.w));
        }
      }
    } else {
#pragma unroll
      for (int tile = 0; tile < Config::kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (row[i] == nullptr) continue;
          const uint16_t* pair = row[i] + 8 * (warp + tile * Config::kWarps) + 2 * t;
          const float2 v = unpack_pair(pair[0] | static_cast<uint32_t>(pair[1]) << 16, p.dtype);
          c[tile][2 * i] = v.x;
          c[tile][2 * i + 1] = v.y;
        }
      }
    }

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float largest = 0.f;
#pragma unroll
      for (int tile = 0; tile < Config::kTiles; ++tile) {
        largest =
            ptx::max_nan(largest, ptx::max_nan(fabsf(c[tile][2 * i]), fabsf(c[tile][2 * i + 1])));
      }
      largest = quad_max_nan(largest);
      if (t == 0) maxima[parity][8 * i + g][warp] = largest;
    }
    // Every warp's maxima are there.  The other half is free for the next block: its last readers
    // came before this barrier.
    __syncthreads();

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float largest = 0.f;
#pragma unroll
      for (int w = 0; w < Config::kWarps; ++w) {
        largest = ptx::max_nan(largest, maxima[parity][8 * i + g][w]);
      }
      const int64_t index = first + 8 * i + g;
      if (index >= num_rows) continue;
#pragma unroll
      for (int tile = 0; tile < Config::kTiles; ++tile) {
        write_query<D>(p, plan, index * D + 8 * (warp + tile * Config::kWarps) + 2 * t, largest,
                       c[tile][2 * i], c[tile][2 * i + 1]);
      }
      if (warp == 0 && t == 0) {
        // A NaN in the row goes into its scale, and so into every score.
        float unit = largest;
        if (largest == largest) {
          unit = !p.int8            ? __fdiv_rn(1.f, fp16_row_scale(largest))
                 : largest < 1e-30f ? 1.f
                                    : __fdiv_rn(largest, 127.f);
        }
        reinterpret_cast<float*>(static_cast<uint8_t*>(p.workspace) + plan.query_scale)[index] =
            unit * unit_scale;
      }
    }
  }
}

}  // namespace tq4
