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

enum class RotationPart { kHigh, kLow };

// An entry's magnitude, which brings R's entries near one; any will do, unless it is tiny.
__device__ __forceinline__ float rotation_unit(const float* rotation) {
  const float entry = fabsf(rotation[0]);
  return entry > 1e-3f && entry < 1e3f ? entry : 1.f;
}

// Copies one panel to shared memory as fp16; row_of(local row) names the row of R.
template <int D, int kThreads, typename RowOf>
__device__ __forceinline__ void load_rotation_panel(uint32_t smem,
                                                    const float* __restrict__ rotation,
                                                    RowOf row_of) {
  constexpr int kChunks = D / 8;
  // Volatile where it is: what follows from it is not to be kept in registers since the rotation of
  // q (which spills at D = 128; with several panels it is the other way round).
  const int first = RotationPanel<D>::kPanels == 1 ? ptx::thread_idx_volatile() : threadIdx.x;
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

// The same of one part of R / unit.  Returns whether this thread's entries have a low part.
template <int D, int kThreads, RotationPart kPart, typename RowOf>
__device__ __forceinline__ bool load_rotation_part(uint32_t smem,
                                                   const float* __restrict__ rotation, float unit,
                                                   RowOf row_of) {
  constexpr int kChunks = D / 8;
  bool has_low = false;
#pragma unroll 1
  for (int i = threadIdx.x; i < RotationPanel<D>::kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const float* src = rotation + row_of(row) * D + chunk * 8;
    uint32_t packed[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      float2 v = *reinterpret_cast<const float2*>(src + 2 * w);
      v.x = __fdividef(v.x, unit);
      v.y = __fdividef(v.y, unit);
      packed[w] = ptx::pack_f16x2(v.x, v.y);
      const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&packed[w]));
      has_low |= v.x != high.x || v.y != high.y;
      if constexpr (kPart == RotationPart::kLow)
        packed[w] = ptx::pack_f16x2(v.x - high.x, v.y - high.y);
    }
    ptx::st_shared_v4(smem + HalfTile<D>::offset(row, chunk), packed[0], packed[1], packed[2],
                      packed[3]);
  }
  return has_low;
}

// 8 consecutive 16-bit values of a row of q, as raw words.  Rows are 16-byte aligned
// (launch_prefill): a second way for others would make every load wait for the one before, as the
// ways join.
__device__ __forceinline__ uint4 load_raw8(const uint16_t* p) {
  return __ldg(reinterpret_cast<const uint4*>(p));
}

__device__ __forceinline__ float2 unpack_pair(uint32_t word, DType dtype) {
  if (dtype == DType::kBFloat16) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  }
  const __half2 h = *reinterpret_cast<const __half2*>(&word);
  return __half22float2(h);
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

// One row of q seen by a lane of quad position t: chunk kb = dims 32 kb + 8 t .. + 7.
struct QueryRow {
  const uint16_t* p;  // null: a padding row, read as zeros
  float scale;        // bf16 only
};

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

template <int D>
__device__ __forceinline__ void find_row_scale(QueryRow& row, DType dtype) {
  row.scale = 1.f;
  if (dtype != DType::kBFloat16) return;
  float largest = 0.f;
  if (row.p != nullptr) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int kb = 0; kb < D / 32; ++kb) {
      largest = fmaxf(largest, largest_of8(load_raw8(row.p + 32 * kb + 8 * t), dtype));
    }
  }
  row.scale = fp16_row_scale(quad_max_nan(largest));
}

// 8 packed values as 4 words of fp16; bf16 ones times `scale`.
__device__ __forceinline__ void to_fp16(const uint4& raw, float scale, DType dtype,
                                        uint32_t (&out)[4]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (dtype == DType::kBFloat16) {
      const float2 v = unpack_pair(words[i], dtype);
      out[i] = ptx::pack_f16x2(v.x * scale, v.y * scale);
    } else {
      out[i] = words[i];
    }
  }
}

// Dims `offset` .. + 7 of the row as 4 packed fp16 words.
__device__ __forceinline__ void load_row_fp16(const QueryRow& row, int offset, DType dtype,
                                              uint32_t (&out)[4]) {
  uint4 raw = make_uint4(0, 0, 0, 0);
  if (row.p != nullptr) raw = load_raw8(row.p + offset);
  to_fp16(raw, row.scale, dtype, out);
}

}  // namespace tq4
