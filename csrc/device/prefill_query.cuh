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
      float unit, inverse;
      if constexpr (Config::kInt8) {
        unit = query_unit(largest);
        inverse = query_inverse(largest, unit);
      } else {
        inverse = fp16_row_scale(largest);  // a power of two
        unit = largest != largest ? largest : __fdiv_rn(1.f, inverse);
      }
      q.scale[2 * mt + i] = unit;
      unit *= sign;
      inverse *= sign;
#pragma unroll
      for (int s = 0; s < Config::D / 32; ++s) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float* v = &c[mt][4 * s + 2 * h][2 * i];
          const float* w = &c[mt][4 * s + 2 * h + 1][2 * i];
          if constexpr (Config::kInt8) {
            q.a[mt][s][2 * h + i] = query_codes(v[0], v[1], w[0], w[1], unit, inverse);
          } else {
            q.a[mt][2 * s + h][i] = ptx::pack_f16x2(v[0] * inverse, v[1] * inverse);
            q.a[mt][2 * s + h][2 + i] = ptx::pack_f16x2(w[0] * inverse, w[1] * inverse);
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

// The lane's rows of q, index 2 mt + i as in LaneRows, null for a padding row of zeros.  Chunk b of
// a row to be rotated is dims 32 b + 8 t .. + 7, of a rotated one dims 8 b .. + 7 of the lane's
// quarter.
template <typename Config>
struct QueryRows {
  const uint16_t* row[2 * Config::kMTiles];

  __device__ __forceinline__ uint4 raw(int i, int b, bool rotates) const {
    const int t = threadIdx.x % 4;
    uint4 chunk = make_uint4(0, 0, 0, 0);
    if (row[i] != nullptr) {
      chunk = load_raw8(row[i] + (rotates ? 32 * b + 8 * t : t * (Config::D / 4) + 8 * b));
    }
    return chunk;
  }
};

// Rows as operands of the rotation: fp16, bf16 ones times a power of two a row.

// Loaded at each use, one block of 32 dims after the other: for CTAs without registers for more.
template <typename Config>
struct LoadedAtUse {
  static constexpr int kBlocksAtOnce = 1;
  static constexpr int kRotationBatch = 1;
  QueryRows<Config> rows;
  DType dtype;
  float scale[2 * Config::kMTiles];

  __device__ __forceinline__ uint4 raw(int i, int b) const { return rows.raw(i, b, false); }
  __device__ __forceinline__ void find_scales() {
#pragma unroll
    for (int i = 0; i < 2 * Config::kMTiles; ++i) {
      float largest = 0.f;
      if (dtype == DType::kBFloat16) {
#pragma unroll
        for (int b = 0; b < Config::D / 32; ++b) {
          largest = fmaxf(largest, largest_of8(rows.raw(i, b, true), dtype));
        }
      }
      scale[i] = fp16_row_scale(quad_max_nan(largest));
    }
  }
  __device__ __forceinline__ uint4 operand(int i, int b) const {
    return to_fp16(rows.raw(i, b, true), scale[i], dtype);
  }
};

// All in registers: the loads are in flight together.
template <typename Config>
struct LoadedAhead {
  static constexpr int kBlocksAtOnce = Config::D / 32;
  static constexpr int kRotationBatch = 2;
  uint4 chunk[2 * Config::kMTiles][Config::D / 32];
  DType dtype;
  float scale[2 * Config::kMTiles];

  __device__ __forceinline__ void load(const QueryRows<Config>& rows, bool rotates) {
#pragma unroll
    for (int i = 0; i < 2 * Config::kMTiles; ++i) {
#pragma unroll
      for (int b = 0; b < Config::D / 32; ++b) chunk[i][b] = rows.raw(i, b, rotates);
    }
  }
  __device__ __forceinline__ uint4 raw(int i, int b) const { return chunk[i][b]; }
  __device__ __forceinline__ void find_scales() {
#pragma unroll
    for (int i = 0; i < 2 * Config::kMTiles; ++i) scale[i] = 1.f;
    if (dtype != DType::kBFloat16) return;
#pragma unroll
    for (int i = 0; i < 2 * Config::kMTiles; ++i) {
      float largest = 0.f;
#pragma unroll
      for (const uint4& x : chunk[i]) largest = fmaxf(largest, largest_of8(x, dtype));
      scale[i] = fp16_row_scale(quad_max_nan(largest));
#pragma unroll
      for (uint4& x : chunk[i]) x = to_fp16(x, scale[i], dtype);
    }
  }
  __device__ __forceinline__ uint4 operand(int i, int b) const { return chunk[i][b]; }
};

// Where panels of R lie in shared memory: one after the other in the same place, or, `resident`,
// all high parts side by side and a place for a low part behind them.
template <int D>
struct QueryPanels {
  using Panel = RotationPanel<D>;
  uint32_t smem;
  bool resident;
  float unit;             // rotation_unit; 1 where nothing is rotated
  bool used = false;      // the places, by anybody before
  uint32_t high = 0;      // bit p: the high part of panel p is in its place
  uint32_t low = 0;       // bit p: panel p has a low part
  bool low_held = false;  // the one of the panel completed last is in its place

  TQ4_HOST_DEVICE static constexpr int bytes(bool resident) {
    return (resident ? Panel::kPanels + 1 : 1) * Panel::kBytes;
  }

  __device__ __forceinline__ uint32_t place(int panel, int part) const {
    return smem + (resident ? (part == 0 ? panel : Panel::kPanels) * Panel::kBytes : 0);
  }
  // Whether there is nothing to load.
  __device__ __forceinline__ bool holds(int panel, int part) const {
    return part == 0 ? high >> panel & 1 : Panel::kPanels == 1 && resident && low_held;
  }
  // After part has been stored by all threads: a barrier.
  __device__ __forceinline__ void complete(int panel, int part, bool has_low) {
    low |= static_cast<uint32_t>(__syncthreads_or(has_low) != 0) << panel;
    used = true;
    if (!resident) high = 0;
    if (part == 0) high |= 1u << panel;
    low_held = part > 0;
  }
};

// c += q R^T for one panel of R, of which `panel_smem` holds the high or the low part.
template <typename Config, typename Query>
__device__ __forceinline__ void multiply_panel(uint32_t panel_smem, int panel, const Query& query,
                                               float (&c)[Config::kMTiles][Config::D / 8][4]) {
  constexpr int D = Config::D;
  using Panel = RotationPanel<D>;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  // Column g of the product is quarter g / 2, e = g % 2: its row for jj = 0.  Those of other jj are
  // 2 (jj % 4) + 8 (jj / 4) rows on, where the swizzle differs by jj % 4.  Opaque: addresses are
  // not to be kept for the next panel.
  const int row = g / 2 * (8 * Panel::kSteps) + query_dim<Config>(0, 0, g % 2);
  const uint32_t first = ptx::opaque(panel_smem + HalfTile<D>::offset(row, t));
#pragma unroll(Query::kBlocksAtOnce)
  for (int kb = 0; kb < D / 32; ++kb) {
    uint4 a[2 * Config::kMTiles];
#pragma unroll
    for (int i = 0; i < 2 * Config::kMTiles; ++i) a[i] = query.operand(i, kb);
#pragma unroll
    for (int jj = 0; jj < 4 * Panel::kSteps; ++jj) {
      const int j = panel * 4 * Panel::kSteps + jj;
      const uint4 b = ptx::ld_shared_v4((first ^ (4 * kb ^ jj % 4) << 4) +
                                        (2 * (jj % 4) + 8 * (jj / 4)) * HalfTile<D>::kRowBytes);
#pragma unroll
      for (int mt = 0; mt < Config::kMTiles; ++mt) {
        const uint4 &x = a[2 * mt], &y = a[2 * mt + 1];
        const uint32_t a0[4] = {x.x, y.x, x.y, y.y}, a1[4] = {x.z, y.z, x.w, y.w};
        ptx::mma_m16n8k16_f16f16f32(c[mt][j], a0, b.x, b.y);
        ptx::mma_m16n8k16_f16f16f32(c[mt][j], a1, b.z, b.w);
      }
    }
  }
}

// c = q R^T * query.scale / panels.unit, by the whole CTA.  Before the panels' place is used for
// something else there has to be a barrier.
template <typename Config, typename Query>
__device__ __forceinline__ void rotate_query(const float* rotation, QueryPanels<Config::D>& panels,
                                             const Query& query,
                                             float (&c)[Config::kMTiles][Config::D / 8][4]) {
  constexpr int D = Config::D;
  using Panel = RotationPanel<D>;
#pragma unroll
  for (int mt = 0; mt < Config::kMTiles; ++mt) {
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) c[mt][j][e] = 0.f;
    }
  }
