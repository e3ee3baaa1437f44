// Last kernel of decode: partial results -> out and LSE.
//
//   m* = max of the partials' m and of the sink      (log2 units)
//   l* = sum l 2^(m - m*) + 2^(sink - m*)
//   out = (sum O 2^(m - m*) / l*) R                  l* = 0: no visible key, out = 0
//   lse = (m* + log2 l*) ln 2
//
// A CTA has 16 warps and takes blocks of `rows_per_block` (1, 2, 4, 8 or 16) rows (sequence, query
// token, head): few when rows are few, so that all SMs share in reading the partials.
//
//   16 / rows_per_block warps  sum a part of a row's partials each, in units of its own m
//   the first of them          adds up all parts and divides by l*: lanes hold D / 32 dims each
//   R, one of three ways       none      nothing
//                              Hadamard  butterflies between the lanes of that warp
//                              dense     the product of decode_prepare, with O split into two TF32
//                                        values as well: 16 rows a tile, 8 dims of it a warp
//
// Whether R is a Hadamard matrix the main kernel has found out (check_output_rotation).  Everything
// is summed in a fixed order.
//
// The CTAs of this kernel find room only when the main kernel leaves, nothing runs beside them, and
// every instruction is fetched for the first time: what counts is the chain of loads (one for where
// the partials of a row are, one for the partials) and the length of the code.
//
// Shared memory: R, its rows D + 8 floats apart, so that the 4 x 8 words of a B fragment are on
// different banks (R of D = 256 does not fit and is read from global memory) | a row for each warp.
#pragma once
#include <cstdint>

#include "../params.h"
#include "../ptx/arith.cuh"
#include "../ptx/dynamic_smem.cuh"
#include "../ptx/global_access.cuh"
#include "../ptx/grid_dependency.cuh"
#include "../ptx/mma_tf32.cuh"
#include "../ptx/opaque.cuh"
#include "../ptx/smem.cuh"
#include "common.cuh"
#include "decode_output.cuh"
#include "decode_plan.h"
#include "parameter_lines.cuh"
#include "warp.cuh"

namespace tq4 {

constexpr int kCombineWarps = 16;
constexpr int kCombineThreads = kCombineWarps * kWarpSize;
constexpr int kCombineRows = 16;  // of the MMA tile
static_assert(kCombineRows == kCombineWarps, "every warp sums one row of the tile");
template <int D>
constexpr int kCombineBatch =
    D <= 128 ? 9 : 4;  // partials loaded at once; 16 x 9 >= the SMs of an H200

template <int D>
struct CombineConfig {
  static constexpr bool kHoldsRotation = D <= 128;
  static constexpr bool kMayBeHadamard = (D & (D - 1)) == 0;
  static constexpr int kRotationPitch = D + 8;
  static constexpr int kRowPitch = D + 4;  // A fragments: rows 4 banks apart
  // Shared memory, in floats.
  static constexpr int kRows = kHoldsRotation ? D * kRotationPitch : 0;
  static constexpr int kFloats = kRows + kCombineRows * kRowPitch;
  static constexpr int kSmemBytes = 4 * kFloats;
};

// What the warps tell each other about their rows.
struct CombineShared {
  float2 stats[kCombineRows];    // (m, l) of a warp's part
  int64_t offset[kCombineRows];  // in out, elements; -1: no such row
  ParameterLines lines[kCombineWarps];
};

// To the warp's place in shared memory.
template <int D>
__device__ __forceinline__ void put_sum(const RowSum<D>& sum, float* rows, CombineShared& shared) {
  const int warp = warp_index();
  float* row = rows + warp * CombineConfig<D>::kRowPitch;
#pragma unroll
  for (int e = 0; e < RowSum<D>::kDims; ++e) row[RowSum<D>::dim(e)] = sum.o[e];
  if (threadIdx.x % kWarpSize == 0) shared.stats[warp] = make_float2(sum.m, sum.l);
}

// R to shared memory, where it fits.
template <int D>
__device__ __forceinline__ void fetch_rotation(const AttentionParams& p, float* shared) {
  using Config = CombineConfig<D>;
  if constexpr (Config::kHoldsRotation) {
#pragma unroll 1
    for (int i = threadIdx.x; i < D * D / 4; i += kCombineThreads) {
      const int row = i / (D / 4), column = i % (D / 4) * 4;
      ptx::cp_async<16>(ptx::smem_address(shared + row * Config::kRotationPitch + column),
                        p.out_rotation + 4 * i);
    }
    ptx::cp_async_commit();
  }
}

// Dims 8 tile + 2 t and + 1 of the tile's rows g (c[0], c[1]) and g + 8, times R.
template <int D>
__device__ __forceinline__ void rotate_tile(const AttentionParams& p, const float* shared, int tile,
                                            float (&c)[4]) {
  using Config = CombineConfig<D>;
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  const float* rows = shared + Config::kRows;
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

// The dense way: the rows of the whole CTA.
template <int D>
__device__ __forceinline__ void write_rotated(const AttentionParams& p, const float* shared,
                                              const CombineShared& tile_rows, int parts) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  const bool aligned4 =
      (reinterpret_cast<uintptr_t>(p.out) | static_cast<uint64_t>(p.out_token_stride * 2) |
       static_cast<uint64_t>(p.out_head_stride * 2)) %
          4 ==
      0;
  for (int tile = warp_index(); tile < D / 8; tile += kCombineWarps) {
    float c[4];
    rotate_tile<D>(p, shared, tile, c);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if ((g + 8 * i) % parts != 0) continue;  // a part of another row, not a row
      const int64_t offset = tile_rows.offset[g + 8 * i];
      if (offset >= 0) {
        store_pair(p, offset + 8 * tile + 2 * t, aligned4, c[2 * i], c[2 * i + 1]);
      }
    }
  }
}

