// Queries of the sm_90a prefill kernel: rotated, scaled and quantised once, left in the workspace as
// images of what the attention kernel wants in shared memory (wgmma_image.cuh).  The last CTA leaves
// the matrix of the output rotation there too.
//
// A fixed grid; a CTA keeps the rotation matrix in shared memory, high parts and (unless they are
// all zero, as for Hadamard matrices) low parts, and takes images of 128 rows in turn.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../params.h"
#include "../ptx/dynamic_smem.cuh"
#include "../ptx/grid_dependency.cuh"
#include "../ptx/smem.cuh"
#include "prefill_config.cuh"
#include "prefill_query.cuh"
#include "prefill_schedule.cuh"
#include "wgmma_image.cuh"

namespace tq4::sm90 {

// The parts of sm80::PrefillConfig that prefill_query.cuh knows, and the rest of this kernel's.
template <int D_>
struct PrepareConfig {
  static constexpr int D = D_;
  static constexpr bool kInt8 = true;
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kMTiles = 1;
  static constexpr int kWarpRows = 16;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kKeySteps = D / 32;
  static constexpr int kInfo = 0;  // TileInfo
  static constexpr int kRowTokens = 32;
  static constexpr int kBuffers = round_up(kRowTokens + 4 * kRows, 512);
  using Panel = RotationPanel<D>;
  static constexpr bool kResident = Panel::kPanels == 1;  // both parts stay in shared memory
  static constexpr int kSmemBytes = kBuffers + (kResident ? 2 : 1) * Panel::kBytes;
  static constexpr int kCtas = D <= 128 ? 2 : 1;  // an SM
  static_assert(kRows == QueryImage<D>::kRows, "one image a CTA");
};

template <int D>
__device__ __forceinline__ void write_rotation_image(const float* rotation, uint8_t* image) {
  using Image = WgmmaImage<D>;
  for (int i = threadIdx.x; i < D * (D / 8); i += blockDim.x) {
    const int row = i / (D / 8), chunk = i % (D / 8);
    const float4 a = *reinterpret_cast<const float4*>(rotation + row * D + 8 * chunk);
    const float4 b = *reinterpret_cast<const float4*>(rotation + row * D + 8 * chunk + 4);
    *reinterpret_cast<uint4*>(image + Image::rotation_offset(row, chunk)) =
        make_uint4(ptx::pack_f16x2(a.x, a.y), ptx::pack_f16x2(a.z, a.w), ptx::pack_f16x2(b.x, b.y),
                   ptx::pack_f16x2(b.z, b.w));
  }
}

// The lane's fragments and row scales to the image of its CTA.
template <typename Config>
__device__ __forceinline__ void write_query_image(const AttentionParams& p,
                                                  const sm80::QueryFragments<Config>& q,
                                                  uint8_t* image) {
  constexpr int D = Config::D;
  using Image = QueryImage<D>;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const float unit = p.k_code_scale * fabsf(p.sm_scale) * sm80::kLog2e;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = threadIdx.x / 32 * Config::kWarpRows + g + 8 * i;
    if constexpr (D % 64 == 0) {  // whole chunks
#pragma unroll
      for (int s = 0; s < D / 32; s += 2) {
        const int dim = t * (D / 4) + 8 * s;  // query_dim: a lane has a quarter of the dims
        *reinterpret_cast<uint4*>(image + Image::Codes::offset(row, dim / 16)) = make_uint4(
            q.a[0][s][i], q.a[0][s][2 + i], q.a[0][s + 1][i], q.a[0][s + 1][2 + i]);
      }
    } else {
#pragma unroll
      for (int s = 0; s < D / 32; ++s) {
        const int dim = t * (D / 4) + 8 * s;
        *reinterpret_cast<uint2*>(image + Image::Codes::offset(row, dim / 16) + dim % 16) =
            make_uint2(q.a[0][s][i], q.a[0][s][2 + i]);
      }
    }
    if (t == 0) {
      float scale = q.scale[i] * unit;
      if (scale == 0.f) scale = 1e-30f;  // 0 * (-inf) must not turn into NaN
      *reinterpret_cast<float*>(image + Image::kScales + 4 * row) = scale;
    }
  }
}