#pragma unroll
  for (int panel = 0; panel < Panel::kPanels; ++panel) {
    // The high part, then the low one if there is any: the same code.
#pragma unroll 1
    for (uint32_t part = 0; part <= (panels.low >> panel & 1); ++part) {
      const uint32_t place = panels.place(panel, part);
      if (!panels.holds(panel, part)) {
        if (panels.used) __syncthreads();  // the place is no longer read
        const bool has_low = load_rotation_part<D, Config::kThreads, Query::kRotationBatch>(
            place, rotation, panels.unit, part > 0,
            [panel](int r) { return Panel::by_quarter(panel, r); });
        panels.complete(panel, part, has_low);
      }
      multiply_panel<Config>(place, panel, query, c);
    }
  }
}

// c = q that is rotated already.
template <typename Config, typename Query>
__device__ __forceinline__ void unpack_rotated(const Query& query,
                                               float (&c)[Config::kMTiles][Config::D / 8][4]) {
#pragma unroll
  for (int i = 0; i < 2 * Config::kMTiles; ++i) {
#pragma unroll
    for (int b = 0; b < Config::D / 32; ++b) {
      const uint4 x = query.raw(i, b);
      const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const float2 v = unpack_pair(words[u], query.dtype);
        c[i / 2][4 * b + u][2 * (i % 2)] = Config::kInt8 ? v.y : v.x;
        c[i / 2][4 * b + u][2 * (i % 2) + 1] = Config::kInt8 ? v.x : v.y;
      }
    }
  }
}

