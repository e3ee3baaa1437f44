// Queries of the sm_90a prefill kernel: rotated, scaled and quantised once, left in the workspace
// as images of what the attention kernel wants in shared memory (wgmma_image.cuh).  The last CTA
// leaves the matrix of the output rotation there too, and resets the counters of the attention
// kernel.
//
// A fixed grid; a CTA keeps the rotation matrix in shared memory, high parts and (unless they are
// all zero, as for Hadamard matrices) low parts, and takes images of 128 rows in turn.  The rows of
// the next image travel while this one is quantised and written.
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
  static constexpr int kPanel = kBuffers;
  using Panel = RotationPanel<D>;
  static constexpr int kPartBytes = Panel::kPanels * Panel::kBytes;
  static constexpr bool kHoldsLow = D <= 128;  // both parts of D = 256 do not fit
  static constexpr int kRotationBytes = (kHoldsLow ? 2 : 1) * kPartBytes;
  static constexpr int kRowBytes = HalfTile<D>::kRowBytes;
  static constexpr int kSmemBytes = kBuffers + kRotationBytes + kRows * kRowBytes;
  static constexpr int kCtas = D <= 128 ? 2 : 1;  // an SM
  static_assert(kRows == QueryImage<D>::kRows, "one image a CTA");
};

template <int D>
__device__ __forceinline__ void write_rotation_image(const float* rotation, uint8_t* image) {
  using Image = WgmmaImage<D>;
#pragma unroll 4
  for (int i = threadIdx.x; i < D * (D / 8); i += PrepareConfig<D>::kThreads) {
    const int row = i / (D / 8), chunk = i % (D / 8);
    const float4 a = __ldg(reinterpret_cast<const float4*>(rotation + row * D + 8 * chunk));
    const float4 b = __ldg(reinterpret_cast<const float4*>(rotation + row * D + 8 * chunk + 4));
    *reinterpret_cast<uint4*>(image + Image::rotation_offset(row, chunk)) =
        make_uint4(ptx::pack_f16x2(a.x, a.y), ptx::pack_f16x2(a.z, a.w), ptx::pack_f16x2(b.x, b.y),
                   ptx::pack_f16x2(b.z, b.w));
  }
}

