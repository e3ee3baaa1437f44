// Queries of the mma.sync prefill kernel that reads unpacked tiles: rotated, scaled and quantised
// once, left in the workspace as the A fragments that its warps multiply; and the matrix of the
// output rotation, as the fp16 tiles that it copies (RotationImage).
//
//   q (registers) x R^T (shared memory, fp16: high parts, low parts) --mma--> q_rot --> s_q, q8
//
// A unit is 16 packed rows (row = token * G + head of the group) of one sequence and KV head: an
// MMA tile, and the work of one warp.  Units are the slots of prefill_schedule.cuh for 16 rows, so
// that a CTA of the attention kernel finds the units of its rows, whatever their number, and the
// host knows how many there may be.
//
// A fixed grid, in which a CTA keeps R in shared memory as far as it fits.  The rows of the next
// unit travel while this one is quantised (D = 256: written).
#pragma once
#include <cstdint>

#include "../params.h"
#include "../ptx/dynamic_smem.cuh"
#include "../ptx/grid_dependency.cuh"
#include "../ptx/smem.cuh"
#include "prefill_config.cuh"
#include "prefill_cta.cuh"
#include "prefill_image.cuh"
#include "prefill_query.cuh"
#include "prefill_schedule.cuh"

namespace tq4::sm80 {

// In the workspace: codes | fp32 scales of the rows.
template <int D>
struct QueryUnit {
  static constexpr int kRows = 16;
  static constexpr int kScales = kRows * D;
  static constexpr int kBytes = kScales + 4 * kRows;

  // Of the lane's four words of k32 step `step`.
  TQ4_HOST_DEVICE static constexpr int offset(int step, int lane) {
    return 16 * (kWarpSize * step + lane);
  }
};

struct QueryBuffers {
  uint8_t* units;     // unit (slot, KV head) at (slot * Hkv + head) * QueryUnit::kBytes
  uint8_t* rotation;  // RotationImage; null: the output is not rotated
  int32_t num_units;
  int32_t num_works;  // of the attention kernel: slots of its rows times KV heads
};

template <int D_>
struct QueryConfig {
  static constexpr int D = D_;
  static constexpr bool kInt8 = true;
  static constexpr int kMTiles = 1;
  static constexpr int kKeySteps = D / 32;
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * kWarpSize;
  // More than there are: 168 registers a thread, which leave room for a CTA of the expansion on the
  // same SM.  D = 256 needs them all.
  static constexpr int kMaxThreads = D <= 128 ? 384 : kThreads;
};

// The rows of a warp's unit; false if there is no such unit.
template <typename Config>
__device__ __forceinline__ bool find_unit_rows(const AttentionParams& p, int unit, int num_units,
                                               QueryRows<Config>& rows) {
  rows.row[0] = rows.row[1] = nullptr;
  if (unit >= num_units) return false;
  const int heads = p.cache.num_kv_heads, group = p.num_q_heads / heads;
  const int slot = unit / heads, kv_head = unit - slot * heads;
  const PrefillTile tile = find_prefill_tile(p.query_start_loc, p.num_seqs, group,
                                             QueryUnit<Config::D>::kRows, p.short_query_len, slot);
  if (tile.seq < 0) return false;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = tile.first_row + static_cast<int>(threadIdx.x) % kWarpSize / 4 + 8 * i;
    const int token = row / group;
    if (token >= tile.q_len) continue;
    rows.row[i] = static_cast<const uint16_t*>(p.q) + (tile.q_begin + token) * p.q_token_stride +
                  (kv_head * group + row - token * group) * p.q_head_stride;
  }
  return true;
}

