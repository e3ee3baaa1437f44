// Last kernel of decode: partial results -> out and LSE.
//
//   m* = max of the partials' m and of the sink      (log2 units)
//   l* = sum l 2^(m - m*) + 2^(sink - m*)
//   out = (sum O 2^(m - m*) / l*) R                  l* = 0: no visible key, out = 0
//   lse = (m* + log2 l*) ln 2
//
// A CTA has 16 warps and one MMA tile of 16 rows, and takes blocks of `rows_per_block` (1, 2, 4, 8
// or 16) rows (sequence, query token, head): few when rows are few, so that all SMs share in
// reading the partials; 16 when they are many, so that R is read seldom.
//
//   warp w    sums a part of row w / parts's partials    parts = 16 / rows_per_block
//             in units of its own m                      -> row w of the tile, its m and l
//   warp w    dims 8 w .. of tile * R, its 16 rows weighted by 2^(m - m*) / l* and added up
//
// So the parts of a row meet after the product with R, which is linear, and a block takes a single
// barrier.  Everything is summed in a fixed order.
//
// This kernel runs when all else is done: what counts is how often it waits for memory.  It waits
// once, for statistics and partials together.  Where a row's partials are follows from the lengths
// alone and is known before the main kernel has ended; R comes to shared memory meanwhile, rows D +
// 8 floats apart, so that the 4 x 8 words of a B fragment are on different banks.  R of D = 256
// does not fit and is read from global memory.
//
// The product is the one of decode_prepare with O split into two TF32 values as well.
//
// Shared memory: R | rows of the tile.
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
constexpr int kCombineRows = 16;  // of the MMA tile
static_assert(kCombineRows == kCombineWarps, "every warp sums one row of the tile");
// Batches of up to so many sequences are summed up here, before the main kernel has ended.
constexpr int kCombineKnownSeqs = kCombineThreads;

template <int D>
struct CombineConfig {
  static constexpr bool kHoldsRotation = D <= 128;
  static constexpr int kRotationPitch = D + 8;
  static constexpr int kRowPitch = D + 4;  // A fragments: rows 4 banks apart
  // Shared memory, in floats.
  static constexpr int kRows = kHoldsRotation ? D * kRotationPitch : 0;
  static constexpr int kFloats = kRows + kCombineRows * kRowPitch;
  static constexpr int kSmemBytes = 4 * kFloats;
};

// What the warps tell each other about the rows of the tile.
struct CombineShared {
  float m[kCombineRows], l[kCombineRows];  // of a warp's part
  float sink[kCombineRows];                // log2 units; of its row, if there are sinks
  int64_t offset[kCombineRows];            // in out, elements; -1: no such row
  int64_t lse[kCombineRows];               // index
  int32_t warp_sums[kCombineWarps];
  int32_t prefix[kCombineKnownSeqs + 1];  // sums of unit_cost, as in the workspace
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

// The prefix sums of a batch of at most kCombineKnownSeqs sequences, by the whole CTA.  Ends with a
// barrier.
__device__ __forceinline__ void sum_costs(const DecodeBatch& batch, CombineShared& shared) {
  const int seq = threadIdx.x, lane = seq % kWarpSize, warp = seq / kWarpSize;
  const int cost = seq < batch.num_seqs ? batch.unit_cost(batch.tiles(seq)) : 0;
  int sum = cost;
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int other = __shfl_up_sync(kFullWarp, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == kWarpSize - 1) shared.warp_sums[warp] = sum;
  __syncthreads();  // all warps' sums are there
  for (int w = 0; w < warp; ++w) sum += shared.warp_sums[w];
  if (seq < batch.num_seqs) shared.prefix[seq + 1] = sum;
  if (seq == 0) shared.prefix[0] = 0;
  __syncthreads();  // the prefix sums are there
}

__device__ __forceinline__ CombineRow find_row(const AttentionParams& p, const DecodePlan& plan,
                                               const DecodeBatch& batch, int64_t row,
                                               const int32_t* prefix) {
  CombineRow r{};
  const int64_t rows_per_seq = static_cast<int64_t>(p.max_query_len) * p.num_q_heads;
  const int seq = static_cast<int>(divide(row, rows_per_seq));
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

// Warp `part` of `parts`: CTAs begin + part, begin + part + parts, ...  A lane holds kDims
// dimensions, kVector neighbours at a time.  A batch of partials is loaded before any is used.
template <int D>
struct RowSum {
  static constexpr int kDims = D / kWarpSize;
  static constexpr int kVector = D % 128 == 0 ? 4 : D == 64 ? 2 : 1;
  static constexpr int kBatch = D <= 128 ? 5 : 2;
  float o[kDims];
  float m, l;

  __device__ __forceinline__ static int dim(int e) {
    return (e / kVector * kWarpSize + static_cast<int>(threadIdx.x % kWarpSize)) * kVector +
           e % kVector;
  }

  __device__ __forceinline__ void clear() {
    m = kNoReference;
    l = 0.f;
#pragma unroll
    for (int e = 0; e < kDims; ++e) o[e] = 0.f;
  }

  __device__ __forceinline__ void add(const AttentionParams& p, const DecodePlan& plan,
                                      const CombineRow& row, int part, int parts) {
    struct alignas(4 * kVector) Vector {
      float x[kVector];
    };
    const auto* workspace = static_cast<const uint8_t*>(p.workspace);
    const int64_t begin = row.first_index + part * row.stride, step = parts * row.stride;
    const auto* stats = reinterpret_cast<const float2*>(workspace + plan.partial_stats) + begin;
    const auto* out =
        reinterpret_cast<const float*>(workspace + plan.partial_out) + begin * D + dim(0);
#pragma unroll 1
    for (int left = row.end - row.begin - part; left > 0; left -= kBatch * parts) {
      float2 stat[kBatch];
      Vector value[kBatch][kDims / kVector];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const bool exists = b * parts < left;
        stat[b] = make_float2(kNoReference, 0.f);
        if (exists) stat[b] = *stats;
        stats += step;
#pragma unroll
        for (int v = 0; v < kDims / kVector; ++v) {
          value[b][v] = {};
          if (exists) value[b][v] = *reinterpret_cast<const Vector*>(out + v * kVector * kWarpSize);
        }
        out += step * D;
      }
      float top = m;
#pragma unroll
      for (int b = 0; b < kBatch; ++b) top = fmaxf(top, stat[b].x);
      const float own = ptx::exp2_approx(m - top);
      m = top;
      l *= own;
#pragma unroll
      for (int e = 0; e < kDims; ++e) o[e] *= own;
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const float weight = ptx::exp2_approx(stat[b].x - top);
        l += stat[b].y * weight;
#pragma unroll
        for (int e = 0; e < kDims; ++e) o[e] += value[b][e / kVector].x[e % kVector] * weight;
      }
    }
  }
};

