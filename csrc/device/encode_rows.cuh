// The kernel of store and compress for few rows, whose rotation is none or given by its signs: x
// [rows, D] -> codes and norms as in encode_kernel.cuh.  sm_80 and up.
//
// With few rows a store is latency: the launch, the first touch of the parameters, one trip to
// memory, and fetching the code, 3 ns an instruction the first time (H200, docs/tuning.md).  So
// there is no shared memory and no barrier, all loads start at once, and the code is short and goes
// over the rows twice: first over nothing, while the loads fly, only to be fetched.
//
// A lane has 8 dims, that is 16 bytes of 16-bit elements and one 32-bit word of codes; D / 8 lanes
// have a row, a warp 256 / D rows:
//
//   dim = 8 chunk + e        chunk = lane % (D / 8), e = register
//   y = H diag(signs) x      bits of e: butterflies in registers; bits of the chunk: shuffles
//
// The index of y is found by bisection.  Lane n holds boundary n of the search tree, numbered like
// a heap: the children of n are 2 n and 2 n + 1, the root is 1.
//
//                    1: b7                    so, beginning with n = 1, four times
//             2: b3         3: b11               n = 2 n + (y > boundary n)
//           4: b1 5: b5   6: b9 7: b13        and n = 16 + index.  The comparison is the sign of
//           8: b0 ...         15: b14         boundary - y, one FFMA, which one SHF appends to n.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../layout.h"
#include "../ptx/arith.cuh"
#include "../ptx/opaque.cuh"
#include "../ptx/quantise.cuh"
#include "common.cuh"
#include "encode_rows_params.h"

namespace tq4 {

// Pairs of elements as floats.
template <typename T>
__device__ __forceinline__ float2 unpack_pair(uint32_t word) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  } else {
    return __half22float2(*reinterpret_cast<const __half2*>(&word));
  }
}

// What a lane reads.
template <typename T>
struct RowInput {
  static constexpr int kWords = 2 * sizeof(T);
  uint32_t x[kWords];  // 8 elements
  uint32_t signs[8];   // only the upper bits count
  float boundary;      // node `lane` of the search tree
  float centroid;      // lane % 16
  int64_t slot;        // negative: not stored
};

template <typename T>
__device__ __forceinline__ RowInput<T> load_row(const EncodeRowsParams& p,
                                                const EncodeRowsSide& side, uint32_t token,
                                                uint32_t head, uint32_t chunk) {
  constexpr int kWords = RowInput<T>::kWords;
  const int lane = threadIdx.x % kWarpSize;
  RowInput<T> in;
  const uint4* x = reinterpret_cast<const uint4*>(
      side.x + (token * side.token_stride + head * side.head_stride + chunk * 4 * kWords));
#pragma unroll
  for (int i = 0; i < kWords; i += 4) {
    const uint4 v = __ldg(x + i / 4);
    in.x[i] = v.x, in.x[i + 1] = v.y, in.x[i + 2] = v.z, in.x[i + 3] = v.w;
  }
  in.slot = token;
  if (p.slot_mapping != nullptr) in.slot = __ldg(p.slot_mapping + token);
#pragma unroll
  for (int i = 0; i < 8; ++i) in.signs[i] = 0;
  if (side.signs != nullptr) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(side.signs) + 2 * chunk + i / 4);
      in.signs[i] = v.x, in.signs[i + 1] = v.y, in.signs[i + 2] = v.z, in.signs[i + 3] = v.w;
    }
  }
  // Nibble n: the number of the boundary at node n.
  constexpr uint64_t kHeap = 0xeca86420d951b370u;
  in.boundary = __ldg(side.boundaries + (kHeap >> (4 * (lane % 16)) & 15));
  in.centroid = 0.f;
  if (p.norm_correction) in.centroid = __ldg(side.centroids + lane % kNumCentroids);
  return in;
}

// Sum over the lanes of a row.
__device__ __forceinline__ float row_sum(float x, int row_lanes) {
#pragma unroll 1
  for (int mask = 1; mask < row_lanes; mask *= 2) x += __shfl_xor_sync(kFullWarp, x, mask);
  return x;
}

