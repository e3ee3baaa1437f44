// The rotation matrix in shared memory, and rows of q as fp16 A fragments.
//
// q_rot = q @ R^T and out = O @ R are small dense products on the tensor cores: fp16 operands,
// fp32 accumulation.  For the output, R is rounded to fp16 (relative error 2^-12 an entry, random
// in sign: about 1.4e-4 of a row).  For q that is not enough, as rows with an outlier turn it into
// other int8 codes: R = unit * (high + low), two products.  A Hadamard matrix divided by its own
// entry is +-1: no low part, and the second product is skipped.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../params.h"
#include "../ptx/arith.cuh"
#include "../ptx/mma.cuh"
#include "../ptx/smem.cuh"
#include "swizzle.cuh"

namespace tq4 {

// R is processed in panels of at most kPanelRows rows so that D = 256 fits beside the pipeline.
template <int D>
struct RotationPanel {
  static constexpr int kSteps = D <= 128 ? D / 32 : 2;  // groups of 8 dims in each quarter
  static constexpr int kRows = 32 * kSteps;
  static constexpr int kPanels = D / kRows;
  static constexpr int kBytes = kRows * HalfTile<D>::kRowBytes;

  // Row of R behind local row `row` of panel `panel`, for q @ R^T: 8 * kSteps dims of each quarter
  // of the head dimension, so that a lane ends up with dims of its own quarter only.
  TQ4_HOST_DEVICE static constexpr int by_quarter(int panel, int row) {
    return row / (8 * kSteps) * (D / 4) + panel * 8 * kSteps + row % (8 * kSteps);
  }
};

// An entry's magnitude, which brings R's entries near one; any will do, unless it is tiny.  No
// matrix: 1.
__device__ __forceinline__ float rotation_unit(const float* rotation) {
  if (rotation == nullptr) return 1.f;
  const float entry = fabsf(rotation[0]);
  return entry > 1e-3f && entry < 1e3f ? entry : 1.f;
}

// What R's entries are multiplied by instead of a division.  Entries of +-unit, as those of a
// Hadamard matrix, become exactly +-1: of D = 128 the rounded reciprocal alone would miss it by
// 2^-24, the next number does not.
__device__ __forceinline__ float rotation_inverse(float unit) {
  const float inverse = __frcp_rn(unit);
  return unit * inverse < 1.f ? __uint_as_float(__float_as_uint(inverse) + 1) : inverse;
}

__device__ __forceinline__ float2 unpack_pair(uint32_t word, DType dtype) {
  if (dtype == DType::kBFloat16) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  }
  const __half2 h = *reinterpret_cast<const __half2*>(&word);
  return __half22float2(h);
}

// Copies one panel to shared memory as fp16; row_of(local row) names the row of R.
template <int D, int kThreads, typename RowOf>
__device__ __forceinline__ void load_rotation_panel(uint32_t smem,
                                                    const float* __restrict__ rotation,
                                                    RowOf row_of) {
  constexpr int kChunks = D / 8;
  // Volatile: what follows from it is not to be kept in registers since the rotation of q, nor
  // through the products of the panel before.
  const int first = ptx::thread_idx_volatile();
  for (int i = first; i < RotationPanel<D>::kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const float* src = rotation + row_of(row) * D + chunk * 8;
    const float4 a = *reinterpret_cast<const float4*>(src);
    const float4 b = *reinterpret_cast<const float4*>(src + 4);
    ptx::st_shared_v4(smem + HalfTile<D>::offset(row, chunk), ptx::pack_f16x2(a.x, a.y),
                      ptx::pack_f16x2(a.z, a.w), ptx::pack_f16x2(b.x, b.y),
                      ptx::pack_f16x2(b.z, b.w));
  }
}

// Some of a thread's chunks of one panel, all in flight together.
template <int D, int kThreads, int kBatch>
struct RotationBatch {
  static constexpr int kChunks = D / 8, kTotal = RotationPanel<D>::kRows * kChunks;
  static constexpr int kStep = kBatch * kThreads;
  float4 v[kBatch][2];

