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
#include "../ptx/grid_dependency.cuh"
#include "../ptx/mma_tf32.cuh"
#include "../ptx/opaque.cuh"
#include "../ptx/smem.cuh"
#include "common.cuh"
#include "decode_kernel.cuh"
#include "decode_plan.h"
#include "parameter_lines.cuh"

namespace tq4 {

constexpr int kCombineWarps = 16;
constexpr int kCombineThreads = kCombineWarps * kWarpSize;
constexpr int kCombineRows = 16;  // of the MMA tile
static_assert(kCombineRows == kCombineWarps, "every warp sums one row of the tile");

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
  float m[kCombineRows], l[kCombineRows];  // of a warp's part
  int64_t offset[kCombineRows];            // in out, elements; -1: no such row
  ParameterLines lines[kCombineWarps];
};

// A row of the output.
struct CombineRow {
  bool exists;
  int surplus;  // query tokens of the sequence beyond max_query_len, reported by its last row
  int64_t token;
  int head;
  int64_t unit;         // (sequence, chunk of KV heads)
  int64_t row_of_unit;  // in rows of the partial arrays
  float sink;           // log2 units
};

__device__ __forceinline__ CombineRow find_row(const AttentionParams& p, const DecodePlan& plan,
                                               const DecodeBatch& batch, int64_t row) {
  CombineRow r{};
  const int seq = static_cast<int>(plan.seq_divider.quotient(static_cast<uint32_t>(row)));
  if (seq >= p.num_seqs) return r;
  const uint32_t in_seq = static_cast<uint32_t>(row) - seq * plan.seq_divider.divisor;
  const int query = static_cast<int>(plan.query_divider.quotient(in_seq));
  r.head = static_cast<int>(in_seq) - query * p.num_q_heads;
  const int num_queries = batch.num_queries(seq);
  r.exists = query < num_queries;
  if (!r.exists) return r;
  r.token = batch.query_begin(seq) + query;
  r.surplus = query == p.max_query_len - 1 ? num_queries - p.max_query_len : 0;
  r.sink = p.sinks != nullptr ? p.sinks[r.head] * 1.4426950408889634f : 0.f;

  const int kv_head = static_cast<int>(plan.group_divider.quotient(r.head));
  const int chunk = static_cast<int>(plan.chunk_divider.quotient(kv_head));
  r.unit = static_cast<int64_t>(seq) * plan.num_chunks + chunk;
  r.row_of_unit = static_cast<int64_t>(kv_head - chunk * plan.heads_per_chunk) * plan.max_rows +
                  query * plan.group + (r.head - kv_head * plan.group);
  return r;
}

// Weights of up to 32 terms of a sum, lane i holding (m, l) of term i (m = kNoReference, l = 0:
// there is none).
struct TermWeights {
  float m, l;    // of the sum
  float weight;  // of the lane's term, in units of the sum's m

  __device__ __forceinline__ static TermWeights make(float m, float l) {
    TermWeights sum;
    sum.m = m;
#pragma unroll
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      sum.m = fmaxf(sum.m, __shfl_xor_sync(kFullWarp, sum.m, step));
    }
    sum.weight = ptx::exp2_approx(m - sum.m);
    sum.l = l * sum.weight;
#pragma unroll
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      sum.l += __shfl_xor_sync(kFullWarp, sum.l, step);
    }
    return sum;
  }

  __device__ __forceinline__ float of(int term) const {
    return __shfl_sync(kFullWarp, weight, term);
  }
};

// Neighbouring dimensions that a lane loads and stores at once.
template <int D>
constexpr int kCombineVector = D % 128 == 0 ? 4
                               : D == 64    ? 2
                                            : 1;

// Where a row's partial results lie: addresses of CTA 0's, though it may have none, and the bytes
// to the next CTA's.  Worked out before the wait.
template <int D>
struct PartialTerms {
  const uint8_t* stats;
  const uint8_t* out;  // the lane's first dimension
  uint32_t stats_pitch, out_pitch;
  int log_parts;  // 2^log_parts warps share a row

  __device__ __forceinline__ int parts() const { return 1 << log_parts; }
  __device__ __forceinline__ uint32_t stats_step() const { return stats_pitch << log_parts; }
  __device__ __forceinline__ uint32_t out_step() const { return out_pitch << log_parts; }

  __device__ __forceinline__ static PartialTerms make(const AttentionParams& p,
                                                      const DecodePlan& plan, const CombineRow& row,
                                                      int log_parts) {
    const auto* workspace = static_cast<const uint8_t*>(p.workspace);
    const uint32_t rows = plan.heads_per_chunk * plan.max_rows;
    const int64_t first = row.unit * rows + row.row_of_unit;
    const int lane = threadIdx.x % kWarpSize;
    return {
        workspace + ptx::opaque_offset(plan.partial_stats + first * 8),
        workspace + ptx::opaque_offset(plan.partial_out + (first * D + lane * kCombineVector<D>)*4),
        rows * 8, rows * D * 4, log_parts};
  }
};

