// Queries as the main kernels of decode take them: which rows there are, and how a rotated row is
// written.
//
//   INT8   q_rot / s = q8 + r8 / 256      s = max|q_rot| / 127 of the row
//   fp16   q_rot / s = q16 + r16          s = the power of two that brings it into fp16's range
//   scale = s * sm_scale * log2 e * k_code_scale, or / softcap instead of * log2 e
#pragma once
#include <cstdint>

#include "../params.h"
#include "../ptx/arith.cuh"
#include "../ptx/prefetch.cuh"
#include "common.cuh"
#include "decode_plan.h"
#include "hadamard.cuh"
#include "query_recipe.cuh"
#include "rotate.cuh"

namespace tq4 {

// The token whose queries lie at place `place` of the workspace (DecodePlan::query_rows), -1 for a
// place that is not used.
__device__ __forceinline__ int query_token(const AttentionParams& p, const DecodeBatch& batch,
                                           int place) {
  if (p.short_query_len == 0) return place;
  const uint32_t most = p.short_query_len;  // split_queries sees to it that 32 bits suffice
  const int seq = static_cast<int>(static_cast<uint32_t>(place) / most);
  const int query = static_cast<int>(static_cast<uint32_t>(place) - seq * most);
  return query < batch.num_queries(seq) ? batch.query_begin(seq) + query : -1;
}

// Dims `at`, `at` + 1 of one row, whose largest magnitude is known: codes, residuals.
__device__ __forceinline__ void write_query(DecodeMode mode, uint8_t* codes, uint8_t* residuals,
                                            int64_t at, float largest, float x, float y) {
  if (has_int8_query(mode)) {
    const float unit = query_unit(largest);
    const float inverse = query_inverse(largest, unit);
    const float v[2] = {x, y};
    uint32_t code = 0, rest = 0;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float quotient = query_quotient(v[e], unit, inverse);
      const int rounded = max(-127, min(127, __float2int_rn(quotient)));
      const int left = max(-127, min(127, __float2int_rn((quotient - rounded) * 256.f)));
      const int shift = 8 * swapped_dim(e);
      code |= static_cast<uint32_t>(rounded & 0xff) << shift;
      rest |= static_cast<uint32_t>(left & 0xff) << shift;
    }
    *reinterpret_cast<uint16_t*>(codes + at) = static_cast<uint16_t>(code);
    if (decode_octets(mode) == 1) {
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

// Log2 units of a score, or units of the soft cap, of one unit of q . k.
__device__ __forceinline__ float unit_scale(const AttentionParams& p, const DecodePlan& plan) {
  // Both are computed: the reciprocal of zero would take a slow path.
  const float reciprocal = 1.f / (p.softcap != 0.f ? p.softcap : 1.f);
  return p.sm_scale * (p.softcap != 0.f ? reciprocal : 1.4426950408889634f) *
         (has_given_codes(plan.mode) ? p.k_code_scale : 1.f);
}

// The value of one unit of a row's codes.  A NaN in the row goes into it, and so into every score.
__device__ __forceinline__ float row_unit(DecodeMode mode, float largest) {
  if (largest != largest) return largest;
  return has_int8_query(mode) ? query_unit(largest) : __fdiv_rn(1.f, fp16_row_scale(largest));
}

// What the main kernel writes only where it finds something: units without tiles keep an empty
// range.
__device__ __forceinline__ void clear_findings(const AttentionParams& p, const DecodePlan& plan) {
  auto* workspace = static_cast<uint8_t*>(p.workspace);
  auto* ranges = reinterpret_cast<CtaRange*>(workspace + plan.unit_ctas);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
#pragma unroll 1
  for (int64_t i = first; i < static_cast<int64_t>(p.num_seqs) * plan.num_chunks; i += step) {
    ranges[i] = {0, 0};
  }
  if (first == 0) *reinterpret_cast<int32_t*>(workspace + plan.dense_rotation) = 0;
}

// What the main kernel's producers ask for first, one thing after the other, into L2 meanwhile.
__device__ __forceinline__ void prefetch_batch(const AttentionParams& p) {
  constexpr int kLine = 32;  // words
  const int64_t word = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kLine;
  if (word < p.num_seqs) ptx::prefetch_l2(p.seq_lens + word);
  if (word < (p.num_seqs - 1) * p.block_table_stride + p.max_blocks) {
    ptx::prefetch_l2(p.block_table + word);
  }
}

// A row of q that a warp holds, a lane the D / 32 neighbouring dims from lane * D / 32 on.
template <int D>
struct QueryRow {
  static constexpr int kDims = D / kWarpSize, kWords = kDims / 2;
  uint32_t words[kWords];  // as loaded
  float x[kDims];          // from unpack() on

  __device__ __forceinline__ void load(const uint16_t* row, bool aligned) {
    const uint16_t* own = row + threadIdx.x % kWarpSize * kDims;
    if (aligned) {
      if constexpr (kWords == 1) {
        words[0] = *reinterpret_cast<const uint32_t*>(own);
      } else {
#pragma unroll
        for (int i = 0; i < kWords; i += 2) {
          const uint2 pair = *reinterpret_cast<const uint2*>(own + 2 * i);
          words[i] = pair.x, words[i + 1] = pair.y;
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        words[i] = own[2 * i] | static_cast<uint32_t>(own[2 * i + 1]) << 16;
      }
    }
  }

  __device__ __forceinline__ void unpack(DType dtype) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const float2 pair = unpack_pair(words[i], dtype);
      x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
  }

  // Whether load() may take all of a lane's values at once, for any row.
  __device__ __forceinline__ static bool is_aligned(const AttentionParams& p) {
    const uint64_t bits = reinterpret_cast<uintptr_t>(p.q) |
                          static_cast<uint64_t>(p.q_token_stride * 2) |
                          static_cast<uint64_t>(p.q_head_stride * 2);
    return bits % (D == 64 ? 4 : 8) == 0;
  }

  // The lane's signs of a Hadamard rotation, or ones where there is none.
  __device__ __forceinline__ static void load_signs(const float* signs, float (&own)[kDims]) {
#pragma unroll
    for (int i = 0; i < kDims; ++i) own[i] = 1.f;
    if (signs == nullptr) return;
#pragma unroll
    for (int i = 0; i < kDims; i += 2) {
      const float2 pair =
          *reinterpret_cast<const float2*>(signs + threadIdx.x % kWarpSize * kDims + i);
      own[i] = pair.x, own[i + 1] = pair.y;
    }
  }

  // Times R^T, R = H diag(signs) / sqrt(D).
  __device__ __forceinline__ void rotate(const float (&signs)[kDims]) {
#pragma unroll
    for (int i = 0; i < kDims; ++i) x[i] *= signs[i];
    transform_hadamard(x);
#pragma unroll
    for (int i = 0; i < kDims; ++i) x[i] *= kHadamardUnit<D>;
  }

  // Largest magnitude of the row.  As bits, magnitudes are ordered and NaN is above them all.
  __device__ __forceinline__ float largest() const {
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < kDims; ++i) most = max(most, __float_as_uint(fabsf(x[i])));
    return __uint_as_float(__reduce_max_sync(kFullWarp, most));
  }

  // To row `row` of the two arrays; returns the value of one unit of its codes.
  __device__ __forceinline__ float write(DecodeMode mode, uint8_t* codes, uint8_t* residuals,
                                         int64_t row) const {
    const float most = largest();
    const int64_t at = row * D + threadIdx.x % kWarpSize * kDims;
    if (has_int8_query(mode)) return write_int8(mode, codes + at, residuals + at, most);
#pragma unroll
    for (int i = 0; i < kDims; i += 2) {
      write_query(mode, codes, residuals, at + i, most, x[i], x[i + 1]);
    }
    return row_unit(mode, most);
  }

 private:
  // What write_query and row_unit do, with one division a row and no conversions: adding 3 * 2^22
  // leaves a rounded number in the low byte.
  __device__ __forceinline__ float write_int8(DecodeMode mode, uint8_t* codes, uint8_t* residuals,
                                              float most) const {
    constexpr float kBias = 12582912.f, kMostLeft = 127.f / 256.f;
    const float unit = query_unit(most), inverse = query_inverse(most, unit);
    uint32_t code[kDims], rest[kDims];
#pragma unroll
    for (int i = 0; i < kDims; ++i) {
      const float quotient = query_quotient(x[i], unit, inverse);
      const float rounded = quotient + kBias;
      const float left = fminf(fmaxf(quotient - (rounded - kBias), -kMostLeft), kMostLeft);
      code[i] = __float_as_uint(rounded);
      rest[i] = __float_as_uint(fmaf(left, 256.f, kBias));
    }
    store_low_bytes(codes, code);
    if (decode_octets(mode) == 1) store_low_bytes(residuals, rest);
    return fmaf(unit, 0.f, unit);  // infinity has no codes: NaN
  }

  // Bytes in the order of swapped_dim.
  __device__ __forceinline__ static void store_low_bytes(uint8_t* to,
                                                         const uint32_t (&words)[kDims]) {
    const auto pair = [&](int i) { return ptx::prmt(words[i + 1], words[i], 0x0040); };
    if constexpr (kDims == 2) {
      *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(pair(0));
    } else {
#pragma unroll
      for (int i = 0; i < kDims; i += 4) {
        *reinterpret_cast<uint32_t*>(to + i) = ptx::prmt(pair(i), pair(i + 2), 0x5410);
      }
    }
  }
};

}  // namespace tq4