// Both parts of R / unit to shared memory, panel after panel; the low ones only where there is
// room. Returns whether this thread's entries have a low part.
template <typename Config>
__device__ __forceinline__ bool load_rotation(uint32_t smem, const float* rotation, float unit) {
  using Panel = typename Config::Panel;
  constexpr int D = Config::D, kChunks = D / 8, kTotal = D * kChunks;
  constexpr int kBatch = kTotal / Config::kThreads < 4 ? kTotal / Config::kThreads : 4;
  constexpr bool kWhole = kTotal % (kBatch * Config::kThreads) == 0;
  bool has_low = false;
#pragma unroll 1
  for (int first = threadIdx.x; first < kTotal; first += kBatch * Config::kThreads) {
    float4 v[kBatch][2];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {  // all in flight together
      const int index = first + i * Config::kThreads;
      if (!kWhole && index >= kTotal) break;
      const int panel = index / (Panel::kRows * kChunks), local = index % (Panel::kRows * kChunks);
      const auto* src = reinterpret_cast<const float4*>(
          rotation + Panel::by_quarter(panel, local / kChunks) * D + 8 * (local % kChunks));
      v[i][0] = __ldg(src);
      v[i][1] = __ldg(src + 1);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int index = first + i * Config::kThreads;
      if (!kWhole && index >= kTotal) break;
      const int panel = index / (Panel::kRows * kChunks), local = index % (Panel::kRows * kChunks);
      const uint32_t at =
          smem + panel * Panel::kBytes + HalfTile<D>::offset(local / kChunks, local % kChunks);
      const float x[8] = {v[i][0].x, v[i][0].y, v[i][0].z, v[i][0].w,
                          v[i][1].x, v[i][1].y, v[i][1].z, v[i][1].w};
      uint32_t high[4], low[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float a = __fdividef(x[2 * w], unit), b = __fdividef(x[2 * w + 1], unit);
        high[w] = ptx::pack_f16x2(a, b);
        const float2 h = unpack_pair(high[w], DType::kFloat16);
        has_low |= a != h.x || b != h.y;
        low[w] = ptx::pack_f16x2(a - h.x, b - h.y);
      }
      ptx::st_shared_v4(at, high[0], high[1], high[2], high[3]);
      if (Config::kHoldsLow) {
        ptx::st_shared_v4(at + Config::kPartBytes, low[0], low[1], low[2], low[3]);
      }
    }
  }
  return has_low;
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
        *reinterpret_cast<uint4*>(image + Image::Codes::offset(row, dim / 16)) =
            make_uint4(q.a[0][s][i], q.a[0][s][2 + i], q.a[0][s + 1][i], q.a[0][s + 1][2 + i]);
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

// Starts the copy of the 16 rows of this warp to shared memory, zeros where there is none.  Returns
// whether the image exists.
template <typename Config>
__device__ __forceinline__ bool copy_rows(const AttentionParams& p, int index, int num_images,
                                          uint32_t rows) {
  constexpr int kChunks = Config::D / 8;
  if (index >= num_images) return false;
  const int heads = p.cache.num_kv_heads, group = p.num_q_heads / heads;
  const int slot = index / heads, kv_head = index - slot * heads;
  const PrefillTile tile =
      find_prefill_tile(p.query_start_loc, p.num_seqs, group, Config::kRows, slot);
  if (tile.seq < 0) return false;
  const bool aligned16 = sm80::query_aligned16(p);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 1
  for (int i = lane; i < Config::kWarpRows * kChunks; i += 32) {
    const int local = i / kChunks, chunk = i % kChunks;
    const int row = tile.first_row + warp * Config::kWarpRows + local;
    const int token = row / group;
    const uint32_t dst = rows + HalfTile<Config::D>::offset(local, chunk);
    const uint16_t* src = static_cast<const uint16_t*>(p.q) +
                          (tile.q_begin + token) * p.q_token_stride +
                          (kv_head * group + row - token * group) * p.q_head_stride + 8 * chunk;
    if (token >= tile.q_len) {
      ptx::st_shared_v4(dst, 0, 0, 0, 0);
    } else if (aligned16) {
      ptx::cp_async<16>(dst, src);
    } else {
      const uint4 raw = load_raw8(src, false);
      ptx::st_shared_v4(dst, raw.x, raw.y, raw.z, raw.w);
    }
  }
  return true;
}

// c = q_rot of the warp's rows in shared memory, times row.scale / unit.
template <typename Config>
__device__ __forceinline__ void rotate_rows(const AttentionParams& p, uint32_t rows,
                                            uint32_t rotation, bool any_low, QueryRow (&row)[2],
                                            float (&c)[1][Config::D / 8][4]) {
  constexpr int D = Config::D;
  using Panel = typename Config::Panel;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const auto chunk = [&](int i, int which) {
    return ptx::ld_shared_v4(rows + HalfTile<D>::offset(g + 8 * i, which));
  };
  if (p.q_rotation == nullptr) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int s = 0; s < D / 32; ++s) {
        sm80::unpack_rotated<Config>(chunk(i, t * (D / 32) + s), p.dtype, i, s, c);
      }
    }
    return;
  }
  if (p.dtype == DType::kBFloat16) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float largest = 0.f;
#pragma unroll
      for (int kb = 0; kb < D / 32; ++kb) {
        largest = fmaxf(largest, largest_of8(chunk(i, 4 * kb + t), p.dtype));
      }
      row[i].scale = fp16_row_scale(quad_max_nan(largest));
    }
  }
  const auto load = [&](int i, int kb, uint32_t (&a)[4]) {
    to_fp16(chunk(i, 4 * kb + t), row[i].scale, p.dtype, a);
  };
#pragma unroll
  for (int panel = 0; panel < Panel::kPanels; ++panel) {
    const uint32_t high = rotation + panel * Panel::kBytes;
    sm80::multiply_panel<Config, 1>(high, panel, load, c);
    if (Config::kHoldsLow && any_low) {
      sm80::multiply_panel<Config, 1>(high + Config::kPartBytes, panel, load, c);
    }
  }
}

