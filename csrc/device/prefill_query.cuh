// Prefill, step 3: queries to A fragments, once a CTA.
#pragma once
#include <cmath>
#include <cstdint>

#include "../params.h"
#include "../ptx/arith.cuh"
#include "../ptx/mma.cuh"
#include "../ptx/smem.cuh"
#include "prefill_config.cuh"
#include "query_recipe.cuh"
#include "rotate.cuh"

namespace tq4::sm80 {

// [3/7] q -> rotated, scaled, quantised A fragments.  In fp16 mode the "quantisation" is a power of
// two and a rounding to fp16.
template <typename Config>
struct QueryFragments {
  uint32_t a[Config::kMTiles][Config::kKeySteps][4];
  float scale[2 * Config::kMTiles];  // score = scale * norm * (integer product)
};

template <typename Config>
__device__ __forceinline__ void quantise_rows(float (&c)[Config::kMTiles][Config::D / 8][4],
                                              float sign, QueryFragments<Config>& q) {
#pragma unroll
  for (int mt = 0; mt < Config::kMTiles; ++mt) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float largest = 0.f;
#pragma unroll
      for (int j = 0; j < Config::D / 8; ++j) {
        largest =
            ptx::max_nan(largest, ptx::max_nan(fabsf(c[mt][j][2 * i]), fabsf(c[mt][j][2 * i + 1])));
      }
      largest = quad_max_nan(largest);
      float unit, inv;
      if constexpr (Config::kInt8) {
        unit = query_unit(largest);
        inv = query_inverse(largest, unit);
      } else {
        const float row_scale = fp16_row_scale(largest);  // a power of two
        unit = largest != largest ? largest : __fdiv_rn(1.f, row_scale);
        inv = row_scale;
      }
      q.scale[2 * mt + i] = unit;
#pragma unroll
      for (int s = 0; s < Config::D / 32; ++s) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int j = 4 * s + 2 * h;
          const float v[4] = {c[mt][j][2 * i], c[mt][j][2 * i + 1], c[mt][j + 1][2 * i],
                              c[mt][j + 1][2 * i + 1]};
          if constexpr (Config::kInt8) {
            uint32_t packed = 0;
#pragma unroll
            for (int b = 0; b < 4; ++b) {
              const float quotient = query_quotient(v[b], unit, inv);
              const int code = max(-127, min(127, __float2int_rn(quotient * sign)));
              packed |= static_cast<uint32_t>(code & 0xff) << (8 * b);
            }
            q.a[mt][s][2 * h + i] = packed;
          } else {
            q.a[mt][2 * s + h][i] = ptx::pack_f16x2(v[0] * inv * sign, v[1] * inv * sign);
            q.a[mt][2 * s + h][2 + i] = ptx::pack_f16x2(v[2] * inv * sign, v[3] * inv * sign);
          }
        }
      }
    }
  }
}

// Dim held at column 2t + e of "n-tile" j = 4 s + 2 h + u of the rotated q: the order in which
// unpack_tile leaves the keys.  INT8 words hold their dims pairwise swapped.
template <typename Config>
TQ4_HOST_DEVICE constexpr int query_dim(int quarter, int j, int e) {
  return quarter * (Config::D / 4) + 8 * (j / 4) + 4 * (j / 2 % 2) + 2 * (j % 2) +
         (Config::kInt8 ? 1 - e : e);
}

// The lane's rows of q: index 2 mt + i as in LaneRows.
template <typename Config>
__device__ __forceinline__ void find_query_rows(const AttentionParams& p, uint32_t smem,
                                                QueryRow (&row)[2 * Config::kMTiles]) {
  const LaneRows<Config> rows = lane_rows<Config>(smem);
  const int q_begin = tile_info<Config>(smem, offsetof(TileInfo, q_begin));
  const int first_head = tile_info<Config>(smem, offsetof(TileInfo, first_head));
#pragma unroll
  for (int i = 0; i < 2 * Config::kMTiles; ++i) {
    row[i].p = nullptr;
    row[i].scale = 1.f;
    if (rows.valid(i)) {
      const int token = rows.token(i);
      const int head = first_head + rows.head(i, token);
      row[i].p = static_cast<const uint16_t*>(p.q) + (q_begin + token) * p.q_token_stride +
                 head * p.q_head_stride;
    }
  }
}

