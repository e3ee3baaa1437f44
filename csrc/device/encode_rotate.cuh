// The rotation step of encode_kernel: a tile of x times R^T in the accumulators, one of three ways.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../ptx/arith.cuh"
#include "../ptx/mma.cuh"
#include "../ptx/mma_bf16.cuh"
#include "encode_input.cuh"
#include "rotation_fragments.cuh"

namespace tq4 {

// ---- None and Hadamard: groups of 32 dims.

// acc[tile] += x B for the four column tiles of a group.  x is exact: 16-bit elements as they are,
// fp32 as the sum of three bf16, each the truncation of what is left.
template <class C>
__device__ __forceinline__ void multiply_group(float (&acc)[4][4], uint32_t s_tile, int step,
                                               const uint32_t (&signs)[2],
                                               const uint32_t (&b)[4][2]) {
  uint32_t a[4];
  if constexpr (C::kElementBytes == 2) {
    load_fragment<C>(a, s_tile, step);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] ^= signs[i / 2];
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
      if constexpr (std::is_same_v<typename C::Element, __half>) {
        ptx::mma_m16n8k16_f16f16f32(acc[tile], a, b[tile][0], b[tile][1]);
      } else {
        ptx::mma_m16n8k16_bf16bf16f32(acc[tile], a, b[tile][0], b[tile][1]);
      }
    }
  } else {
    PairFragment<C> rest;
    load_fragment<C>(rest, s_tile, step);
#pragma unroll
    for (int part = 0; part < 3; ++part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t x = __float_as_uint(rest.v[i].x), y = __float_as_uint(rest.v[i].y);
        a[i] = ptx::prmt(x, y, 0x7632) ^ signs[i / 2];
        rest.v[i].x -= __uint_as_float(x & 0xffff0000u);
        rest.v[i].y -= __uint_as_float(y & 0xffff0000u);
      }
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) {
        ptx::mma_m16n8k16_bf16bf16f32(acc[tile], a, b[tile][0], b[tile][1]);
      }
    }
  }
}

// The square of this is a power of two too, and small enough that sums of squares of rotated rows
// overflow no earlier than those of x.
inline constexpr float kGroupUnit = 0.125f;

// Tables of the none and Hadamard ways.
struct GroupTables {
  uint4 fragments[2][2][kWarpSize];  // B of step s, tiles 2 pair, 2 pair + 1: [s][pair][lane]
  uint2 signs[32][4];                // flips of x: [step][t] for high = 0, 1
};

// B is the identity, or H_32 times kGroupUnit.
template <class C>
__device__ __forceinline__ void fill_fragments(GroupTables& tables, bool hadamard) {
  using Map = typename C::Map;
  constexpr bool kHalf = std::is_same_v<typename C::Element, __half>;
  constexpr uint32_t kOne = kHalf ? 0x3c00u : 0x3f80u;
  constexpr uint32_t kUnit = kHalf ? 0x3000u : 0x3e00u;
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < 2 * 2 * kWarpSize * 4; i += blockDim.x) {
    const int s = i / (kWarpSize * 8), tile = i / (kWarpSize * 4) % 2 * 2 + i / 2 % 2;
    const int lane = i / 4 % kWarpSize, high = i % 2;
    const int n = Map::code_dim(tile, lane / 8, lane / 4 % 2);
    const int k = Map::input_dim(s, high, lane % 4, 0);
    uint32_t bits;
    if (!hadamard) {
      bits = (n == k ? kOne : 0u) | (n == k + 1 ? kOne << 16 : 0u);
    } else {
      bits = (kUnit | static_cast<uint32_t>(__popc(n & k) % 2) << 15) |
             (kUnit | static_cast<uint32_t>(__popc(n & (k + 1)) % 2) << 15) << 16;
    }
    reinterpret_cast<uint32_t*>(tables.fragments)[i] = bits;
  }
}

// Word i of the flips of x, from the signs of the matrix' columns: those of row 0 or, where the
// rotation is given by its signs, themselves.
template <class C>
inline constexpr uint32_t kFlipWords = C::Map::kSteps * 4 * 2;

template <class C>
__device__ __forceinline__ uint2 load_signs(const float* rotation, uint32_t i) {
  return __ldg(
      reinterpret_cast<const uint2*>(rotation + C::Map::input_dim(i / 8, i % 2, i / 2 % 4, 0)));
}

__device__ __forceinline__ uint32_t flips_of(const uint2& signs) {
  return (signs.x >> 16 & 0x8000u) | (signs.y & 0x80000000u);
}

// One pass of the none and Hadamard ways, before the butterflies.
template <class C>
__device__ __forceinline__ void multiply_groups(Accumulators<C>& acc, uint32_t s_tile,
                                                const GroupTables& tables, bool hadamard,
                                                int pass) {
  using Map = typename C::Map;
  const int lane = threadIdx.x % kWarpSize, t = lane % 4;
#pragma unroll
  for (int i = 0; i < 16 * Map::kPassGroups; ++i) acc[i / 16][i / 4 % 4][i % 4] = 0.f;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const uint4 b01 = tables.fragments[s][0][lane], b23 = tables.fragments[s][1][lane];
    const uint32_t b[4][2] = {{b01.x, b01.y}, {b01.z, b01.w}, {b23.x, b23.y}, {b23.z, b23.w}};
#pragma unroll
    for (int half = 0; half < Map::kPasses; ++half) {
      // With two passes the butterfly between groups 4 apart, (u, v) -> (u + v, u - v), is done by
      // the accumulation: the first pass is the sum, the second the difference.
      if (Map::kPasses == 2 && !hadamard && half != pass) continue;
      const uint32_t flip = half == 1 && pass == 1 && hadamard ? 0x80008000u : 0u;
#pragma unroll
      for (int j = 0; j < Map::kPassGroups; ++j) {
        const int step = 2 * (half * Map::kPassGroups + j) + s;
        const uint2 table_signs = tables.signs[step][t];
        const uint32_t signs[2] = {table_signs.x ^ flip, table_signs.y ^ flip};
        multiply_group<C>(acc[j], s_tile, step, signs, b);
      }
    }
  }
}

