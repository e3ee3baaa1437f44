// Last kernel of decode: partial results -> out and LSE.
//
//   m* = max of the partials' m and of the sink      (log2 units)
//   l* = sum l 2^(m - m*) + 2^(sink - m*)
//   out = (sum O 2^(m - m*) / l*) R                  l* = 0: no visible key, out = 0
//   lse = (m* + log2 l*) ln 2
//
// A CTA takes blocks of `rows_per_block` (1, 2, 4, 8 or 16) rows (sequence, query token, head): few
// when rows are few, so that all SMs share in reading the partials; 16, one MMA tile, when they are
// many, so that R is read seldom.  16 / rows_per_block of the 16 warps split the partials of a row,
// in a fixed order.
//
// The product with R is the one of decode_prepare with O split into two TF32 values as well; warp w
// computes dims 8 w .. of it.  R comes to shared memory once a CTA, while the first block's
// partials are summed; rows lie D + 8 floats apart, so that the 4 x 8 words of a B fragment are on
// different banks.  R of D = 256 does not fit and is read from global memory.
//
// Shared memory: R | rows of O | partial sums of the warps.
#pragma once
#include <cstdint>

#include "../params.h"
#include "../ptx/arith.cuh"
#include "../ptx/dynamic_smem.cuh"
#include "../ptx/grid_dependency.cuh"
#include "../ptx/mma_tf32.cuh"
#include "../ptx/smem.cuh"
#include "common.cuh"
#include "decode_kernel.cuh"
#include "decode_plan.h"

namespace tq4 {

constexpr int kCombineWarps = 16;
constexpr int kCombineThreads = kCombineWarps * kWarpSize;
constexpr int kCombineMaxRows = 16;
static_assert(kCombineMaxRows == kCombineWarps, "every warp sums one row, or part of one");

template <int D>
struct CombineConfig {
  static constexpr bool kHoldsRotation = D <= 128;
  static constexpr int kRotationPitch = D + 8;
  static constexpr int kRowPitch = D + 4;  // A fragments: rows 4 banks apart
  // Shared memory, in floats.
  static constexpr int kRows = kHoldsRotation ? D * kRotationPitch : 0;
  static constexpr int kParts = kRows + kCombineMaxRows * kRowPitch;
  static constexpr int kFloats = kParts + kCombineWarps * D;
  static constexpr int kSmemBytes = 4 * kFloats;
};

// A row of the output and where its partial results are.
struct CombineRow {
  bool exists;
  int surplus;  // query tokens of the sequence beyond max_query_len, reported by its last row
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
  r.surplus = query == p.max_query_len - 1 ? batch.num_queries(seq) - p.max_query_len : 0;

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
    return (e / kVector * kWarpSize + static_cast<int>(threadIdx.x % kWarpSize)) * kVector +
           e % kVector;
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
  const auto* stats =
      reinterpret_cast<const float2*>(workspace + plan.partial_stats) + row.first_index;
  const auto* out =
      reinterpret_cast<const float*>(workspace + plan.partial_out) + row.first_index * D;
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

// Sums a row's partials, splits by the denominator, writes the LSE.  Called by all warps: `part` of
// `parts` warps that share a row, which is left in rows[local] by the first of them.
template <int D>
__device__ __forceinline__ void combine_row(const AttentionParams& p, const DecodePlan& plan,
                                            const CombineRow& row, int local, int part, int parts,
                                            float* shared, float* part_l, int64_t* row_offset) {
  using Config = CombineConfig<D>;
  using Sum = RowSum<D>;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  float* part_out = shared + Config::kParts;
  Sum sum;
  float m = kNoReference;
  if (row.exists) m = sum_partials<D>(p, plan, row, part, parts, sum);
  if (parts > 1) {
    if (row.exists && part > 0) {
#pragma unroll
      for (int e = 0; e < Sum::kDims; ++e) part_out[warp * D + Sum::dim(e)] = sum.o[e];
      if (lane == 0) part_l[warp] = sum.l;
    }
    __syncthreads();  // the other parts are there
    if (row.exists && part == 0) {
      for (int other = warp + 1; other < warp + parts; ++other) {
        sum.l += part_l[other];
#pragma unroll
        for (int e = 0; e < Sum::kDims; ++e) sum.o[e] += part_out[other * D + Sum::dim(e)];
      }
    }
  }
  if (part > 0) return;

  float* out = shared + Config::kRows + local * Config::kRowPitch;
  if (lane == 0) {
    row_offset[local] =
        row.exists ? row.token * p.out_token_stride + row.head * p.out_head_stride : -1;
  }
  if (!row.exists) {  // its place in the MMA tile must hold numbers
#pragma unroll
    for (int e = 0; e < Sum::kDims; ++e) out[Sum::dim(e)] = 0.f;
    return;
  }
  // max_query_len is a promise that only the device can check: what breaks it becomes NaN, not
  // whatever the output held before.
  for (int64_t token = row.token + 1; token <= row.token + row.surplus; ++token) {
    auto* lost =
        static_cast<uint16_t*>(p.out) + token * p.out_token_stride + row.head * p.out_head_stride;
    for (int d = lane; d < D; d += kWarpSize) lost[d] = 0x7fff;  // in fp16 and in bf16
    if (lane == 0 && p.lse != nullptr) {
      p.lse[static_cast<int64_t>(row.head) * p.num_tokens + token] = NAN;
    }
  }
  float factor = 1.f, l = sum.l;
  if (p.sinks != nullptr) {  // one more term of the denominator, with no value
    const float sink = p.sinks[row.head] * 1.4426950408889634f;
    const float top = fmaxf(m, sink);
    factor = ptx::exp2_approx(m - top);
    l = l * factor + ptx::exp2_approx(sink - top);
    m = top;
  }
  const float inverse = l == 0.f ? 0.f : __fdiv_rn(factor, l);  // NaN goes through
#pragma unroll
  for (int e = 0; e < Sum::kDims; ++e) out[Sum::dim(e)] = sum.o[e] * inverse;
  if (lane == 0 && p.lse != nullptr) {
    p.lse[static_cast<int64_t>(row.head) * p.num_tokens + row.token] =
        l == 0.f ? -INFINITY : (m + log2f(l)) * 0.6931471805599453f;
  }
}

// Dims 8 tile .. 8 tile + 7 of out = O R for the block's rows; lane: rows g, g + 8, dims 2 t, 2 t
// + 1.
template <int D>
__device__ __forceinline__ void rotate_tile(const AttentionParams& p, const float* shared, int tile,
                                            float (&c)[4]) {
  using Config = CombineConfig<D>;
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  const float* rows = shared + Config::kRows;
  if (p.out_rotation == nullptr) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      c[i] = rows[(g + 8 * (i / 2)) * Config::kRowPitch + 8 * tile + 2 * t + i % 2];
    }
    return;
  }
#pragma unroll 4
  for (int k = 0; k < D; k += 8) {
    float b[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = k + t + 4 * i, column = 8 * tile + g;
      b[i] = Config::kHoldsRotation ? shared[row * Config::kRotationPitch + column]
                                    : p.out_rotation[row * D + column];
    }
    uint32_t high[4], low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = rows[(g + 8 * (i % 2)) * Config::kRowPitch + k + t + 4 * (i / 2)];
      high[i] = ptx::tf32_high(x);
      low[i] = ptx::tf32_low(x);
    }
    ptx::mma_m16n8k8_tf32(c, low, ptx::tf32_high(b[0]), ptx::tf32_high(b[1]));
    ptx::mma_m16n8k8_tf32(c, high, ptx::tf32_low(b[0]), ptx::tf32_low(b[1]));
    ptx::mma_m16n8k8_tf32(c, high, ptx::tf32_high(b[0]), ptx::tf32_high(b[1]));
  }
}