  // Beyond the end, the last chunk once more.
  __device__ __forceinline__ static int index(int first, int i) {
    return min(first + i * kThreads, kTotal - 1);
  }

  template <typename RowOf>
  __device__ __forceinline__ void load(const float* __restrict__ rotation, int first,
                                       RowOf row_of) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = index(first, i);
      const float* src = rotation + row_of(at / kChunks) * D + at % kChunks * 8;
      v[i][0] = *reinterpret_cast<const float4*>(src);
      v[i][1] = *reinterpret_cast<const float4*>(src + 4);
    }
  }

  // The high or the low part of R / unit as fp16 to shared memory.  Returns whether there is a low
  // part.
  __device__ __forceinline__ bool store(uint32_t smem, int first, float unit, bool low) const {
    const float inverse = rotation_inverse(unit);
    bool has_low = false;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = index(first, i);
      const float entry[8] = {v[i][0].x, v[i][0].y, v[i][0].z, v[i][0].w,
                              v[i][1].x, v[i][1].y, v[i][1].z, v[i][1].w};
      uint32_t packed[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float x = entry[2 * w] * inverse, y = entry[2 * w + 1] * inverse;
        const uint32_t high = ptx::pack_f16x2(x, y);
        const float2 rounded = unpack_pair(high, DType::kFloat16);
        has_low |= x != rounded.x || y != rounded.y;
        packed[w] = low ? ptx::pack_f16x2(x - rounded.x, y - rounded.y) : high;
      }
      ptx::st_shared_v4(smem + HalfTile<D>::offset(at / kChunks, at % kChunks), packed[0],
                        packed[1], packed[2], packed[3]);
    }
    return has_low;
  }
};

// One part of a panel by the whole CTA.  Returns whether this thread's entries have a low part.
template <int D, int kThreads, int kBatch, typename RowOf>
__device__ __forceinline__ bool load_rotation_part(uint32_t smem, const float* rotation, float unit,
                                                   bool low, RowOf row_of) {
  using Batch = RotationBatch<D, kThreads, kBatch>;
  bool has_low = false;
#pragma unroll 1
  for (int first = threadIdx.x; first < Batch::kTotal; first += Batch::kStep) {
    Batch batch;
    batch.load(rotation, first, row_of);
    has_low |= batch.store(smem, first, unit, low);
  }
  return has_low;
}

// 8 consecutive 16-bit values of a row of q, as raw words.  Rows are 16-byte aligned
// (launch_prefill): a second way for others would make every load wait for the one before, as the
// ways join.
__device__ __forceinline__ uint4 load_raw8(const uint16_t* p) {
  return __ldg(reinterpret_cast<const uint4*>(p));
}

// Quad (4 lanes of one row) maximum that keeps NaN.
__device__ __forceinline__ float quad_max_nan(float x) {
  x = ptx::max_nan(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return ptx::max_nan(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Power of two that brings a bf16 row with the given largest magnitude into fp16's range: bf16 has
// fewer mantissa bits than fp16, so the scaled values are exact down to 2^-28 of the largest.
__device__ __forceinline__ float fp16_row_scale(float largest) {
  if (!(largest > 0.f) || !(largest < INFINITY)) return 1.f;
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 127;
  return ldexpf(1.f, max(-120, min(120, 14 - exponent)));
}

// Largest magnitude of 8 packed values.
__device__ __forceinline__ float largest_of8(const uint4& raw, DType dtype) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  float largest = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 v = unpack_pair(words[i], dtype);
    largest = fmaxf(largest, fmaxf(fabsf(v.x), fabsf(v.y)));
  }
  return largest;
}

// 8 packed values as fp16; bf16 ones times `scale`.
__device__ __forceinline__ uint4 to_fp16(const uint4& raw, float scale, DType dtype) {
  if (dtype != DType::kBFloat16) return raw;
  uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (uint32_t& word : words) {
    const float2 v = unpack_pair(word, dtype);
    word = ptx::pack_f16x2(v.x * scale, v.y * scale);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace tq4
