// Prefill, steps 4 to 6: scores, softmax and values of kInner tokens.
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

// Scales and running maxima of the lane's rows: read once a step.
template <typename Config>
struct LaneRowStates {
  RowState row[2 * Config::kMTiles];
};

// The sums of the probabilities stay in registers: this lane's part of each row's, or, where the
// tensor cores add them up, whole rows as a C fragment with eight equal columns.
template <typename Config>
struct SoftmaxState {
  static constexpr int kPerTile = Config::kSumByMma ? 4 : 2;
  float l[Config::kMTiles * kPerTile];

  // Row i of the lane (8 i + lane / 4 of the warp), or this lane's part of it.
  __device__ __forceinline__ float& row(int i) {
    return l[i / 2 * kPerTile + i % 2 * (kPerTile / 2)];
  }
};

template <typename Config>
__device__ __forceinline__ float row_sum(SoftmaxState<Config>& state, int i) {
  float l = state.row(i);
  // With kSumByMma the four lanes have the same sum; the shuffle keeps the compiler from computing
  // both halves of the output at once, which spills.
  if constexpr (Config::kSumByMma) return __shfl_xor_sync(0xffffffffu, l, 1);
  l += __shfl_xor_sync(0xffffffffu, l, 1);
  l += __shfl_xor_sync(0xffffffffu, l, 2);
  return l;
}

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

// S of one step: n-tile j holds columns 8 j + 2 t', 8 j + 2 t' + 1 of rows g and g + 8.
template <typename Config>
using Scores = float[Config::kMTiles][Config::kColumns][4];

// Offsets of a lane's first K fragment (low half) and V fragment (high half) in a step.
template <typename Config>
__device__ __forceinline__ uint32_t make_lane_offsets() {
  const unsigned lane = ptx::thread_idx_volatile() % 32;
  return Config::Key::offset(lane / 4, lane % 4, 0) | Config::Value::offset(lane % 16, lane / 16)
                                                          << 16;
}

// The same, from a table where the configuration has one: fewer instructions, and no register.
template <typename Config>
__device__ __forceinline__ uint32_t lane_offsets(uint32_t smem) {
  if constexpr (Config::kTiles) {
    return ptx::ld_shared_volatile(smem + Config::kLaneOffsets + 4 * ptx::thread_idx_volatile());
  } else {
    return make_lane_offsets<Config>();
  }
}

// Where a lane finds the operands of Q K^T of one step.
//
// Chunk c lies at key ^ (c << 4): tiles are aligned, so the XOR of the swizzle may act on the
// address itself; n-tile j is 8 rows on, where the swizzle repeats.  Neither needs a table of
// offsets carried through the loop.
struct KeyAddresses {
  uint32_t key, scale;
};

template <typename Config>
__device__ __forceinline__ KeyAddresses key_addresses(uint32_t part, int inner, uint32_t offsets) {
  const unsigned t = ptx::thread_idx_volatile() % 4;
  return {part + inner * (Config::kInner * Config::Key::kRowBytes) + (offsets & 0xffffu),
          part + Config::kScalePart + inner * (Config::kScaleBytes * Config::kInner) +
              2 * Config::kScaleBytes * t};
}