template <int D>
__global__ void __launch_bounds__(kCombineThreads, 1)
    decode_combine_kernel(const __grid_constant__ AttentionParams p,
                          const __grid_constant__ DecodePlan plan, int rows_per_block) {
  using Config = CombineConfig<D>;
  using Sum = RowSum<D>;
  __shared__ CombineShared tile_rows;
  auto* shared = reinterpret_cast<float*>(ptx::dynamic_shared());
  float* rows = shared + Config::kRows;
  const int warp = warp_index();
  const int log_parts = 31 - __clz(kCombineRows / rows_per_block), parts = 1 << log_parts;
  const ParameterLines lines = ParameterLines::touch(p, plan);
  const int part = warp & (parts - 1);
  const bool leads = part == 0;  // the warp that ends up with the row
  const bool aligned = Sum::is_aligned(p);
  const DecodeBatch batch = decode_batch(p, plan);
  const int64_t num_rows = static_cast<int64_t>(p.num_seqs) * plan.seq_divider.divisor;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * rows_per_block;
  int64_t first = static_cast<int64_t>(blockIdx.x) * rows_per_block;
  CombineRow row = find_row(p, plan, batch, first + (warp >> log_parts));
  // What comes from outside is loaded before the wait, what the kernels before have found out all
  // at once after it: one load after the other costs half a microsecond each.
  typename Sum::Vector row0[Sum::kDims / Sum::kVector] = {};
  bool dense = p.out_rotation != nullptr && !p.out_signs;
  float corner = 0.f;
  if (p.out_signs) {
    Sum::load_signs(p.out_rotation, row0);
  } else if (Config::kMayBeHadamard && dense) {
#pragma unroll
    for (int v = 0; v < Sum::kDims / Sum::kVector; ++v) row0[v] = Sum::load(p.out_rotation, v);
    corner = fabsf(p.out_rotation[0]);
  }
  const auto* workspace = static_cast<const uint8_t*>(p.workspace);
  const auto* ranges =
      reinterpret_cast<const CtaRange*>(workspace + ptx::opaque_offset(plan.unit_ctas));
  const auto ctas_of = [&](const CombineRow& r) {
    return r.exists ? ranges[r.unit] : CtaRange{0, 0};
  };
  PartialTerms<D> terms = PartialTerms<D>::make(p, plan, row, log_parts);
  lines.keep(tile_rows.lines);
  // Where the partial results are is mostly known by now, but not for sure: a guess, of which the
  // loads below need not wait for the answer.
  CtaRange ctas{0, 0};
  if (row.exists) {
    const CtaRange& range = ranges[row.unit];
    ctas = {ptx::ld_global_relaxed(&range.begin), ptx::ld_global_relaxed(&range.end)};
  }
  if (ctas.begin < 0 || ctas.begin > ctas.end || ctas.end > plan.grid) ctas = {0, 0};
  ptx::wait_for_predecessor();  // every partial result is written
  CtaRange told = ctas_of(row);
  if (Config::kMayBeHadamard && dense) {
    dense = *reinterpret_cast<const int32_t*>(workspace + plan.dense_rotation) != 0 ||
            !(corner > 0.f && corner < INFINITY);
  }
  bool fetched = false;
#pragma unroll 1
  while (true) {
    Sum sum;
#pragma unroll 1
    while (true) {
      sum.clear();
      sum.template add<kCombineBatch<D>>(terms, ctas, part);
      if (ctas.begin == told.begin && ctas.end == told.end) break;
      ctas = told;
    }
    if (dense && !fetched) fetch_rotation<D>(p, shared);
    fetched = true;
    if (parts > 1) {
      put_sum(sum, rows, tile_rows);
      __syncthreads();  // the parts are there
      if (leads) {
        sum.sum_terms(
            parts, [&](int i) { return tile_rows.stats[warp + i]; },
            [&](int i, int v) { return Sum::load(rows + (warp + i) * Config::kRowPitch, v); });
      }
    }
    if (leads) {
      sum.finish(p, row);
      if (row.surplus > 0) write_surplus<D>(p, row);
    }
    const int64_t offset =
        row.exists ? row.token * p.out_token_stride + row.head * p.out_head_stride : -1;
    if (dense) {
      __syncwarp();  // the warp's part has been read
      if (leads) put_sum(sum, rows, tile_rows);
      if (threadIdx.x % kWarpSize == 0) tile_rows.offset[warp] = offset;
      ptx::cp_async_wait<0>();
      __syncthreads();  // the rows, and R, are complete
      write_rotated<D>(p, shared, tile_rows, parts);
    } else if (leads && row.exists) {
      if (Config::kMayBeHadamard && p.out_rotation != nullptr) sum.transform(row0);
      sum.store(p, offset, aligned);
    }
    first += stride;
    if (first >= num_rows) break;
    if (parts > 1 || dense) __syncthreads();  // the rows have been read
    row = find_row(p, plan, batch, first + (warp >> log_parts));
    ctas = told = ctas_of(row);
    terms = PartialTerms<D>::make(p, plan, row, log_parts);
  }
}

}  // namespace tq4