// Image (slot, KV head) at images + (slot * Hkv + head) * QueryImage::kBytes.
template <int D>
__global__ void __launch_bounds__(PrepareConfig<D>::kThreads, PrepareConfig<D>::kCtas)
    prepare_queries_kernel(const __grid_constant__ AttentionParams p, uint8_t* images,
                           int num_images, uint8_t* rotation_image) {
  using Config = PrepareConfig<D>;
  using Panel = typename Config::Panel;
  ptx::allow_dependent_launch();
  if (blockIdx.x == gridDim.x - 1) {
    if (p.out_rotation != nullptr) write_rotation_image<D>(p.out_rotation, rotation_image);
    return;
  }
  uint8_t* const shared = ptx::dynamic_shared();
  const uint32_t smem = ptx::smem_address(shared);
  const uint32_t high = smem + Config::kBuffers, low = high + Panel::kBytes;
  const int group = p.num_q_heads / p.cache.num_kv_heads;
  const bool aligned16 = sm80::query_aligned16(p);
  const bool resident = Config::kResident && p.q_rotation != nullptr;
  float unit = 1.f;
  bool any_low = false;
  if (resident) {
    const auto row_of = [](int r) { return Panel::by_quarter(0, r); };
    unit = rotation_unit(p.q_rotation);
    const bool has_low = load_rotation_part<D, Config::kThreads, RotationPart::kHigh>(
        high, p.q_rotation, unit, row_of);
    any_low = __syncthreads_or(has_low);  // the high part is complete
    if (any_low) {
      load_rotation_part<D, Config::kThreads, RotationPart::kLow>(low, p.q_rotation, unit, row_of);
    }
  }

  for (int index = blockIdx.x; index < num_images; index += gridDim.x - 1) {
    const int kv_head = index % p.cache.num_kv_heads;
    const PrefillTile tile = find_prefill_tile(p.query_start_loc, p.num_seqs, group, Config::kRows,
                                               index / p.cache.num_kv_heads);
    if (tile.seq < 0) continue;  // the same in all threads
    __syncthreads();  // the previous image's rows have been read; the rotation is complete
    if (threadIdx.x == 0) {
      sm80::TileInfo info{};
      info.num_rows = tile.q_len * group;
      info.first_row = tile.first_row;
      info.q_begin = tile.q_begin;
      info.group = group;
      info.first_head = kv_head * group;
      *reinterpret_cast<sm80::TileInfo*>(shared + Config::kInfo) = info;
    }
    if (threadIdx.x < Config::kRows) {
      reinterpret_cast<int*>(shared + Config::kRowTokens)[threadIdx.x] =
          (tile.first_row + static_cast<int>(threadIdx.x)) / group;
    }
    __syncthreads();  // info and row tokens are written

    sm80::QueryFragments<Config> q;
    if (resident) {
      QueryRow row[2];
      float c[1][D / 8][4] = {};
      sm80::find_query_rows<Config>(p, smem, row);
#pragma unroll
      for (int i = 0; i < 2; ++i) find_row_scale<D>(row[i], p.dtype, aligned16);
      sm80::multiply_panel<Config>(high, 0, p.dtype, aligned16, row, c);
      if (any_low) sm80::multiply_panel<Config>(low, 0, p.dtype, aligned16, row, c);
      sm80::finish_query<Config>(p.sm_scale, unit, row, c, q);
    } else {
      sm80::load_query<Config>(p, smem, q);
    }
    write_query_image<Config>(p, q, images + static_cast<int64_t>(index) * QueryImage<D>::kBytes);
  }
}

}  // namespace tq4::sm90