// max_query_len is a promise that only the device can check: what breaks it becomes NaN, not
// whatever the output held before.  By the warp of the sequence's last row.
template <int D>
__device__ __forceinline__ void write_surplus(const AttentionParams& p, const CombineRow& row) {
  const int lane = threadIdx.x % kWarpSize;
  for (int64_t token = row.token + 1; token <= row.token + row.surplus; ++token) {
    auto* lost =
        static_cast<uint16_t*>(p.out) + token * p.out_token_stride + row.head * p.out_head_stride;
    for (int d = lane; d < D; d += kWarpSize) lost[d] = 0x7fff;  // in fp16 and in bf16
    if (lane == 0 && p.lse != nullptr) {
      p.lse[static_cast<int64_t>(row.head) * p.num_tokens + token] = NAN;
    }
  }
}

// What is known of the warp's row of the tile before there are partial results.
template <int D>
__device__ __forceinline__ void announce_row(const AttentionParams& p, const CombineRow& row,
                                             int part, CombineShared& shared) {
  const int warp = threadIdx.x / kWarpSize;
  if (threadIdx.x % kWarpSize == 0) {
    shared.sink[warp] =
        row.exists && p.sinks != nullptr ? p.sinks[row.head] * 1.4426950408889634f : kNoReference;
    shared.offset[warp] =
        row.exists ? row.token * p.out_token_stride + row.head * p.out_head_stride : -1;
    shared.lse[warp] = static_cast<int64_t>(row.head) * p.num_tokens + row.token;
  }
  if (part == 0 && row.surplus > 0) {
    ptx::wait_for_predecessor();  // q has been read, which may be where the output goes
    write_surplus<D>(p, row);
  }
}

// The warp's row of the tile.  Rows that do not exist are zeros: their place in the MMA tile must
// hold numbers.
template <int D>
__device__ __forceinline__ void sum_row(const AttentionParams& p, const DecodePlan& plan,
                                        const CombineRow& row, int part, int parts, float* rows,
                                        CombineShared& shared) {
  using Sum = RowSum<D>;
  const int warp = threadIdx.x / kWarpSize;
  Sum sum;
  sum.clear();
  sum.add(p, plan, row, part, parts);
#pragma unroll
  for (int e = 0; e < Sum::kDims; ++e) {
    rows[warp * CombineConfig<D>::kRowPitch + Sum::dim(e)] = sum.o[e];
  }
  if (threadIdx.x % kWarpSize == 0) {
    shared.m[warp] = sum.m;
    shared.l[warp] = sum.l;
  }
}