template <class C>
__device__ __forceinline__ void butterflies(Accumulators<C>& acc) {
#pragma unroll
  for (int stage = 1; stage < C::Map::kPassGroups; stage *= 2) {
#pragma unroll
    for (int j = 0; j < C::Map::kPassGroups; ++j) {
      if ((j & stage) || j + stage >= C::Map::kPassGroups) continue;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        float& u = acc[j][i / 4][i % 4];
        float& v = acc[j + stage][i / 4][i % 4];
        const float sum = u + v, difference = u - v;
        u = sum;
        v = difference;
      }
    }
  }
}

// ---- General: all k16 steps against R's fragments.

// Power of two that brings a row of norm n to about 2^14, so that its fp16 parts keep their
// precision. fp16 rows need none.
template <class C>
__device__ __forceinline__ float general_row_scale(float norm) {
  if constexpr (std::is_same_v<typename C::Element, __half>) return 1.f;
  const int exponent = static_cast<int>(__float_as_uint(norm) >> 23);  // norm >= 0
  return __uint_as_float(static_cast<uint32_t>(min(max(2 * 127 + 14 - exponent, 1), 254)) << 23);
}

// x of one k16 step as the sum of kSplits fp16 fragments, rows g and g + 8 scaled.
template <class C>
__device__ __forceinline__ void load_fp16_fragments(uint32_t (&a)[C::kSplits][4], uint32_t s_tile,
                                                    int step, const float (&row_scale)[2]) {
  if constexpr (std::is_same_v<typename C::Element, __half>) {
    load_fragment<C>(a[0], s_tile, step);
  } else {
    PairFragment<C> x;
    load_fragment<C>(x, s_tile, step);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float u = x.v[i].x * row_scale[i % 2], v = x.v[i].y * row_scale[i % 2];
      a[0][i] = ptx::pack_f16x2(u, v);
      if constexpr (C::kSplits == 2) {
        const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&a[0][i]));
        a[1][i] = ptx::pack_f16x2(u - high.x, v - high.y);
      }
    }
  }
}

// acc = x R^T for the columns of one pass.  s_rotation holds R's fragments already unless they come
// in several slices; those are filled here, and all warps of the CTA must take part.
template <class C>
__device__ __forceinline__ void multiply_general(Accumulators<C>& acc, uint32_t s_tile,
                                                 typename C::Rotation& s_rotation,
                                                 const float* rotation, float rotation_scale,
                                                 const float (&row_scale)[2], int pass) {
  using Map = typename C::Map;
  constexpr int kPassSlices = C::kSlices == 1 ? 1 : C::kSlices / Map::kPasses;
  constexpr int kSliceGroups = Map::kPassGroups / kPassSlices;
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < 16 * Map::kPassGroups; ++i) acc[i / 16][i / 4 % 4][i % 4] = 0.f;
#pragma unroll
  for (int slice = 0; slice < kPassSlices; ++slice) {
    if constexpr (C::kSlices > 1) {
      __syncthreads();  // every warp has read the previous slice
      fill_rotation_fragments<C::kHeadDim, C::kSliceTiles, true>(
          s_rotation, rotation, rotation_scale, (pass * kPassSlices + slice) * C::kSliceTiles);
      __syncthreads();  // the slice is complete before any warp reads it
    }
    // Group by group: with all columns at once the compiler fetches more fragments than fit in
    // registers.
#pragma unroll
    for (int group = 0; group < kSliceGroups; ++group) {
#pragma unroll 2
      for (int step = 0; step < Map::kSteps; ++step) {
        uint32_t a[C::kSplits][4];
        load_fp16_fragments<C>(a, s_tile, step, row_scale);
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const uint4 high = s_rotation.high[group * 2 + pair][step][lane];
          const uint4 low = s_rotation.low[group * 2 + pair][step][lane];
          float (&even)[4] = acc[slice * kSliceGroups + group][2 * pair];
          float (&odd)[4] = acc[slice * kSliceGroups + group][2 * pair + 1];
          ptx::mma_m16n8k16_f16f16f32(even, a[0], high.x, high.y);
          ptx::mma_m16n8k16_f16f16f32(odd, a[0], high.z, high.w);
          ptx::mma_m16n8k16_f16f16f32(even, a[0], low.x, low.y);
          ptx::mma_m16n8k16_f16f16f32(odd, a[0], low.z, low.w);
          if constexpr (C::kSplits == 2) {
            ptx::mma_m16n8k16_f16f16f32(even, a[1], high.x, high.y);
            ptx::mma_m16n8k16_f16f16f32(odd, a[1], high.z, high.w);
          }
        }
      }
    }
  }
}

}  // namespace tq4