// A row, or a part of its sum: a lane holds kDims dimensions, kVector neighbours at a time.
template <int D>
struct RowSum {
  static constexpr int kDims = D / kWarpSize;
  static constexpr int kVector = kCombineVector<D>;
  static constexpr int kBatch =
      D <= 128 ? 9 : 4;  // partials loaded at once; 16 x 9 >= the SMs of an H200
  struct alignas(4 * kVector) Vector {
    float x[kVector];
  };
  float o[kDims];
  float m, l;

  __device__ __forceinline__ static int dim(int e) {
    return (e / kVector * kWarpSize + static_cast<int>(threadIdx.x % kWarpSize)) * kVector +
           e % kVector;
  }

  __device__ __forceinline__ static Vector load(const float* row, int v) {
    return *reinterpret_cast<const Vector*>(row + dim(v * kVector));
  }

  __device__ __forceinline__ void clear() {
    m = kNoReference;
    l = 0.f;
#pragma unroll
    for (int e = 0; e < kDims; ++e) o[e] = 0.f;
  }

  // The partials of CTAs begin + part, begin + part + parts, ...  All loads of a batch are under
  // way before the first is used; lane b has the stats of partial b.
  __device__ __forceinline__ void add(const PartialTerms<D>& terms, CtaRange ctas, int part) {
    const uint32_t lane = threadIdx.x % kWarpSize;
    const uint32_t cta = ctas.begin + part;
    const uint8_t* stats = terms.stats + uint64_t{cta} * terms.stats_pitch;
    const uint8_t* out = terms.out + uint64_t{cta} * terms.out_pitch;
    int left = (ctas.end - static_cast<int>(cta) + terms.parts() - 1) >> terms.log_parts;
#pragma unroll 1
    for (; left > 0; left -= kBatch) {
      float2 stat = make_float2(kNoReference, 0.f);
      if (lane < kBatch && static_cast<int>(lane) < left) {
        stat = *reinterpret_cast<const float2*>(stats + uint64_t{lane} * terms.stats_step());
      }
      Vector value[kBatch][kDims / kVector];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const auto* from =
            reinterpret_cast<const Vector*>(out + static_cast<uint64_t>(b) * terms.out_step());
#pragma unroll
        for (int v = 0; v < kDims / kVector; ++v) {
          value[b][v] = {};
          if (b < left) value[b][v] = from[v * kWarpSize];
        }
      }
      // What has been summed so far is one more term.
      if (lane == kBatch) stat = make_float2(m, l);
      const TermWeights weights = TermWeights::make(stat.x, stat.y);
      m = weights.m;
      l = weights.l;
      const float old = weights.of(kBatch);
#pragma unroll
      for (int e = 0; e < kDims; ++e) o[e] *= old;
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const float weight = weights.of(b);
#pragma unroll
        for (int e = 0; e < kDims; ++e) o[e] += value[b][e / kVector].x[e % kVector] * weight;
      }
      stats += kBatch * uint64_t{terms.stats_step()};
      out += kBatch * uint64_t{terms.out_step()};
    }
  }

  __device__ __forceinline__ void scale(float factor) {
    l *= factor;
#pragma unroll
    for (int e = 0; e < kDims; ++e) o[e] *= factor;
  }

  // To the warp's place in shared memory.
  __device__ __forceinline__ void put(float* rows, CombineShared& shared) const {
    const int warp = threadIdx.x / kWarpSize;
#pragma unroll
    for (int e = 0; e < kDims; ++e) rows[warp * CombineConfig<D>::kRowPitch + dim(e)] = o[e];
    if (threadIdx.x % kWarpSize == 0) {
      shared.m[warp] = m;
      shared.l[warp] = l;
    }
  }

  // The sum of what this warp and the `parts` - 1 after it have put there.
  __device__ __forceinline__ void sum_parts(const float* rows, const CombineShared& shared,
                                            int parts) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const bool exists = lane < parts;
    const TermWeights weights = TermWeights::make(exists ? shared.m[warp + lane] : kNoReference,
                                                  exists ? shared.l[warp + lane] : 0.f);
    clear();
    m = weights.m;
    l = weights.l;
    const float* row = rows + warp * CombineConfig<D>::kRowPitch;
#pragma unroll 4
    for (int i = 0; i < parts; ++i) {
      const float weight = weights.of(i);
#pragma unroll
      for (int e = 0; e < kDims; ++e) o[e] += row[dim(e)] * weight;
      row += CombineConfig<D>::kRowPitch;
    }
  }

  // Sink, LSE, division by the denominator.
  __device__ __forceinline__ void finish(const AttentionParams& p, const CombineRow& row) {
    if (p.sinks != nullptr) {  // one more term of the denominator, with no value
      const float top = fmaxf(m, row.sink);
      scale(ptx::exp2_approx(m - top));
      l += ptx::exp2_approx(row.sink - top);
      m = top;
    }
    if (p.lse != nullptr && row.exists && threadIdx.x % kWarpSize == 0) {
      p.lse[static_cast<int64_t>(row.head) * p.num_tokens + row.token] =
          l == 0.f ? -INFINITY : (m + log2f(l)) * 0.6931471805599453f;
    }
    scale(l == 0.f ? 0.f : __frcp_rn(l));  // NaN goes through
  }

  // Times a Hadamard rotation c H diag(signs), whose row 0, c signs, is given.
  __device__ __forceinline__ void transform(const Vector (&row0)[kDims / kVector]) {
#pragma unroll
    for (int step = 1; step < kDims; step *= 2) {
#pragma unroll
      for (int e = 0; e < kDims; ++e) {
        if (e & step) continue;
        const float sum = o[e] + o[e + step];
        o[e + step] = o[e] - o[e + step];
        o[e] = sum;
      }
    }
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      const float sign = threadIdx.x & step ? -1.f : 1.f;
#pragma unroll
      for (int e = 0; e < kDims; ++e) {
        o[e] = fmaf(sign, o[e], __shfl_xor_sync(kFullWarp, o[e], step));
      }
    }