// c = q_rot * query.scale / panels.unit, by the whole CTA; no rotation: q is rotated already.
template <typename Config, typename Query>
__device__ __forceinline__ void find_rotated(const float* rotation, Query& query,
                                             QueryPanels<Config::D>& panels,
                                             float (&c)[Config::kMTiles][Config::D / 8][4]) {
  if (rotation != nullptr) {
    query.find_scales();
    rotate_query<Config>(rotation, panels, query, c);
  } else {
#pragma unroll
    for (float& scale : query.scale) scale = 1.f;
    unpack_rotated<Config>(query, c);
  }
}

// c, which holds q_rot * scale / unit, to A fragments and row scales.
template <typename Config>
__device__ __forceinline__ void finish_query(float sm_scale, float unit,
                                             const float (&scale)[2 * Config::kMTiles],
                                             float (&c)[Config::kMTiles][Config::D / 8][4],
                                             QueryFragments<Config>& q) {
  // A negative sm_scale goes into the codes: the running maximum needs positive row scales.
  const float sign = sm_scale < 0.f ? -1.f : 1.f;
  quantise_rows<Config>(c, sign, q);
#pragma unroll
  for (int i = 0; i < 2 * Config::kMTiles; ++i) q.scale[i] = __fdiv_rn(q.scale[i] * unit, scale[i]);
}

// Log2 units of one unit of t, where k_unit is the value of one unit of a key code.
__device__ __forceinline__ float score_scale(const AttentionParams& p, float k_unit,
                                             float query_scale) {
  const float scale = query_scale * k_unit * fabsf(p.sm_scale) * kLog2e;
  return scale == 0.f ? 1e-30f : scale;  // 0 * (-inf) must not turn into NaN
}

// Of a CTA's rows, by the CTA itself.
template <typename Config>
__device__ __forceinline__ void load_query(const AttentionParams& p, uint32_t smem,
                                           QueryFragments<Config>& q) {
  const LaneRows<Config> rows = lane_rows<Config>(smem);
  const int q_begin = tile_info<Config>(smem, offsetof(TileInfo, q_begin));
  const int first_head = tile_info<Config>(smem, offsetof(TileInfo, first_head));
  LoadedAtUse<Config> query;
  query.dtype = p.dtype;
#pragma unroll
  for (int i = 0; i < 2 * Config::kMTiles; ++i) {
    query.rows.row[i] = nullptr;
    if (rows.valid(i)) {
      const int token = rows.token(i);
      query.rows.row[i] = static_cast<const uint16_t*>(p.q) + (q_begin + token) * p.q_token_stride +
                          (first_head + rows.head(i, token)) * p.q_head_stride;
    }
  }
  float c[Config::kMTiles][Config::D / 8][4];
  QueryPanels<Config::D> panels{smem + Config::kPanel, false, rotation_unit(p.q_rotation)};
  find_rotated<Config>(p.q_rotation, query, panels, c);
  finish_query<Config>(p.sm_scale, panels.unit, query.scale, c, q);
}

}  // namespace tq4::sm80
