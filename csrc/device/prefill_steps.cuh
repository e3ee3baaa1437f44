// Prefill, steps 4 to 6: scores, softmax and values of 32 tokens.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "../params.h"
#include "../ptx/arith.cuh"
#include "../ptx/mma.cuh"
#include "../ptx/smem.cuh"
#include "prefill_config.cuh"
#include "prefill_query.cuh"
#include "prefill_schedule.cuh"

namespace tq4::sm80 {

// What the softmax knows of a row.  It lives in shared memory (one copy for the 4 lanes of a row):
// 8 more registers would not fit beside the accumulators.
struct RowState {
  float scale;  // log2 units of one unit of t
  float m;      // running maximum, log2 units
};
static_assert(sizeof(RowState) == 8, "read as one vector");

// The sum of the probabilities stays in registers: this lane's part of the denominator.
template <typename Config>
struct SoftmaxState {
  float l[2 * Config::kMTiles];
};

// Shared address of the lane's row 0; row i is 8 rows on.
template <typename Config>
__device__ __forceinline__ uint32_t row_state_address(uint32_t smem) {
  const unsigned thread = ptx::thread_idx_volatile();
  return smem + Config::kRowStates +
         sizeof(RowState) * (thread / 32 * Config::kWarpRows + thread % 32 / 4);
}

template <typename Config>
__device__ __forceinline__ RowState load_row_state(uint32_t address, int index) {
  const uint2 words = ptx::ld_shared_v2(address + 8 * sizeof(RowState) * index);
  return {__uint_as_float(words.x), __uint_as_float(words.y)};
}

// [4/7] S of 32 tokens: t = norm * (q8 . k8), columns 8 j + 2 t'.. of n-tile j.
template <typename Config>
__device__ __forceinline__ void compute_qk(uint32_t buffer, int inner,
                                           const QueryFragments<Config>& q,
                                           float (&s)[Config::kMTiles][4][4]) {
  const unsigned lane = ptx::thread_idx_volatile() % 32;
  const int g = lane / 4, t = lane % 4;
  const int32_t start[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
  // Chunk c of this lane lies at key ^ (c << 4): tiles are aligned, so the XOR of the swizzle may
  // act on the address itself; n-tile j is 8 rows on, where the swizzle repeats.  Neither needs a
  // table of offsets carried through the loop.
  const uint32_t key =
      buffer + inner * (Config::kInner * Config::Key::kRowBytes) + Config::Key::offset(g, t, 0);
  const uint32_t column =
      buffer + Config::kKeyBytes + Config::kValueBytes + inner * (8 * Config::kInner) + 16 * t;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    int32_t acc[Config::kMTiles][4];
#pragma unroll
    for (int mt = 0; mt < Config::kMTiles; ++mt) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[mt][j][e] = 0.f;
    }
#pragma unroll
    for (int chunk = 0; chunk < (Config::kKeySteps + 1) / 2; ++chunk) {
      const uint4 b = ptx::ld_shared_v4((key ^ (chunk << 4)) + j * 8 * Config::Key::kRowBytes);
#pragma unroll
      for (int mt = 0; mt < Config::kMTiles; ++mt) {
        if constexpr (Config::kInt8) {
          if (chunk == 0) {
            ptx::mma_m16n8k32_s8s8s32(acc[mt], q.a[mt][0], b.x, b.y, start);
          } else {
            ptx::mma_m16n8k32_s8s8s32(acc[mt], q.a[mt][2 * chunk], b.x, b.y, acc[mt]);
          }
          if (2 * chunk + 1 < Config::kKeySteps) {
            ptx::mma_m16n8k32_s8s8s32(
                acc[mt], q.a[mt][2 * chunk + 1 < Config::kKeySteps ? 2 * chunk + 1 : 0], b.z, b.w,
                acc[mt]);
          }
        } else {
          ptx::mma_m16n8k16_f16f16f32(s[mt][j], q.a[mt][2 * chunk], b.x, b.y);
          ptx::mma_m16n8k16_f16f16f32(s[mt][j], q.a[mt][2 * chunk + 1], b.z, b.w);
        }
      }
    }
    // Columns 2t and 2t + 1: {norm, -magic * norm} each.
    const float4 scale = ptx::ld_shared_v4f(column + 64 * j);
#pragma unroll
    for (int mt = 0; mt < Config::kMTiles; ++mt) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float norm = e % 2 ? scale.z : scale.x;
        if constexpr (Config::kInt8) {
          s[mt][j][e] = fmaf(__int_as_float(acc[mt][e]), norm, e % 2 ? scale.w : scale.y);
        } else {
          s[mt][j][e] *= norm;
        }
      }
    }
  }
}

// t -> cap * tanh(score / cap), back in units of t.
template <typename Config>
__device__ __forceinline__ void apply_softcap(float softcap, uint32_t smem,
                                              float (&s)[Config::kMTiles][4][4]) {
  const uint32_t address = row_state_address<Config>(smem);
#pragma unroll
  for (int i = 0; i < 2 * Config::kMTiles; ++i) {
    const float scale = load_row_state<Config>(address, i).scale;
    const float unit = __fdividef(scale, softcap * kLog2e);  // score / cap = t * unit
    const float inv = __fdividef(softcap * kLog2e, scale);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[i / 2][j][2 * (i % 2) + e];
        x = ptx::tanh_accurate(x * unit) * inv;
      }
    }
  }
}