#pragma unroll
    for (int v = 0; v < kDims / kVector; ++v) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) o[v * kVector + e] *= row0[v].x[e];
    }
  }

  __device__ __forceinline__ void store(const AttentionParams& p, int64_t offset,
                                        bool aligned) const {
    const auto pack = [&](float x, float y) {
      return p.dtype == DType::kBFloat16 ? ptx::pack_bf16x2(x, y) : ptx::pack_f16x2(x, y);
    };
#pragma unroll
    for (int v = 0; v < kDims; v += kVector) {
      uint16_t* dst = static_cast<uint16_t*>(p.out) + offset + dim(v);
      if constexpr (kVector == 1) {
        *dst = static_cast<uint16_t>(pack(o[v], 0.f));
      } else {
        uint32_t words[kVector / 2];
#pragma unroll
        for (int w = 0; w < kVector / 2; ++w) words[w] = pack(o[v + 2 * w], o[v + 2 * w + 1]);
        if (aligned && kVector == 4) {
          *reinterpret_cast<uint2*>(dst) = make_uint2(words[0], words[kVector / 2 - 1]);
        } else if (aligned) {
          *reinterpret_cast<uint32_t*>(dst) = words[0];
        } else {
#pragma unroll
          for (int e = 0; e < kVector; ++e) {
            dst[e] = static_cast<uint16_t>(words[e / 2] >> (16 * (e % 2)));
          }
        }
      }
    }
  }

  // Whether rows of out start at multiples of what store() writes at once.
  __device__ __forceinline__ static bool is_aligned(const AttentionParams& p) {
    const uint64_t bits = reinterpret_cast<uintptr_t>(p.out) |
                          static_cast<uint64_t>(p.out_token_stride * 2) |
                          static_cast<uint64_t>(p.out_head_stride * 2);
    return bits % (2 * kVector) == 0;
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
  for (int tile = threadIdx.x / kWarpSize; tile < D / 8; tile += kCombineWarps) {
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
  const int warp = threadIdx.x / kWarpSize;
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
  bool dense = p.out_rotation != nullptr;
  float corner = 0.f;
  if (Config::kMayBeHadamard && dense) {
#pragma unroll
    for (int v = 0; v < Sum::kDims / Sum::kVector; ++v) row0[v] = Sum::load(p.out_rotation, v);
    corner = fabsf(p.out_rotation[0]);
  }
  const auto* workspace = static_cast<const uint8_t*>(p.workspace);
  const auto range_of = [&](const CombineRow& r) {
    return reinterpret_cast<const CtaRange*>(
        workspace + ptx::opaque_offset(plan.unit_ctas + r.unit * int64_t{sizeof(CtaRange)}));
  };
  const CtaRange* range = range_of(row);
  PartialTerms<D> terms = PartialTerms<D>::make(p, plan, row, log_parts);
  lines.keep(tile_rows.lines);
  ptx::wait_for_predecessor();  // every partial result is written
  CtaRange ctas = row.exists ? *range : CtaRange{0, 0};
  if (Config::kMayBeHadamard && dense) {
    dense = *reinterpret_cast<const int32_t*>(workspace + plan.dense_rotation) != 0 ||
            !(corner > 0.f && corner < INFINITY);
  }
  bool fetched = false;
#pragma unroll 1
  while (true) {
    Sum sum;
    sum.clear();
    sum.add(terms, ctas, part);
    if (dense && !fetched) fetch_rotation<D>(p, shared);
    fetched = true;
    if (parts > 1) {
      sum.put(rows, tile_rows);
      __syncthreads();  // the parts are there
      if (leads) sum.sum_parts(rows, tile_rows, parts);
    }
    if (leads) {
      sum.finish(p, row);
      if (row.surplus > 0) write_surplus<D>(p, row);
    }
    const int64_t offset =
        row.exists ? row.token * p.out_token_stride + row.head * p.out_head_stride : -1;
    if (dense) {
      __syncwarp();  // the warp's part has been read
      if (leads) sum.put(rows, tile_rows);
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
    range = range_of(row);
    ctas = row.exists ? *range : CtaRange{0, 0};
    terms = PartialTerms<D>::make(p, plan, row, log_parts);
  }
}

}  // namespace tq4