// `resident`: shared memory holds all of R (QueryPanels).  Tiles is the PrefillConfig of the
// attention kernel.
template <typename Tiles>
__global__ void __launch_bounds__(QueryConfig<Tiles::D>::kMaxThreads, 1)
    rotate_queries_kernel(const __grid_constant__ AttentionParams p,
                          const __grid_constant__ QueryBuffers buffers, bool resident) {
  constexpr int D = Tiles::D;
  using Config = QueryConfig<D>;
  using Unit = QueryUnit<D>;
  ptx::allow_dependent_launch();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const bool rotates = p.q_rotation != nullptr;
  int first = blockIdx.x * Config::kWarps;

  // R travels while the rows are looked up, and they while it is stored.
  using Batch = RotationBatch<D, Config::kThreads, 4>;
  constexpr int kBatches = ceil_div(Batch::kTotal, Batch::kStep);
  static_assert(kBatches <= 2, "the second follows the first");
  const auto panel_row = [](int r) { return RotationPanel<D>::by_quarter(0, r); };
  Batch batch[kBatches];
  if (rotates) {
#pragma unroll
    for (int i = 0; i < kBatches; ++i) {
      batch[i].load(p.q_rotation, threadIdx.x + i * Batch::kStep, panel_row);
    }
  }
  QueryPanels<D> panels{ptx::smem_address(ptx::dynamic_shared()), resident,
                        rotation_unit(p.q_rotation)};
  QueryRows<Config> rows;
  LoadedAhead<Config> query;
  query.dtype = p.dtype;
  bool exists = find_unit_rows<Config>(p, first + warp, buffers.num_units, rows);
  query.load(rows, rotates);
  if (rotates) {
    bool has_low = false;
#pragma unroll 1
    for (int i = 0; i < kBatches; ++i) {
      has_low |=
          batch[0].store(panels.place(0, 0), threadIdx.x + i * Batch::kStep, panels.unit, false);
      if (kBatches > 1) batch[0] = batch[kBatches - 1];
    }
    panels.complete(0, 0, has_low);
  }
  const int step = gridDim.x * Config::kWarps;
#pragma unroll 1
  for (; first < buffers.num_units; first += step) {
    float c[Config::kMTiles][D / 8][4];
    find_rotated<Config>(p.q_rotation, query, panels, c);
    const bool now = exists;
    const float row_scale[2] = {query.scale[0], query.scale[1]};
    const auto load_next = [&] {
      exists = find_unit_rows<Config>(p, first + step + warp, buffers.num_units, rows);
      query.load(rows, rotates);
    };
    constexpr bool kEarly = D <= 128;  // else registers do not suffice
    if (kEarly) load_next();
    QueryFragments<Config> q;
    finish_query<Config>(p.sm_scale, panels.unit, row_scale, c, q);
    if (!kEarly) load_next();
    if (!now) continue;
    uint8_t* const out = buffers.units + static_cast<int64_t>(first + warp) * Unit::kBytes;
#pragma unroll
    for (int s = 0; s < D / 32; ++s) {
      *reinterpret_cast<uint4*>(out + Unit::offset(s, lane)) =
          make_uint4(q.a[0][s][0], q.a[0][s][1], q.a[0][s][2], q.a[0][s][3]);
    }
    if (lane % 4 == 0) {
      auto* const scales = reinterpret_cast<float*>(out + Unit::kScales);
      scales[lane / 4] = score_scale(p, p.k_code_scale, q.scale[0]);
      scales[lane / 4 + 8] = score_scale(p, p.k_code_scale, q.scale[1]);
    }
  }
  // By the last CTAs, which have fewer units.
  if (p.out_rotation != nullptr) {
    RotationImage<Tiles>::write(
        p.out_rotation, buffers.rotation,
        static_cast<int>((gridDim.x - 1 - blockIdx.x) * Config::kThreads + threadIdx.x),
        static_cast<int>(gridDim.x * Config::kThreads));
  }
  // The end of this kernel stands for the end of those before it.
  ptx::wait_for_predecessor();
}

// The fragments and row scales (score_scale) of a warp of the attention kernel.
template <typename Config>
__device__ __forceinline__ void load_fragments(const AttentionParams& p,
                                               const QueryBuffers& buffers, const CtaWork& work,
                                               QueryFragments<Config>& q) {
  using Unit = QueryUnit<Config::D>;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const TileInfo& info = work.info;
  const int row = info.first_row + warp * Config::kWarpRows;
  const int64_t slot =
      first_slot(info.q_begin, work.seq, info.group, Unit::kRows) + row / Unit::kRows;
#pragma unroll
  for (int mt = 0; mt < Config::kMTiles; ++mt) {
    const uint8_t* unit =
        buffers.units + ((slot + mt) * p.cache.num_kv_heads + work.kv_head) * Unit::kBytes;
    const bool exists = row + mt * Unit::kRows < info.num_rows;
#pragma unroll
    for (int s = 0; s < Config::kKeySteps; ++s) {
      uint4 x = make_uint4(0, 0, 0, 0);
      if (exists) x = *reinterpret_cast<const uint4*>(unit + Unit::offset(s, lane));
      q.a[mt][s][0] = x.x, q.a[mt][s][1] = x.y, q.a[mt][s][2] = x.z, q.a[mt][s][3] = x.w;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      q.scale[2 * mt + i] = 1.f;
      if (exists) {
        q.scale[2 * mt + i] =
            reinterpret_cast<const float*>(unit + Unit::kScales)[lane / 4 + 8 * i];
      }
    }
  }
}

}  // namespace tq4::sm80