// n-tile j of S: t = norm * (q8 . k8).
template <typename Config>
__device__ __forceinline__ void compute_qk_column(const KeyAddresses& from, int j,
                                                  const QueryFragments<Config>& q,
                                                  Scores<Config>& s) {
  const int32_t start[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
  int32_t acc[Config::kMTiles][4];
#pragma unroll
  for (int mt = 0; mt < Config::kMTiles; ++mt) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[mt][j][e] = 0.f;
  }
#pragma unroll
  for (int chunk = 0; chunk < (Config::kKeySteps + 1) / 2; ++chunk) {
    const uint4 b = ptx::ld_shared_v4((from.key ^ (chunk << 4)) + j * 8 * Config::Key::kRowBytes);
#pragma unroll
    for (int mt = 0; mt < Config::kMTiles; ++mt) {
      if constexpr (Config::kInt8) {
        if (chunk == 0) {
          ptx::mma_m16n8k32_s8s8s32(acc[mt], q.a[mt][0], b.x, b.y, start);
        } else {
          ptx::mma_m16n8k32_s8s8s32(acc[mt], q.a[mt][2 * chunk], b.x, b.y, acc[mt]);
        }
        if (2 * chunk + 1 < Config::kKeySteps) {
          ptx::mma_m16n8k32_s8s8s32(acc[mt],
                                    q.a[mt][2 * chunk + 1 < Config::kKeySteps ? 2 * chunk + 1 : 0],
                                    b.z, b.w, acc[mt]);
        }
      } else {
        ptx::mma_m16n8k16_f16f16f32(s[mt][j], q.a[mt][2 * chunk], b.x, b.y);
        ptx::mma_m16n8k16_f16f16f32(s[mt][j], q.a[mt][2 * chunk + 1], b.z, b.w);
      }
    }
  }
  // Columns 2t and 2t + 1: {norm, -magic * norm} each, or the norms alone.
  float4 scale;
  if constexpr (Config::kTiles) {
    const uint2 norms = ptx::ld_shared_v2(from.scale + 8 * Config::kScaleBytes * j);
    scale.x = __uint_as_float(norms.x), scale.y = -kMagic * scale.x;
    scale.z = __uint_as_float(norms.y), scale.w = -kMagic * scale.z;
  } else {
    scale = ptx::ld_shared_v4f(from.scale + 8 * Config::kScaleBytes * j);
  }
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

// [4/7] S of one step.
template <typename Config>
__device__ __forceinline__ void compute_qk(const KeyAddresses& from,
                                           const QueryFragments<Config>& q, Scores<Config>& s) {
#pragma unroll
  for (int j = 0; j < Config::kColumns; ++j) compute_qk_column<Config>(from, j, q, s);
}

// t -> cap * tanh(score / cap), back in units of t.
template <typename Config>
__device__ __forceinline__ void apply_softcap(float softcap, uint32_t smem, Scores<Config>& s) {
  const uint32_t address = row_state_address<Config>(smem);
#pragma unroll
  for (int i = 0; i < 2 * Config::kMTiles; ++i) {
    const float scale = load_row_state<Config>(address, i).scale;
    const float unit = __fdividef(scale, softcap * kLog2e);  // score / cap = t * unit
    const float inv = __fdividef(softcap * kLog2e, scale);
#pragma unroll
    for (int j = 0; j < Config::kColumns; ++j) {
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
                                           int window_right, Scores<Config>& s) {
  const int t = ptx::thread_idx_volatile() % 4;
  const LaneRows<Config> rows = lane_rows<Config>(smem);
  const int pos0 = tile_info<Config>(smem, offsetof(TileInfo, pos0));
  const int num_keys = tile_info<Config>(smem, offsetof(TileInfo, num_keys));
  if constexpr (!Config::kTiles) {  // what the prologue made of them is not to be kept until here
    window_left = static_cast<int>(ptx::opaque(static_cast<uint32_t>(window_left)));
    window_right = static_cast<int>(ptx::opaque(static_cast<uint32_t>(window_right)));
  }
#pragma unroll
  for (int i = 0; i < 2 * Config::kMTiles; ++i) {
    const int pos = pos0 + rows.token(i);
    const int hi = min(num_keys - 1, pos + window_or_max(window_right));
    const int lo = pos - window_or_max(window_left);
#pragma unroll
    for (int j = 0; j < Config::kColumns; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = first_key + 8 * j + 2 * t + e;
        if (key > hi || key < lo) s[i / 2][j][2 * (i % 2) + e] = -INFINITY;
      }
    }
  }
}

// [5/7] The running maxima follow the scores when they have grown far enough; O and the sums are
// then rescaled.
//
// What is compared are the maxima of the lane's own columns: as the four lanes of a row share its
// running maximum, some lane's part has outgrown it exactly if the row's maximum has.
template <typename Config>
__device__ __forceinline__ void move_maxima(uint32_t smem, const Scores<Config>& s,
                                            LaneRowStates<Config>& rows,
                                            SoftmaxState<Config>& state,
                                            float (&o)[Config::kMTiles][Config::D / 8][4]) {
  const uint32_t address = row_state_address<Config>(smem);
  float top[2 * Config::kMTiles];
  bool moved = false;
#pragma unroll
  for (int i = 0; i < 2 * Config::kMTiles; ++i) {
    top[i] = s[i / 2][0][2 * (i % 2)];
#pragma unroll
    for (int j = 0; j < Config::kColumns; ++j) {
      top[i] = fmaxf(top[i], fmaxf(s[i / 2][j][2 * (i % 2)], s[i / 2][j][2 * (i % 2) + 1]));
    }
    rows.row[i] = load_row_state<Config>(address, i);
    moved |= fmaf(top[i], rows.row[i].scale, -rows.row[i].m) > kLazyRescale;
  }
  if (!__any_sync(0xffffffffu, moved)) return;
  __syncwarp();  // a vote orders no memory: all lanes have read the maxima that are now replaced
#pragma unroll
  for (int i = 0; i < 2 * Config::kMTiles; ++i) {
    top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffffu, top[i], 1));
    top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffffu, top[i], 2));
    const float old_m = rows.row[i].m;
    const float m = fmaxf(old_m, top[i] * rows.row[i].scale);
    const float alpha = ptx::exp2_approx(old_m - m);
    rows.row[i].m = m;
    // All four lanes of a row write the same value.
    ptx::st_shared_u32(address + 8 * sizeof(RowState) * i + offsetof(RowState, m),
                       __float_as_uint(m));
    state.row(i) *= alpha;
