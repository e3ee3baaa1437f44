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

// The LSE of the lane's rows, and what their O is to be multiplied by.
template <typename Config>
__device__ __forceinline__ void finish_rows(const AttentionParams& p, uint32_t smem,
                                            SoftmaxState<Config>& state,
                                            float (&inv)[2 * Config::kMTiles]) {
  const LaneRows<Config> rows = lane_rows<Config>(smem);
  const int q_begin = tile_info<Config>(smem, offsetof(TileInfo, q_begin));
  const int first_head = tile_info<Config>(smem, offsetof(TileInfo, first_head));
  const int t = ptx::thread_idx_volatile() % 4;
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
}

// A row of the output, its dims times `factor`; dim_of(j): dim of the lane's first column of n-tile
// j, the second is the next one.  kOctets: every four n-tiles are 8 neighbouring dims.
template <typename Config, bool kOctets, typename DimOf>
__device__ __forceinline__ void write_rows(const AttentionParams& p, uint32_t smem, DimOf dim_of,
                                           const float (&factor)[2 * Config::kMTiles],
                                           const float (&o)[Config::kMTiles][Config::D / 8][4]) {
  const LaneRows<Config> rows = lane_rows<Config>(smem);
  const int q_begin = tile_info<Config>(smem, offsetof(TileInfo, q_begin));
  const int first_head = tile_info<Config>(smem, offsetof(TileInfo, first_head));
  const int t = ptx::thread_idx_volatile() % 4;
  const uint64_t bits = reinterpret_cast<uintptr_t>(p.out) |
                        static_cast<uint64_t>(p.out_token_stride * 2) |
                        static_cast<uint64_t>(p.out_head_stride * 2);
  const auto pack = [&](float x, float y) {
    return p.dtype == DType::kBFloat16 ? ptx::pack_bf16x2(x, y) : ptx::pack_f16x2(x, y);
  };
#pragma unroll
  for (int i = 0; i < 2 * Config::kMTiles; ++i) {
    if (!rows.valid(i)) continue;
    const int token = rows.token(i);
    uint16_t* dst = static_cast<uint16_t*>(p.out) + (q_begin + token) * p.out_token_stride +
                    (first_head + rows.head(i, token)) * p.out_head_stride;
    const auto value = [&](int j, int e) { return o[i / 2][j][2 * (i % 2) + e] * factor[i]; };
    if (kOctets && bits % 16 == 0) {
#pragma unroll
      for (int j = 0; j < Config::D / 8; j += 4) {
        uint32_t w[4];
#pragma unroll
        for (int u = 0; u < 4; ++u) w[u] = pack(value(j + u, 0), value(j + u, 1));
        *reinterpret_cast<uint4*>(dst + dim_of(j, t)) = make_uint4(w[0], w[1], w[2], w[3]);
      }
      continue;
    }
#pragma unroll
    for (int j = 0; j < Config::D / 8; ++j) {
      store_pair(dst + dim_of(j, t), value(j, 0), value(j, 1), p.dtype, bits % 4 == 0);
    }
  }
}

// O * inv as A fragments.  O / l is bounded by the largest |V'|, an fp16 number: it fits.
template <typename Config>
using OutputFragments = uint32_t[Config::D / 16][Config::kMTiles][4];

template <typename Config>
__device__ __forceinline__ void pack_output(const float (&inv)[2 * Config::kMTiles],
                                            const float (&o)[Config::kMTiles][Config::D / 8][4],
                                            OutputFragments<Config>& a) {
#pragma unroll
  for (int k = 0; k < Config::D / 16; ++k) {
#pragma unroll
    for (int mt = 0; mt < Config::kMTiles; ++mt) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float* pair = &o[mt][2 * k + e / 2][2 * (e % 2)];
        a[k][mt][e] = ptx::pack_f16x2(pair[0] * inv[2 * mt + e % 2], pair[1] * inv[2 * mt + e % 2]);
      }
    }
  }
}

// o += a R for kRows rows of R from row 16 first_block on, which lie at shared address `rows` as
// those of a V tile do.
template <typename Config, int kRows>
__device__ __forceinline__ void multiply_rotation(uint32_t smem, uint32_t rows, int first_block,
                                                  const OutputFragments<Config>& a,
                                                  float (&o)[Config::kMTiles][Config::D / 8][4]) {
  const uint32_t value = rows + (lane_offsets<Config>(smem) >> 16);
#pragma unroll
  for (int k = 0; k < kRows / 16; ++k) compute_pv_block<Config>(value, k, a[first_block + k], o);
}

// [7/7] out = (O / l) R, and the LSE.  `rotate` adds a R to an o of zeros; the lane then has dims
// rotated_dim(j, t) and + 1 of its rows in n-tile j.
template <typename Config, bool kOctets, typename Rotate, typename DimOf>
__device__ __forceinline__ void write_output(const AttentionParams& p, uint32_t smem,
                                             SoftmaxState<Config>& state,
                                             float (&o)[Config::kMTiles][Config::D / 8][4],
                                             Rotate rotate, DimOf rotated_dim) {
  constexpr int D = Config::D;
  float inv[2 * Config::kMTiles];
  finish_rows<Config>(p, smem, state, inv);
  if (p.out_rotation == nullptr) {
    const auto dim_of = [](int j, int t) { return value_dim<Config>(j) + 2 * t; };
    return write_rows<Config, false>(p, smem, dim_of, inv, o);
  }
  OutputFragments<Config> a;
  pack_output<Config>(inv, o, a);
#pragma unroll
  for (int mt = 0; mt < Config::kMTiles; ++mt) {
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) o[mt][j][e] = 0.f;
    }
  }
  rotate(a);
#pragma unroll
  for (float& factor : inv) factor = 1.f;
  // Row pointers are made here, not above: their registers are needed by the rotation.
  write_rows<Config, kOctets>(p, smem, rotated_dim, inv, o);
}

// The rotation in panels that take the tiles' place, one after the other.
template <typename Config>
__device__ __forceinline__ void write_output_by_panels(
    const AttentionParams& p, uint32_t smem, SoftmaxState<Config>& state,
    float (&o)[Config::kMTiles][Config::D / 8][4]) {
  using Panel = RotationPanel<Config::D>;
  const auto rotate = [&](const OutputFragments<Config>& a) {
#pragma unroll
    for (int panel = 0; panel < Panel::kPanels; ++panel) {
      __syncthreads();  // the tiles (or the previous panel) are no longer read
      // Opaque: addresses are not to be kept since the rotation of q, nor through the products.
      const uint32_t panel_smem = ptx::opaque(smem) + Config::kPanel;
      const float* const rotation = ptx::opaque(p.out_rotation);
      load_rotation_panel<Config::D, Config::kThreads>(panel_smem, rotation, [&](int r) {
        return value_dim<Config>(panel * (Panel::kRows / 8) + r / 8) + r % 8;
      });
      __syncthreads();  // the panel is complete
      multiply_rotation<Config, Panel::kRows>(smem, panel_smem, panel * (Panel::kRows / 16), a, o);
    }
  };
  write_output<Config, false>(p, smem, state, o, rotate,
                              [](int j, int t) { return 8 * j + 2 * t; });
}

}  // namespace tq4::sm80
