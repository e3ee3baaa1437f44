// Last kernel of decode: partial results -> out and LSE.
//
//   m* = max of the partials' m and of the sink      (log2 units)
//   l* = sum l 2^(m - m*) + 2^(sink - m*)
//   out = (sum O 2^(m - m*) / l*) R                  l* = 0: no visible key, out = 0
//   lse = (m* + log2 l*) ln 2
//
// A CTA takes `rows_per_cta` (1, 2, 4, 8 or 16) rows (sequence, query token, head): few when rows are
// few, so that all SMs share in reading the partials; 16, one MMA tile, when they are many, so that
// R is read seldom.  8 warps: 8 / rows_per_cta of them split the partials of a row, in a fixed order.
// The product with R is the one of decode_prepare with O split into two TF32 values as well.
#pragma once
#include <cstdint>

#include "../params.h"
#include "../ptx/arith.cuh"
#include "../ptx/grid_dependency.cuh"
#include "../ptx/mma_tf32.cuh"
#include "common.cuh"
#include "decode_kernel.cuh"
#include "decode_plan.h"

namespace tq4 {

constexpr int kCombineWarps = 8;
constexpr int kCombineThreads = kCombineWarps * kWarpSize;
constexpr int kCombineMaxRows = 16;
constexpr float kLog2eCombine = 1.4426950408889634f;
constexpr float kLn2Combine = 0.6931471805599453f;

// A row of the output and where its partial results are.
struct CombineRow {
  bool exists;
  int64_t token;
  int head;
  int begin, end;       // CTAs that have a partial result
  int64_t first_index;  // of CTA `begin`, in rows of the partial arrays
  int64_t stride;       // to the next CTA's
};

__device__ __forceinline__ CombineRow find_row(const AttentionParams& p, const DecodePlan& plan,
                                               int64_t row, const int32_t* prefix) {
  const DecodeBatch batch = decode_batch(p, plan);
  CombineRow r{};
  const int64_t rows_per_seq = static_cast<int64_t>(p.max_query_len) * p.num_q_heads;
  const int seq = static_cast<int>(row / rows_per_seq);
  if (seq >= p.num_seqs) return r;
  const int in_seq = static_cast<int>(row - seq * rows_per_seq);
  const int query = in_seq / p.num_q_heads;
  r.head = in_seq - query * p.num_q_heads;
  r.exists = query < batch.num_queries(seq);
  if (!r.exists) return r;
  r.token = batch.query_begin(seq) + query;

  const int kv_head = r.head / plan.group;
  const int chunk = kv_head / plan.heads_per_chunk;
  const int row_of_head = query * plan.group + (r.head - kv_head * plan.group);
  const CtaRange ctas = unit_ctas(batch, static_cast<int64_t>(prefix[p.num_seqs]) * plan.num_chunks,
                                  plan.grid, prefix[seq], batch.tiles(seq), chunk);
  r.begin = ctas.begin;
  r.end = ctas.end;
  const int64_t unit = static_cast<int64_t>(seq) * plan.num_chunks + chunk;
  r.stride = static_cast<int64_t>(plan.heads_per_chunk) * plan.max_rows;
  r.first_index = (ctas.begin + unit) * r.stride +
                  static_cast<int64_t>(kv_head - chunk * plan.heads_per_chunk) * plan.max_rows +
                  row_of_head;
  return r;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, step));
  return x;
}

// One warp's part of a row's partials: CTAs begin + part, begin + part + parts, ...  A lane holds
// kDims dimensions, kVector neighbours at a time; l is the warp's.
template <int D>
struct RowSum {
  static constexpr int kDims = D / kWarpSize;
  static constexpr int kVector = D % 128 == 0 ? 4 : D == 64 ? 2 : 1;
  float o[kDims];
  float l;

  __device__ __forceinline__ static int dim(int e) {
    return (e / kVector * kWarpSize + static_cast<int>(threadIdx.x % kWarpSize)) * kVector + e % kVector;
  }

  __device__ __forceinline__ void clear() {
    l = 0.f;
#pragma unroll
    for (int e = 0; e < kDims; ++e) o[e] = 0.f;
  }

  __device__ __forceinline__ void add(const float* row, float weight) {
    struct alignas(4 * kVector) Vector {
      float x[kVector];
    };
#pragma unroll
    for (int e = 0; e < kDims; e += kVector) {
      const Vector v = *reinterpret_cast<const Vector*>(row + dim(e));
#pragma unroll
      for (int i = 0; i < kVector; ++i) o[e + i] += v.x[i] * weight;
    }
  }
};