// 2^(m - m*) / l* of row `lane` % 16 of the tile.  Warp 0 writes the LSE.
__device__ __forceinline__ float weigh_rows(const AttentionParams& p, const CombineShared& shared,
                                            int parts) {
  const int lane = threadIdx.x % kWarpSize, row = lane % kCombineRows;
  const float own_m = shared.m[row];
  float m = own_m;
#pragma unroll 1
  for (int step = 1; step < parts; step *= 2) m = fmaxf(m, __shfl_xor_sync(kFullWarp, m, step));
  float l = shared.l[row] * ptx::exp2_approx(own_m - m);
#pragma unroll 1
  for (int step = 1; step < parts; step *= 2) l += __shfl_xor_sync(kFullWarp, l, step);
  if (p.sinks != nullptr) {  // one more term of the denominator, with no value
    const float sink = shared.sink[row];
    const float top = fmaxf(m, sink);
    l = l * ptx::exp2_approx(m - top) + ptx::exp2_approx(sink - top);
    m = top;
  }
  if (p.lse != nullptr && threadIdx.x < kCombineRows && row % parts == 0 &&
      shared.offset[row] >= 0) {
    p.lse[shared.lse[row]] = l == 0.f ? -INFINITY : (m + log2f(l)) * 0.6931471805599453f;
  }
  return l == 0.f ? 0.f : __fdiv_rn(ptx::exp2_approx(own_m - m), l);  // NaN goes through
}

// Dims 8 tile + 2 t and + 1 of the tile's rows g (c[0], c[1]) and g + 8, times R.
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
  float sum[3][4] = {};  // so that no MMA waits for the one before
#pragma unroll(Config::kHoldsRotation ? 4 : 8)
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
    ptx::mma_m16n8k8_tf32(sum[0], low, ptx::tf32_high(b[0]), ptx::tf32_high(b[1]));
    ptx::mma_m16n8k8_tf32(sum[1], high, ptx::tf32_low(b[0]), ptx::tf32_low(b[1]));
    ptx::mma_m16n8k8_tf32(sum[2], high, ptx::tf32_high(b[0]), ptx::tf32_high(b[1]));
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] = (sum[0][i] + sum[1][i]) + sum[2][i];
}

// Weighs the tile's rows and adds up those of one row of the output, `parts` neighbours.
__device__ __forceinline__ void add_parts(const float (&weight)[2], int parts, float (&c)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] *= weight[i / 2];
#pragma unroll 1
  for (int step = 1; step < min(parts, 8); step *= 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] += __shfl_xor_sync(kFullWarp, c[i], 4 * step);
  }
  if (parts == kCombineRows) {
    c[0] += c[2];
    c[1] += c[3];
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
  __shared__ CombineShared tile_rows;
  auto* shared = reinterpret_cast<float*>(ptx::dynamic_shared());
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int g = lane / 4, t = lane % 4;

  if (Config::kHoldsRotation && p.out_rotation != nullptr) {
    for (int i = threadIdx.x; i < D * D / 4; i += kCombineThreads) {
      const int row = i / (D / 4), column = i % (D / 4) * 4;
      ptx::cp_async<16>(ptx::smem_address(shared + row * Config::kRotationPitch + column),
                        p.out_rotation + 4 * i);
    }
  }
  ptx::cp_async_commit();
  const DecodeBatch batch = decode_batch(p, plan);
  const auto* prefix =
      reinterpret_cast<const int32_t*>(static_cast<const uint8_t*>(p.workspace) + plan.seq_prefix);
  if (p.num_seqs <= kCombineKnownSeqs) {
    sum_costs(batch, tile_rows);
    prefix = tile_rows.prefix;
  } else {
    ptx::wait_for_predecessor();  // the main kernel has written the prefix sums
  }
  const bool aligned4 =
      (reinterpret_cast<uintptr_t>(p.out) | static_cast<uint64_t>(p.out_token_stride * 2) |
       static_cast<uint64_t>(p.out_head_stride * 2)) %
          4 ==
      0;
  const int parts = kCombineRows / rows_per_block;
  const int64_t num_rows = static_cast<int64_t>(p.num_seqs) * p.max_query_len * p.num_q_heads;
#pragma unroll 1
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * rows_per_block; first < num_rows;
       first += static_cast<int64_t>(gridDim.x) * rows_per_block) {
    const CombineRow row = find_row(p, plan, batch, first + warp / parts, prefix);
    announce_row<D>(p, row, warp % parts, tile_rows);
    ptx::wait_for_predecessor();  // every partial result is written
    sum_row<D>(p, plan, row, warp % parts, parts, shared + Config::kRows, tile_rows);
    ptx::cp_async_wait<0>();
    __syncthreads();  // the rows, and R, are complete
    const float row_weight = weigh_rows(p, tile_rows, parts);
    const float weight[2] = {__shfl_sync(kFullWarp, row_weight, g),
                             __shfl_sync(kFullWarp, row_weight, g + 8)};
    for (int tile = warp; tile < D / 8; tile += kCombineWarps) {
      float c[4];
      rotate_tile<D>(p, shared, tile, c);
      add_parts(weight, parts, c);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t offset = tile_rows.offset[g + 8 * i];
        if (offset < 0 || (g + 8 * i) % parts != 0) continue;
        store_pair(p, offset + 8 * tile + 2 * t, aligned4, c[2 * i], c[2 * i + 1]);
      }
    }
    if (first + static_cast<int64_t>(gridDim.x) * rows_per_block < num_rows) {
      __syncthreads();  // the rows have been read
    }
  }
}

}  // namespace tq4