// Two neighbouring dims of a row.
__device__ __forceinline__ void store_pair(const AttentionParams& p, int64_t offset, bool aligned4,
                                           float x, float y) {
  auto* dst = static_cast<uint16_t*>(p.out) + offset;
  const uint32_t word =
      p.dtype == DType::kBFloat16 ? ptx::pack_bf16x2(x, y) : ptx::pack_f16x2(x, y);
  if (aligned4) {
    *reinterpret_cast<uint32_t*>(dst) = word;
  } else {
    dst[0] = static_cast<uint16_t>(word);
    dst[1] = static_cast<uint16_t>(word >> 16);
  }
}

template <int D>
__global__ void __launch_bounds__(kCombineThreads, 2)
    decode_combine_kernel(const __grid_constant__ AttentionParams p,
                          const __grid_constant__ DecodePlan plan, int rows_per_block) {
  using Config = CombineConfig<D>;
  __shared__ float part_l[kCombineWarps];
  __shared__ int64_t row_offset[kCombineMaxRows];  // in out, elements; -1: no such row
  auto* shared = reinterpret_cast<float*>(ptx::dynamic_shared());
  const int warp = threadIdx.x / kWarpSize, g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;

  if (Config::kHoldsRotation && p.out_rotation != nullptr) {
    for (int i = threadIdx.x; i < D * D / 4; i += kCombineThreads) {
      const int row = i / (D / 4), column = i % (D / 4) * 4;
      ptx::cp_async<16>(ptx::smem_address(shared + row * Config::kRotationPitch + column),
                        p.out_rotation + 4 * i);
    }
  }
  ptx::cp_async_commit();
  if (threadIdx.x < kCombineMaxRows) row_offset[threadIdx.x] = -1;
  for (int i = threadIdx.x; i < kCombineMaxRows * Config::kRowPitch; i += kCombineThreads) {
    shared[Config::kRows + i] = 0.f;  // MMA rows that no block of this launch has
  }
  __syncthreads();              // cleared before rows are filled
  ptx::wait_for_predecessor();  // every partial result and the prefix sums are written

  const auto* prefix =
      reinterpret_cast<const int32_t*>(static_cast<const uint8_t*>(p.workspace) + plan.seq_prefix);
  const bool aligned4 =
      (reinterpret_cast<uintptr_t>(p.out) | static_cast<uint64_t>(p.out_token_stride * 2) |
       static_cast<uint64_t>(p.out_head_stride * 2)) %
          4 ==
      0;
  const int parts = kCombineWarps / rows_per_block;
  const int local = warp / parts;
  const int64_t num_rows = static_cast<int64_t>(p.num_seqs) * p.max_query_len * p.num_q_heads;
#pragma unroll 1
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * rows_per_block; first < num_rows;
       first += static_cast<int64_t>(gridDim.x) * rows_per_block) {
    const CombineRow row = find_row(p, plan, first + local, prefix);
    combine_row<D>(p, plan, row, local, warp % parts, parts, shared, part_l, row_offset);
    ptx::cp_async_wait<0>();
    __syncthreads();  // the rows, and R, are complete
    for (int tile = warp; tile < D / 8; tile += kCombineWarps) {
      float c[4] = {};
      rotate_tile<D>(p, shared, tile, c);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t offset = row_offset[g + 8 * i];
        if (offset < 0) continue;
        store_pair(p, offset + 8 * tile + 2 * t, aligned4, c[2 * i], c[2 * i + 1]);
      }
    }
    __syncthreads();  // the rows have been read
  }
}

}  // namespace tq4