template <int D>
__device__ __forceinline__ float sum_partials(const AttentionParams& p, const DecodePlan& plan,
                                              const CombineRow& row, int part, int parts,
                                              RowSum<D>& sum) {
  const auto* workspace = static_cast<const uint8_t*>(p.workspace);
  const auto* stats = reinterpret_cast<const float2*>(workspace + plan.partial_stats) + row.first_index;
  const auto* out = reinterpret_cast<const float*>(workspace + plan.partial_out) + row.first_index * D;
  const int count = row.end - row.begin;
  const int lane = threadIdx.x % kWarpSize;

  float m = kNoReference;
  for (int i = lane; i < count; i += kWarpSize) m = fmaxf(m, stats[i * row.stride].x);
  m = warp_max(m);  // over all partials: the same in every part
  sum.clear();
#pragma unroll 4
  for (int i = part; i < count; i += parts) {
    const float2 s = stats[i * row.stride];
    const float weight = ptx::exp2_approx(s.x - m);
    sum.l += s.y * weight;
    sum.add(out + i * row.stride * D, weight);
  }
  return m;
}

// Writes four neighbouring dims of a row.
__device__ __forceinline__ void store4(const AttentionParams& p, int64_t offset, bool aligned8, float x0,
                                       float x1, float x2, float x3) {
  auto* dst = static_cast<uint16_t*>(p.out) + offset;
  const bool bf16 = p.dtype == DType::kBFloat16;
  const uint32_t a = bf16 ? ptx::pack_bf16x2(x0, x1) : ptx::pack_f16x2(x0, x1);
  const uint32_t b = bf16 ? ptx::pack_bf16x2(x2, x3) : ptx::pack_f16x2(x2, x3);
  if (aligned8) {
    *reinterpret_cast<uint2*>(dst) = make_uint2(a, b);
  } else {
    dst[0] = static_cast<uint16_t>(a);
    dst[1] = static_cast<uint16_t>(a >> 16);
    dst[2] = static_cast<uint16_t>(b);
    dst[3] = static_cast<uint16_t>(b >> 16);
  }
}

