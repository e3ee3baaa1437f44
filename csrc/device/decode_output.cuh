// Rows of decode's output: where they are, sums of partial results, what is done to a sum before it
// is written.  A warp has a row, and its lanes D / 32 dimensions each.
#pragma once
#include <cstdint>

#include "../params.h"
#include "../ptx/arith.cuh"
#include "../ptx/opaque.cuh"
#include "common.cuh"
#include "decode_plan.h"
#include "decode_step.cuh"
#include "hadamard.cuh"

namespace tq4 {

// A row of the output.
struct CombineRow {
  bool exists;
  int surplus;  // query tokens of the sequence beyond max_query_len, reported by its last row
  int64_t token;
  int head;
  int64_t unit;         // (sequence, chunk of KV heads, chunk of rows)
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
  const int of_head = query * plan.group + (r.head - kv_head * plan.group);
  const int row_chunk = static_cast<int>(plan.row_divider.quotient(of_head));
  r.unit = static_cast<int64_t>(seq) * plan.num_chunks + chunk * plan.row_chunks + row_chunk;
  r.row_of_unit =
      static_cast<int64_t>(kv_head - chunk * plan.heads_per_chunk) * plan.rows_per_chunk + of_head -
      row_chunk * plan.rows_per_chunk;
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
    const uint32_t rows = plan.heads_per_chunk * plan.rows_per_chunk;
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

  // The partials of CTAs begin + part, begin + part + parts, ...  All loads of kBatch of them are
  // under way before the first is used; lane b has the stats of partial b.
  template <int kBatch>
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

  // Of `count` <= 32 terms: lane i says (m, l) of term i, stat(i), and all of them what their
  // dimensions of term i are, value(i, v).
  template <typename Stat, typename Value>
  __device__ __forceinline__ void sum_terms(int count, Stat&& stat, Value&& value) {
    const int lane = threadIdx.x % kWarpSize;
    float2 own = make_float2(kNoReference, 0.f);
    if (lane < count) own = stat(lane);
    const TermWeights weights = TermWeights::make(own.x, own.y);
    clear();
    m = weights.m;
    l = weights.l;
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const float weight = weights.of(i);
#pragma unroll
      for (int v = 0; v < kDims / kVector; ++v) {
        const Vector term = value(i, v);
#pragma unroll
        for (int e = 0; e < kVector; ++e) o[v * kVector + e] += term.x[e] * weight;
      }
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

  // Row 0 of a Hadamard rotation c H diag(signs), of its signs.
  __device__ __forceinline__ static void load_signs(const float* signs,
                                                    Vector (&row0)[kDims / kVector]) {
#pragma unroll
    for (int v = 0; v < kDims / kVector; ++v) {
      row0[v] = load(signs, v);
#pragma unroll
      for (int e = 0; e < kVector; ++e) row0[v].x[e] *= kHadamardUnit<D>;
    }
  }

  // Times such a rotation.
  __device__ __forceinline__ void transform(const Vector (&row0)[kDims / kVector]) {
    transform_hadamard(o);
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

}  // namespace tq4