// c += q R^T for one panel of R, of which `panel_smem` holds the high or the low part.  load(i, kb,
// a) gives dims 32 kb + 8 t .. + 7 of the lane's row i as fp16.
template <typename Config, typename Load>
__device__ __forceinline__ void multiply_panel(uint32_t panel_smem, int panel, Load load,
                                               float (&c)[Config::kMTiles][Config::D / 8][4]) {
  constexpr int D = Config::D;
  using Panel = RotationPanel<D>;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll 1
  for (int kb = 0; kb < D / 32; ++kb) {
    uint32_t a[2 * Config::kMTiles][4];
#pragma unroll
    for (int i = 0; i < 2 * Config::kMTiles; ++i) load(i, kb, a[i]);
#pragma unroll
    for (int jj = 0; jj < 4 * Panel::kSteps; ++jj) {
      // Column g of the product is quarter g / 2, e = g % 2.
      const int j = panel * 4 * Panel::kSteps + jj;
      const int local = g / 2 * (8 * Panel::kSteps) + query_dim<Config>(0, jj, 0);
      const int local_row = Config::kInt8 ? local - (g & 1) : local + (g & 1);
      const uint4 b = ptx::ld_shared_v4(panel_smem + HalfTile<D>::offset(local_row, 4 * kb + t));
#pragma unroll
      for (int mt = 0; mt < Config::kMTiles; ++mt) {
        const uint32_t a0[4] = {a[2 * mt][0], a[2 * mt + 1][0], a[2 * mt][1], a[2 * mt + 1][1]};
        const uint32_t a1[4] = {a[2 * mt][2], a[2 * mt + 1][2], a[2 * mt][3], a[2 * mt + 1][3]};
        ptx::mma_m16n8k16_f16f16f32(c[mt][j], a0, b.x, b.y);
        ptx::mma_m16n8k16_f16f16f32(c[mt][j], a1, b.z, b.w);
      }
    }
  }
}

// Dims 8 s .. + 7 of the lane's quarter of row i of a rotated q.
template <typename Config>
__device__ __forceinline__ void unpack_rotated(const uint4& raw, DType dtype, int i, int s,
                                               float (&c)[Config::kMTiles][Config::D / 8][4]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int u = 0; u < 4; ++u) {
    const float2 v = unpack_pair(words[u], dtype);
    c[i / 2][4 * s + u][2 * (i % 2)] = Config::kInt8 ? v.y : v.x;
    c[i / 2][4 * s + u][2 * (i % 2) + 1] = Config::kInt8 ? v.x : v.y;
  }
}

// c = q that is rotated already.
template <typename Config>
__device__ __forceinline__ void load_rotated(DType dtype,
                                             const QueryRow (&row)[2 * Config::kMTiles],
                                             float (&c)[Config::kMTiles][Config::D / 8][4]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2 * Config::kMTiles; ++i) {
#pragma unroll
    for (int s = 0; s < Config::D / 32; ++s) {
      uint4 raw = make_uint4(0, 0, 0, 0);
      if (row[i].p != nullptr) raw = load_raw8(row[i].p + t * (Config::D / 4) + 8 * s);
      unpack_rotated<Config>(raw, dtype, i, s, c);
    }
  }
}

// c, which holds q_rot * row.scale / unit, to A fragments and row scales.
template <typename Config>
__device__ __forceinline__ void finish_query(float sm_scale, float unit,
                                             const QueryRow (&row)[2 * Config::kMTiles],
                                             float (&c)[Config::kMTiles][Config::D / 8][4],
                                             QueryFragments<Config>& q) {
  // A negative sm_scale goes into the codes: the running maximum needs positive row scales.
  const float sign = sm_scale < 0.f ? -1.f : 1.f;
  quantise_rows<Config>(c, sign, q);
#pragma unroll
  for (int i = 0; i < 2 * Config::kMTiles; ++i)
    q.scale[i] = __fdiv_rn(q.scale[i] * unit, row[i].scale);
}

template <typename Config>
__device__ __forceinline__ void load_query(const AttentionParams& p, uint32_t smem,
                                           QueryFragments<Config>& q) {
  constexpr int D = Config::D;
  using Panel = RotationPanel<D>;
  const uint32_t panel_smem = smem + Config::kPanel;
  QueryRow row[2 * Config::kMTiles];
  find_query_rows<Config>(p, smem, row);

  float c[Config::kMTiles][D / 8][4] = {};
  float unit = 1.f;
  if (p.q_rotation != nullptr) {
#pragma unroll
    for (int i = 0; i < 2 * Config::kMTiles; ++i) find_row_scale<D>(row[i], p.dtype);
    unit = rotation_unit(p.q_rotation);
    const auto load = [&](int i, int kb, uint32_t (&a)[4]) {
      load_row_fp16(row[i], 32 * kb + 8 * (threadIdx.x % 4), p.dtype, a);
    };
    const auto panel_rows = [](int panel) {
      return [panel](int r) { return Panel::by_quarter(panel, r); };
    };
#pragma unroll
    for (int panel = 0; panel < Panel::kPanels; ++panel) {
      if (panel > 0) __syncthreads();  // all warps are done with the previous panel
      const bool has_low = load_rotation_part<D, Config::kThreads, RotationPart::kHigh>(
          panel_smem, p.q_rotation, unit, panel_rows(panel));
      const bool any_low = __syncthreads_or(has_low);  // the panel is complete
      multiply_panel<Config>(panel_smem, panel, load, c);
      if (any_low) {
        __syncthreads();  // all warps are done with the high part
        load_rotation_part<D, Config::kThreads, RotationPart::kLow>(panel_smem, p.q_rotation, unit,
                                                                    panel_rows(panel));
        __syncthreads();  // the low part is complete
        multiply_panel<Config>(panel_smem, panel, load, c);
      }
    }
  } else {
    load_rotated<Config>(p.dtype, row, c);
  }
  finish_query<Config>(p.sm_scale, unit, row, c, q);
}

}  // namespace tq4::sm80
