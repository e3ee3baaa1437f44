// Prefill, step 7: the output, rotated back, and the LSE.
#pragma once
#include <cmath>
#include <cstdint>

#include "../params.h"
#include "../ptx/arith.cuh"
#include "../ptx/mma.cuh"
#include "../ptx/opaque.cuh"
#include "../ptx/smem.cuh"
#include "prefill_config.cuh"
#include "prefill_steps.cuh"
#include "rotate.cuh"

namespace tq4::sm80 {

// Writes two neighbouring dims of a row.
__device__ __forceinline__ void store_pair(uint16_t* p, float x, float y, DType dtype,
                                           bool aligned4) {
  const uint32_t word = dtype == DType::kBFloat16 ? ptx::pack_bf16x2(x, y) : ptx::pack_f16x2(x, y);
  if (aligned4) {
    *reinterpret_cast<uint32_t*>(p) = word;
  } else {
    p[0] = static_cast<uint16_t>(word);
    p[1] = static_cast<uint16_t>(word >> 16);
  }
}

// [7/7] out = (O / l) R, and the LSE.
template <typename Config>
__device__ __forceinline__ void write_output(const AttentionParams& p, uint32_t smem,
                                             SoftmaxState<Config>& state,
                                             float (&o)[Config::kMTiles][Config::D / 8][4]) {
  constexpr int D = Config::D;
  const LaneRows<Config> rows = lane_rows<Config>(smem);
  const int q_begin = tile_info<Config>(smem, offsetof(TileInfo, q_begin));
  const int first_head = tile_info<Config>(smem, offsetof(TileInfo, first_head));
  // Opaque: not to be kept in a register since the rotation of q.
  const uint32_t panel_smem = ptx::opaque(smem + Config::kPanel);
  using Panel = RotationPanel<D>;
  const int lane = ptx::thread_idx_volatile() % 32, t = lane % 4;
  const bool aligned4 =
      (reinterpret_cast<uintptr_t>(p.out) | (p.out_token_stride * 2) | (p.out_head_stride * 2)) %
          4 ==
      0;
  float inv[2 * Config::kMTiles];
#pragma unroll
  for (int i = 0; i < 2 * Config::kMTiles; ++i) {
    float l = row_sum<Config>(state, i);
    const float own_m = load_row_state<Config>(row_state_address<Config>(smem), i).m;
    float factor = 1.f, m = own_m;
    if (rows.valid(i)) {
      const int token = rows.token(i);
      const int head = first_head + rows.head(i, token);
      if (p.sinks != nullptr) {  // one more term of the denominator, with no value
        const float sink = p.sinks[head] * kLog2e;
        m = fmaxf(m, sink);
        factor = ptx::exp2_approx(own_m - m);
        l = l * factor + ptx::exp2_approx(sink - m);
      }
      if (p.lse != nullptr && t == 0) {
        // l = 0: no visible key.  NaN goes through.
        p.lse[static_cast<int64_t>(head) * p.num_tokens + q_begin + token] =
            l == 0.f ? -INFINITY : (m + log2f(l)) * kLn2;
      }
    }
    inv[i] = l == 0.f ? 0.f : __fdiv_rn(factor, l);
  }

  // Row pointers are made here, not above: their registers are needed by the rotation.
  const auto store_rows = [&](auto dim_of, const float (&factor)[2 * Config::kMTiles]) {
    const LaneRows<Config> rows = lane_rows<Config>(smem);
    const int q_begin = tile_info<Config>(smem, offsetof(TileInfo, q_begin));
    const int first_head = tile_info<Config>(smem, offsetof(TileInfo, first_head));
    const int t = ptx::thread_idx_volatile() % 4;
#pragma unroll
    for (int i = 0; i < 2 * Config::kMTiles; ++i) {
      if (!rows.valid(i)) continue;
      const int token = rows.token(i);
      uint16_t* dst = static_cast<uint16_t*>(p.out) + (q_begin + token) * p.out_token_stride +
                      (first_head + rows.head(i, token)) * p.out_head_stride;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        store_pair(dst + dim_of(j) + 2 * t, o[i / 2][j][2 * (i % 2)] * factor[i],
                   o[i / 2][j][2 * (i % 2) + 1] * factor[i], p.dtype, aligned4);
      }
    }
  };
  if (p.out_rotation == nullptr) {
    store_rows([](int j) { return value_dim<Config>(j); }, inv);
    return;
  }

  // O / l is bounded by the largest |V'|, an fp16 number: it fits.
  uint32_t a[Config::kMTiles][D / 16][4];
#pragma unroll
  for (int mt = 0; mt < Config::kMTiles; ++mt) {
#pragma unroll
    for (int ks = 0; ks < D / 16; ++ks) {
      a[mt][ks][0] =
          ptx::pack_f16x2(o[mt][2 * ks][0] * inv[2 * mt], o[mt][2 * ks][1] * inv[2 * mt]);
      a[mt][ks][1] =
          ptx::pack_f16x2(o[mt][2 * ks][2] * inv[2 * mt + 1], o[mt][2 * ks][3] * inv[2 * mt + 1]);
      a[mt][ks][2] =
          ptx::pack_f16x2(o[mt][2 * ks + 1][0] * inv[2 * mt], o[mt][2 * ks + 1][1] * inv[2 * mt]);
      a[mt][ks][3] = ptx::pack_f16x2(o[mt][2 * ks + 1][2] * inv[2 * mt + 1],
                                     o[mt][2 * ks + 1][3] * inv[2 * mt + 1]);
    }
  }
#pragma unroll
  for (int mt = 0; mt < Config::kMTiles; ++mt) {
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) o[mt][j][e] = 0.f;
    }
  }
#pragma unroll
  for (int panel = 0; panel < Panel::kPanels; ++panel) {
    __syncthreads();  // the tiles (or the previous panel) are no longer read
    // Opaque: the addresses of the next panel's rows are not to be kept through the products.
    const float* const rotation = ptx::opaque(p.out_rotation);
    load_rotation_panel<D, Config::kThreads>(panel_smem, rotation, [&](int r) {
      return value_dim<Config>(panel * (Panel::kRows / 8) + r / 8) + r % 8;
    });
    __syncthreads();  // the panel is complete
#pragma unroll
    for (int kk = 0; kk < Panel::kRows / 16; ++kk) {
      const int ks = panel * (Panel::kRows / 16) + kk;
      const int row = 16 * kk + lane % 16;
#pragma unroll
      for (int pair = 0; pair < D / 16; ++pair) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, panel_smem + HalfTile<D>::offset(row, 2 * pair + lane / 16));
#pragma unroll
        for (int mt = 0; mt < Config::kMTiles; ++mt) {
          ptx::mma_m16n8k16_f16f16f32(o[mt][2 * pair], a[mt][ks], b[0], b[1]);
          ptx::mma_m16n8k16_f16f16f32(o[mt][2 * pair + 1], a[mt][ks], b[2], b[3]);
        }
      }
    }
  }
#pragma unroll
  for (float& factor : inv) factor = 1.f;
  store_rows([](int j) { return 8 * j; }, inv);
}

}  // namespace tq4::sm80