template <int D>
__global__ void __launch_bounds__(kCombineThreads)
    decode_combine_kernel(const __grid_constant__ AttentionParams p,
                          const __grid_constant__ DecodePlan plan, int rows_per_cta) {
  constexpr int kDims = D / kWarpSize;
  constexpr int kPitch = D + 4;  // rows 4 banks apart: A fragments are read without conflicts
  __shared__ __align__(16) float rows[kCombineMaxRows][kPitch];
  __shared__ float part_out[kCombineWarps][D];
  __shared__ float part_l[kCombineWarps];
  __shared__ int64_t row_offset[kCombineMaxRows];  // in out, elements; -1: no such row

  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int g = lane / 4, t = lane % 4;

  // Column g of n-tile j is dim 16 tile + 2 g + j.  Up to D = 128 a warp has one such tile, and its
  // part of R is on the way before the partials are waited for.
  constexpr int kTiles = D / 16;
  const bool rotates = p.out_rotation != nullptr;
  constexpr bool kPrefetch = kTiles <= kCombineWarps;
  constexpr int kPrefetched = kPrefetch ? D / 4 : 1;
  float2 prefetched[kPrefetched];
  if constexpr (kPrefetch) {
    if (rotates && warp < kTiles) {
#pragma unroll
      for (int i = 0; i < kPrefetched; ++i) {  // k = 8 (i / 2) + 4 (i % 2) + t
        prefetched[i] = *reinterpret_cast<const float2*>(p.out_rotation + (4 * i + t) * D + 16 * warp +
                                                         2 * g);
      }
    }
  }
  ptx::wait_for_predecessor();  // every partial result and the prefix sums are written

  const auto* prefix = reinterpret_cast<const int32_t*>(static_cast<const uint8_t*>(p.workspace) +
                                                        plan.seq_prefix);
  // Rows of the MMA tile that this CTA does not have.
  for (int i = threadIdx.x; i < kCombineMaxRows * kPitch; i += kCombineThreads) {
    (&rows[0][0])[i] = 0.f;
  }
  if (threadIdx.x < kCombineMaxRows) row_offset[threadIdx.x] = -1;
  __syncthreads();  // cleared before rows are filled

  const int parts = rows_per_cta < kCombineWarps ? kCombineWarps / rows_per_cta : 1;
  const int part = warp % parts;
  for (int local = warp / parts; local < rows_per_cta; local += kCombineWarps / parts) {
    const CombineRow row =
        find_row(p, plan, static_cast<int64_t>(blockIdx.x) * rows_per_cta + local, prefix);
    RowSum<D> sum;
    float m = kNoReference;
    if (row.exists) m = sum_partials<D>(p, plan, row, part, parts, sum);
    if (parts > 1) {
      // One row a group of warps, so every warp comes here exactly once.
      if (row.exists && part > 0) {
#pragma unroll
        for (int e = 0; e < kDims; ++e) part_out[warp][RowSum<D>::dim(e)] = sum.o[e];
        if (lane == 0) part_l[warp] = sum.l;
      }
      __syncthreads();  // the other parts are there
      if (row.exists && part == 0) {
        for (int other = 1; other < parts; ++other) {
          sum.l += part_l[warp + other];
#pragma unroll
          for (int e = 0; e < kDims; ++e) sum.o[e] += part_out[warp + other][RowSum<D>::dim(e)];
        }
      }
    }
    if (!row.exists || part > 0) continue;

    float factor = 1.f, l = sum.l;
    if (p.sinks != nullptr) {  // one more term of the denominator, with no value
      const float sink = p.sinks[row.head] * kLog2eCombine;
      const float top = fmaxf(m, sink);
      factor = ptx::exp2_approx(m - top);
      l = l * factor + ptx::exp2_approx(sink - top);
      m = top;
    }
    const float inverse = l == 0.f ? 0.f : __fdiv_rn(factor, l);  // NaN goes through
#pragma unroll
    for (int e = 0; e < kDims; ++e) rows[local][RowSum<D>::dim(e)] = sum.o[e] * inverse;
    if (lane == 0) {
      row_offset[local] = row.token * p.out_token_stride + row.head * p.out_head_stride;
      if (p.lse != nullptr) {
        p.lse[static_cast<int64_t>(row.head) * p.num_tokens + row.token] =
            l == 0.f ? -INFINITY : (m + log2f(l)) * kLn2Combine;
      }
    }
  }
  __syncthreads();  // the rows are complete

  const bool aligned8 =
      (reinterpret_cast<uintptr_t>(p.out) | static_cast<uint64_t>(p.out_token_stride * 2) |
       static_cast<uint64_t>(p.out_head_stride * 2)) % 8 == 0;
  for (int tile = warp; tile < kTiles; tile += kCombineWarps) {
    float c[2][4] = {};
    if (rotates) {
#pragma unroll(kPrefetch ? D / 8 : 4)
      for (int k = 0; k < D / 8; ++k) {
        float2 r[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if constexpr (kPrefetch) {
            r[i] = prefetched[2 * k + i];
          } else {
            r[i] = *reinterpret_cast<const float2*>(p.out_rotation + (8 * k + 4 * i + t) * D +
                                                    16 * tile + 2 * g);
          }
        }
        uint32_t high[4], low[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float x = rows[g + 8 * (i % 2)][8 * k + t + 4 * (i / 2)];
          high[i] = ptx::tf32_high(x);
          low[i] = ptx::tf32_low(x);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float b0 = j == 0 ? r[0].x : r[0].y, b1 = j == 0 ? r[1].x : r[1].y;
          ptx::mma_m16n8k8_tf32(c[j], low, ptx::tf32_high(b0), ptx::tf32_high(b1));
          ptx::mma_m16n8k8_tf32(c[j], high, ptx::tf32_low(b0), ptx::tf32_low(b1));
          ptx::mma_m16n8k8_tf32(c[j], high, ptx::tf32_high(b0), ptx::tf32_high(b1));
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          c[j][i] = rows[g + 8 * (i / 2)][16 * tile + 4 * t + 2 * (i % 2) + j];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t offset = row_offset[g + 8 * i];
      if (offset < 0) continue;
      store4(p, offset + 16 * tile + 4 * t, aligned8, c[0][2 * i], c[1][2 * i], c[0][2 * i + 1],
             c[1][2 * i + 1]);
    }
  }
}

}  // namespace tq4