// Keys outside [lo, hi] of their row become -inf.  Only tiles on an edge come here.
template <typename Config>
__device__ __forceinline__ void apply_mask(int first_key, uint32_t smem, int window_left,
                                           int window_right, float (&s)[Config::kMTiles][4][4]) {
  const int t = threadIdx.x % 4;
  const LaneRows<Config> rows = lane_rows<Config>(smem);
  const int pos0 = tile_info<Config>(smem, offsetof(TileInfo, pos0));
  const int num_keys = tile_info<Config>(smem, offsetof(TileInfo, num_keys));
#pragma unroll
  for (int i = 0; i < 2 * Config::kMTiles; ++i) {
    const int pos = pos0 + rows.token(i);
    const int hi = min(num_keys - 1, pos + window_or_max(window_right));
    const int lo = pos - window_or_max(window_left);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = first_key + 8 * j + 2 * t + e;
        if (key > hi || key < lo) s[i / 2][j][2 * (i % 2) + e] = -INFINITY;
      }
    }
  }
}

// [5/7] P = 2^(S - m), in place; O and l are rescaled when a maximum has moved.
template <typename Config>
__device__ __forceinline__ void update_softmax(uint32_t smem, float (&s)[Config::kMTiles][4][4],
                                               SoftmaxState<Config>& state,
                                               float (&o)[Config::kMTiles][Config::D / 8][4]) {
  const uint32_t address = row_state_address<Config>(smem);
  float scale[2 * Config::kMTiles], m[2 * Config::kMTiles], top[2 * Config::kMTiles];
#pragma unroll
  for (int i = 0; i < 2 * Config::kMTiles; ++i) {
    const RowState row = load_row_state<Config>(address, i);
    scale[i] = row.scale;
    m[i] = row.m;
  }
  bool moved = false;
#pragma unroll
  for (int i = 0; i < 2 * Config::kMTiles; ++i) {
    float x = -INFINITY;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      x = fmaxf(x, fmaxf(s[i / 2][j][2 * (i % 2)], s[i / 2][j][2 * (i % 2) + 1]));
    }
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
    top[i] = x * scale[i];
    moved |= top[i] > m[i] + kLazyRescale;
  }
  if (__any_sync(0xffffffffu, moved)) {
#pragma unroll
    for (int i = 0; i < 2 * Config::kMTiles; ++i) {
      const float old_m = m[i];
      m[i] = fmaxf(old_m, top[i]);
      const float alpha = ptx::exp2_approx(old_m - m[i]);
      // All four lanes of a row write the same value.
      ptx::st_shared_u32(address + 8 * sizeof(RowState) * i + offsetof(RowState, m),
                         __float_as_uint(m[i]));
      state.l[i] *= alpha;
#pragma unroll
      for (int j = 0; j < Config::D / 8; ++j) {
        o[i / 2][j][2 * (i % 2)] *= alpha;
        o[i / 2][j][2 * (i % 2) + 1] *= alpha;
      }
    }
    __syncwarp();  // the maxima are written before a neighbour reads them in the next step
  }
#pragma unroll
  for (int i = 0; i < 2 * Config::kMTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[i / 2][j][2 * (i % 2) + e];
        x = ptx::exp2_approx(fmaf(x, scale[i], -m[i]));
        state.l[i] += x;
      }
    }
  }
}

// [6/7] O += P V.  The C fragment of S is the A fragment of P.
template <typename Config>
__device__ __forceinline__ void compute_pv(uint32_t buffer, int inner,
                                           const float (&s)[Config::kMTiles][4][4],
                                           float (&o)[Config::kMTiles][Config::D / 8][4]) {
  const unsigned lane = ptx::thread_idx_volatile() % 32;
  const uint32_t value = buffer + Config::kKeyBytes +
                         inner * (Config::kInner * Config::Value::kRowBytes) +
                         Config::Value::offset(lane % 16, lane / 16);
#pragma unroll
  for (int kk = 0; kk < 2; ++kk) {  // 16 tokens each
    uint32_t a[Config::kMTiles][4];
#pragma unroll
    for (int mt = 0; mt < Config::kMTiles; ++mt) {
      a[mt][0] = ptx::pack_f16x2(s[mt][2 * kk][0], s[mt][2 * kk][1]);
      a[mt][1] = ptx::pack_f16x2(s[mt][2 * kk][2], s[mt][2 * kk][3]);
      a[mt][2] = ptx::pack_f16x2(s[mt][2 * kk + 1][0], s[mt][2 * kk + 1][1]);
      a[mt][3] = ptx::pack_f16x2(s[mt][2 * kk + 1][2], s[mt][2 * kk + 1][3]);
    }
    // ldmatrix: matrices (tokens 0-7, chunk c), (8-15, c), (0-7, c + 1), (8-15, c + 1).
#pragma unroll
    for (int pair = 0; pair < Config::D / 16; ++pair) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, (value ^ (pair << 5)) + kk * 16 * Config::Value::kRowBytes);
#pragma unroll
      for (int mt = 0; mt < Config::kMTiles; ++mt) {
        ptx::mma_m16n8k16_f16f16f32(o[mt][2 * pair], a[mt], b[0], b[1]);
        ptx::mma_m16n8k16_f16f16f32(o[mt][2 * pair + 1], a[mt], b[2], b[3]);
      }
    }
  }
}

}  // namespace tq4::sm80
