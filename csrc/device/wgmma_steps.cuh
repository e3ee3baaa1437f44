// Steps of the sm_90a prefill kernel: products of one tile, scores, softmax.
#pragma once
#include <cmath>
#include <cstdint>

#include "../ptx/arith.cuh"
#include "../ptx/smem.cuh"
#include "../ptx/wgmma.cuh"
#include "prefill_config.cuh"
#include "wgmma_image.cuh"

namespace tq4::sm90 {

using sm80::kLazyRescale;
using sm80::kLn2;
using sm80::kLog2e;
using sm80::kMinusHuge;

// A K-major operand in shared memory, and where its k step (32 bytes) lies.
template <typename Image>
__device__ __forceinline__ uint64_t key_descriptor(uint32_t address) {
  constexpr ptx::WgmmaSwizzle kSwizzle =
      Image::kRowBytes == 64 ? ptx::WgmmaSwizzle::k64B : ptx::WgmmaSwizzle::k128B;
  return ptx::wgmma_descriptor(address, 16, 8 * Image::kRowBytes, kSwizzle);
}

template <typename Image>
TQ4_HOST_DEVICE constexpr int key_step(int step) {
  return step / 4 * Image::kPanelBytes + step % 4 * 32;
}

// Issues S = Q K^T of a warpgroup's 64 rows and one tile.
template <int D, int kRegs>
__device__ __forceinline__ void issue_qk(uint32_t queries, uint32_t keys, int32_t (&s)[kRegs]) {
  using Query = typename QueryImage<D>::Codes;
  using Key = typename WgmmaImage<D>::Key;
  const uint64_t a = key_descriptor<Query>(queries), b = key_descriptor<Key>(keys);
#pragma unroll
  for (int step = 0; step < D / 32; ++step) {
    ptx::wgmma_s8(s, ptx::wgmma_advance(a, key_step<Query>(step)),
                  ptx::wgmma_advance(b, key_step<Key>(step)), step > 0);
  }
  ptx::wgmma_commit();
}

// Issues O += A B of `kSteps` k steps of 16; A in registers, B rows of `Image::Value`.
template <typename Value, int kSteps, int kRegs>
__device__ __forceinline__ void issue_values(const uint32_t (&a)[kSteps][4], uint32_t rows,
                                             float (&o)[kRegs], bool accumulate) {
  const uint64_t b =
      ptx::wgmma_descriptor(rows, Value::kPanelBytes, 8 * 128, ptx::WgmmaSwizzle::k128B);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    ptx::wgmma_f16<true>(o, a[step], ptx::wgmma_advance(b, step * 16 * 128),
                         step > 0 || accumulate);
  }
  ptx::wgmma_commit();
}

// Accumulators as the A operand of the next product: n-tiles 2 k, 2 k + 1 are k step k.
template <int kRegs>
__device__ __forceinline__ void pack_operand(const float (&c)[kRegs], uint32_t (&a)[kRegs / 8][4]) {
#pragma unroll
  for (int k = 0; k < kRegs / 8; ++k) {
    a[k][0] = ptx::pack_f16x2(c[8 * k], c[8 * k + 1]);
    a[k][1] = ptx::pack_f16x2(c[8 * k + 2], c[8 * k + 3]);
    a[k][2] = ptx::pack_f16x2(c[8 * k + 4], c[8 * k + 5]);
    a[k][3] = ptx::pack_f16x2(c[8 * k + 6], c[8 * k + 7]);
  }
}

// What a lane knows of its two rows, g and g + 8 of its warp.
struct LaneState {
  float scale[2];    // log2 units of one unit of norm * (q8 . k8)
  float m[2];        // running maximum, log2 units
  float l[2];        // this lane's part of the denominator
  int lo[2], hi[2];  // visible keys: lo <= key <= hi
};

// Integer products to scores in units of LaneState::scale.
template <int kRegs>
__device__ __forceinline__ void scale_scores(uint32_t norms, const int32_t (&acc)[kRegs],
                                             float (&x)[kRegs]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < kRegs / 4; ++j) {
    const uint2 pair = ptx::ld_shared_v2(norms + 32 * j + 8 * t);
    const float n0 = __uint_as_float(pair.x), n1 = __uint_as_float(pair.y);
    x[4 * j] = static_cast<float>(acc[4 * j]) * n0;
    x[4 * j + 1] = static_cast<float>(acc[4 * j + 1]) * n1;
    x[4 * j + 2] = static_cast<float>(acc[4 * j + 2]) * n0;
    x[4 * j + 3] = static_cast<float>(acc[4 * j + 3]) * n1;
  }
}

// x -> cap * tanh(score / cap), back in units of x.
template <int kRegs>
__device__ __forceinline__ void cap_scores(float softcap, const LaneState& rows,
                                           float (&x)[kRegs]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float unit = __fdividef(rows.scale[i], softcap * kLog2e);
    const float inverse = __fdividef(softcap * kLog2e, rows.scale[i]);
#pragma unroll
    for (int j = 0; j < kRegs / 4; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& v = x[4 * j + 2 * i + e];
        v = ptx::tanh_accurate(v * unit) * inverse;
      }
    }
  }
}

template <int kRegs>
__device__ __forceinline__ void mask_scores(int first_key, const LaneState& rows,
                                            float (&x)[kRegs]) {
  const int first = first_key + 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int j = 0; j < kRegs / 4; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int key = first + 8 * j + e % 2;
      if (key > rows.hi[e / 2] || key < rows.lo[e / 2]) x[4 * j + e] = -INFINITY;
    }
  }
}

// x -> 2^(x scale - m), summed into l.  Returns whether a maximum of the warp's rows has moved;
// then O is to be multiplied by `alpha`.
template <int kRegs>
__device__ __forceinline__ bool softmax(float (&x)[kRegs], LaneState& rows, float (&alpha)[2]) {
  float top[2];
  bool moved = false;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < kRegs / 4; ++j) {
      largest = fmaxf(largest, fmaxf(x[4 * j + 2 * i], x[4 * j + 2 * i + 1]));
    }
    largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 2));
    top[i] = largest * rows.scale[i];
    moved |= top[i] > rows.m[i] + kLazyRescale;
  }
  moved = __any_sync(kFullWarp, moved);
  if (moved) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float m = fmaxf(rows.m[i], top[i]);
      alpha[i] = ptx::exp2_approx(rows.m[i] - m);
      rows.m[i] = m;
      rows.l[i] *= alpha[i];
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum[2] = {0.f, 0.f};  // two chains of additions
#pragma unroll
    for (int j = 0; j < kRegs / 4; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& v = x[4 * j + 2 * i + e];
        v = ptx::exp2_approx(fmaf(v, rows.scale[i], -rows.m[i]));
        sum[e] += v;
      }
    }
    rows.l[i] += sum[0] + sum[1];
  }
  return moved;
}

template <int kRegs>
__device__ __forceinline__ void scale_rows(float (&o)[kRegs], const float (&factor)[2]) {
#pragma unroll
  for (int j = 0; j < kRegs / 4; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) o[4 * j + e] *= factor[e / 2];
  }
}

}  // namespace tq4::sm90