#pragma unroll
    for (int j = 0; j < Config::D / 8; ++j) {
      o[i / 2][j][2 * (i % 2)] *= alpha;
      o[i / 2][j][2 * (i % 2) + 1] *= alpha;
    }
  }
  __syncwarp();  // the maxima are written before a neighbour reads them in the next step
}

// P of one step as A fragments.
template <typename Config>
using Probabilities = uint32_t[Config::kInner / 16][Config::kMTiles][4];

// P = 2^(S - m).  The C fragment of S is the A fragment of P.
template <typename Config>
__device__ __forceinline__ void exponentiate(const LaneRowStates<Config>& rows,
                                             const Scores<Config>& s, SoftmaxState<Config>& state,
                                             Probabilities<Config>& a) {
#pragma unroll
  for (int j = 0; j < Config::kColumns; ++j) {
#pragma unroll
    for (int i = 0; i < 2 * Config::kMTiles; ++i) {
      float x[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        x[e] =
            ptx::exp2_approx(fmaf(s[i / 2][j][2 * (i % 2) + e], rows.row[i].scale, -rows.row[i].m));
        if constexpr (!Config::kSumByMma) state.row(i) += x[e];
      }
      a[j / 2][i / 2][2 * (j % 2) + i % 2] = ptx::pack_f16x2(x[0], x[1]);
    }
  }
}

// O += P V of 16 tokens; `value` is the lane's address of the step's first V row.
template <typename Config>
__device__ __forceinline__ void compute_pv_block(uint32_t value, int kk,
                                                 const uint32_t (&a)[Config::kMTiles][4],
                                                 float (&o)[Config::kMTiles][Config::D / 8][4]) {
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

template <typename Config>
__device__ __forceinline__ uint32_t value_address(uint32_t part, int inner, uint32_t offsets) {
  return part + Config::kValuePart + inner * (Config::kInner * Config::Value::kRowBytes) +
         (offsets >> 16);
}

constexpr uint32_t kOnes = 0x3c003c00;  // two fp16

// [6/7] O += P V.
template <typename Config>
__device__ __forceinline__ void compute_pv(uint32_t value, const Probabilities<Config>& a,
                                           SoftmaxState<Config>& state,
                                           float (&o)[Config::kMTiles][Config::D / 8][4]) {
#pragma unroll
  for (int kk = 0; kk < Config::kInner / 16; ++kk) {
    if constexpr (Config::kSumByMma) {
#pragma unroll
      for (int mt = 0; mt < Config::kMTiles; ++mt) {
        auto& l = reinterpret_cast<float (&)[4]>(state.l[4 * mt]);
        ptx::mma_m16n8k16_f16f16f32(l, a[kk][mt], kOnes, kOnes);
      }
    }
    compute_pv_block<Config>(value, kk, a[kk], o);
  }
}

// All of one step: kInner tokens from first_key on, step `inner` of the part of a buffer that
// starts at shared address `part`.
template <typename Config>
__device__ __forceinline__ void attend_step(const AttentionParams& p, uint32_t smem, uint32_t part,
                                            int inner, int first_key,
                                            const QueryFragments<Config>& q,
                                            SoftmaxState<Config>& state,
                                            float (&o)[Config::kMTiles][Config::D / 8][4]) {
  Scores<Config> s;
  compute_qk<Config>(key_addresses<Config>(part, inner, lane_offsets<Config>(smem)), q, s);
  if (p.softcap > 0.f) apply_softcap<Config>(p.softcap, smem, s);
  const WarpKeys keys = warp_keys<Config>(smem);
  if (first_key < keys.full_begin || first_key + Config::kInner > keys.full_end) {
    apply_mask<Config>(first_key, smem, p.window_left, p.window_right, s);
  }
  LaneRowStates<Config> rows;
  move_maxima<Config>(smem, s, rows, state, o);
  Probabilities<Config> a;
  exponentiate<Config>(rows, s, state, a);
  compute_pv<Config>(value_address<Config>(part, inner, lane_offsets<Config>(smem)), a, state, o);
}

}  // namespace tq4::sm80