// One image by way of load_query, which reads R again for each: dense matrices of D = 256.
template <typename Config>
__device__ __forceinline__ bool load_query_of(const AttentionParams& p, uint8_t* shared, int index,
                                              sm80::QueryFragments<Config>& q) {
  const int heads = p.cache.num_kv_heads, group = p.num_q_heads / heads;
  const PrefillTile tile =
      find_prefill_tile(p.query_start_loc, p.num_seqs, group, Config::kRows, index / heads);
  if (tile.seq < 0) return false;
  __syncthreads();  // the previous image's rows have been read
  if (threadIdx.x == 0) {
    sm80::TileInfo info{};
    info.num_rows = tile.q_len * group;
    info.first_row = tile.first_row;
    info.q_begin = tile.q_begin;
    info.group = group;
    info.first_head = index % heads * group;
    *reinterpret_cast<sm80::TileInfo*>(shared + Config::kInfo) = info;
  }
  if (threadIdx.x < Config::kRows) {
    reinterpret_cast<int*>(shared + Config::kRowTokens)[threadIdx.x] =
        (tile.first_row + static_cast<int>(threadIdx.x)) / group;
  }
  __syncthreads();  // info and row tokens are written
  sm80::load_query<Config>(p, ptx::smem_address(shared), q);
  return true;
}

// Image (slot, KV head) at images + (slot * Hkv + head) * QueryImage::kBytes.
template <int D>
__global__ void __launch_bounds__(PrepareConfig<D>::kThreads, PrepareConfig<D>::kCtas)
    prepare_queries_kernel(const __grid_constant__ AttentionParams p, uint8_t* images,
                           int num_images, uint8_t* rotation_image, int32_t* counters,
                           int num_counters) {
  using Config = PrepareConfig<D>;
  ptx::allow_dependent_launch();
  if (blockIdx.x == gridDim.x - 1) {
    for (int i = threadIdx.x; i < num_counters; i += Config::kThreads) counters[i] = 0;
    if (p.out_rotation != nullptr) write_rotation_image<D>(p.out_rotation, rotation_image);
    return ptx::wait_for_predecessor();
  }
  uint8_t* const shared = ptx::dynamic_shared();
  const uint32_t rotation = ptx::smem_address(shared) + Config::kBuffers;
  const int stride = gridDim.x - 1;
  const auto image_of = [&](int index) {
    return images + static_cast<int64_t>(index) * QueryImage<D>::kBytes;
  };

  const uint32_t rows =
      rotation + Config::kRotationBytes + threadIdx.x / 32 * Config::kWarpRows * Config::kRowBytes;

  bool exists = copy_rows<Config>(p, blockIdx.x, num_images, rows);
  ptx::cp_async_commit();
  float unit = 1.f;
  bool any_low = false;
  if (p.q_rotation != nullptr) {
    unit = rotation_unit(p.q_rotation);
    const bool has_low = load_rotation<Config>(rotation, p.q_rotation, unit);
    any_low = __syncthreads_or(has_low);  // the rotation is complete
  }
  const bool in_shared = Config::kHoldsLow || !any_low;
  for (int index = blockIdx.x; index < num_images; index += stride) {
    sm80::QueryFragments<Config> q;
    if (in_shared) {
      const bool now = exists;
      QueryRow row[2] = {{nullptr, 1.f}, {nullptr, 1.f}};
      float c[1][D / 8][4] = {};
      ptx::cp_async_wait<0>();
      __syncwarp();  // what the other lanes copied is there
      if (now) rotate_rows<Config>(p, rows, rotation, any_low, row, c);
      __syncwarp();  // every lane has read the rows
      exists = copy_rows<Config>(p, index + stride, num_images, rows);
      ptx::cp_async_commit();
      if (!now) continue;
      sm80::finish_query<Config>(p.sm_scale, unit, row, c, q);
    } else if constexpr (!Config::kHoldsLow) {
      if (!load_query_of<Config>(p, shared, index, q)) continue;
    }
    write_query_image<Config>(p, q, image_of(index));
  }
  ptx::cp_async_wait<0>();
  // The end of this kernel stands for the end of those before it.
  ptx::wait_for_predecessor();
}

}  // namespace tq4::sm90