template <typename T>
__global__ void __launch_bounds__(kEncodeRowsThreads, kEncodeRowsCtas)
    encode_rows_kernel(const __grid_constant__ EncodeRowsParams p) {
  static_assert(sizeof(p) <= kEncodeRowsThreads / kWarpSize * 64, "a line for each warp");
  // [1/5] Start all loads.  Each warp touches another line of the parameters first: see
  // parameter_lines.cuh.
  const uint32_t lane = threadIdx.x % kWarpSize;
  const uint32_t touched =
      reinterpret_cast<const uint32_t*>(&p)[threadIdx.x / kWarpSize * 16 + kNeverAllOnes];
  const EncodeRowsSide& side = p.sides[blockIdx.y];
  const uint32_t thread = blockIdx.x * kEncodeRowsThreads + threadIdx.x;
  const uint32_t row = thread >> p.log_row_lanes, row_lanes = 1u << p.log_row_lanes;
  const uint32_t chunk = lane & (row_lanes - 1);
  if (thread - lane >= p.num_rows << p.log_row_lanes || touched == ~0u) return;  // whole warps
  const bool exists = row < p.num_rows;
  const uint32_t clamped = exists ? row : p.num_rows - 1;
  const uint32_t token = p.heads.quotient(clamped), head = clamped - token * p.heads.divisor;
  const RowInput<T> loaded = load_row<T>(p, side, token, head, chunk);

  RowInput<T> in;
#pragma unroll
  for (int i = 0; i < RowInput<T>::kWords; ++i) in.x[i] = touched;
#pragma unroll
  for (int i = 0; i < 8; ++i) in.signs[i] = 0;
  in.boundary = in.centroid = 0.f;
  in.slot = -1;
#pragma unroll 1
  for (bool rehearsal = true;; rehearsal = false) {
    // [2/5] Norm and rotation.
    float v[8], square = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      float2 pair;
      if constexpr (sizeof(T) == 4) {
        pair = {__uint_as_float(in.x[i]), __uint_as_float(in.x[i + 1])};
      } else {
        pair = unpack_pair<T>(in.x[i / 2]);
      }
      square = fmaf(pair.x, pair.x, square);
      square = fmaf(pair.y, pair.y, square);
      v[i] = __uint_as_float(__float_as_uint(pair.x) ^ (in.signs[i] & 0x80000000u));
      v[i + 1] = __uint_as_float(__float_as_uint(pair.y) ^ (in.signs[i + 1] & 0x80000000u));
    }
    const bool rotated = side.signs != nullptr;
    if (rotated) {
#pragma unroll
      for (int stage = 1; stage < 8; stage *= 2) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          if (e & stage) continue;
          const float sum = v[e] + v[e + stage], difference = v[e] - v[e + stage];
          v[e] = sum;
          v[e + stage] = difference;
        }
      }
    }
#pragma unroll 1
    for (uint32_t mask = 1; mask < row_lanes; mask *= 2) {
      square += __shfl_xor_sync(kFullWarp, square, mask);
      if (rotated) {
        const float own = lane & mask ? -1.f : 1.f;
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] = fmaf(own, v[e], __shfl_xor_sync(kFullWarp, v[e], mask));
      }
    }
    float norm = ptx::sqrt_approx(square);

    // [3/5] Quantise.
    const float scale = side.negative_gain * ptx::rcp_approx(norm + kNormEpsilon);
    const float boundary = in.boundary + 0.f;  // a boundary of -0 would lie below a y of 0
    uint32_t node[8];
    const float root = __shfl_sync(kFullWarp, boundary, 1);
#pragma unroll
    for (int e = 0; e < 8; ++e) node[e] = 2 | __float_as_uint(fmaf(v[e], scale, root)) >> 31;
#pragma unroll 1
    for (int level = 1; level < 4; ++level) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float at_node = __shfl_sync(kFullWarp, boundary, static_cast<int>(node[e]));
        node[e] = node[e] << 1 | __float_as_uint(fmaf(v[e], scale, at_node)) >> 31;
      }
    }

    // [4/5] Pack, and correct the norm.
    uint32_t word = 0u - 16u * 0x11111111u;  // takes the 16 of each node away
#pragma unroll
    for (int e = 0; e < 8; ++e) word += node[e] << nibble_shift(e);
    if (p.norm_correction) {
      float decoded = 0.f;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float c = __shfl_sync(kFullWarp, in.centroid, static_cast<int>(node[e]));
        decoded = fmaf(c, c, decoded);
      }
      decoded = row_sum(decoded, row_lanes);
      // A row of zero centroids decodes to zero whatever its norm.
      norm = decoded > 0.f ? norm * ptx::rsqrt_approx(decoded) : 0.f;
    }

    // [5/5] Write.  The addresses are rehearsed too.
    const uint32_t slot = static_cast<uint32_t>(in.slot);
    const uint32_t block = p.block.quotient(slot), offset = slot - block * p.block.divisor;
    const int64_t codes =
        ptx::opaque_offset(static_cast<uint64_t>(block) * p.code_block_stride +
                           (offset * p.code_token_stride + head * p.code_head_stride + chunk * 4));
    const int64_t norms =
        ptx::opaque_offset(static_cast<uint64_t>(block) * p.norm_block_stride +
                           (offset * p.norm_token_stride + head * p.norm_head_stride));
    const bool stored = in.slot >= 0 && exists;
    if (stored) *reinterpret_cast<uint32_t*>(side.codes + codes) = word;
    if (stored && chunk == 0) *reinterpret_cast<float*>(side.norms + norms) = norm;
    if (!rehearsal) return;
    in = loaded;
  }
}

}  // namespace tq4
