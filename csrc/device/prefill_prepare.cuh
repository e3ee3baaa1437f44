// Queries of the sm_90a prefill kernel: rotated, scaled and quantised once, left in the workspace
// as images of what the attention kernel wants in shared memory (wgmma_image.cuh).  The last CTA
// leaves the matrix of the output rotation there too, and resets the counters of the attention
// kernel.
//
//   q (registers) x R^T (shared memory, fp16: high parts, low parts) --wgmma--> q_rot --> s_q, q8
//
// A fixed grid; a CTA takes images in turn, in parts of 64 rows for each of its warpgroups.  The
// rows of the next part travel while this one is quantised and written.  The low parts are all
// zero, and skipped, for Hadamard matrices.
//
// Orders of dims, chosen so that nothing is ever moved between lanes.  With t = lane % 4:
//   k of the product   lane t multiplies dims 32 b + 8 t .. + 7 of each block b of 32, as loaded
//   columns            lane t receives dims t D/4 .. of its rows, pairwise swapped as the keys are
#pragma once
#include <cstdint>

#include "../params.h"
#include "../ptx/arith.cuh"
#include "../ptx/dynamic_smem.cuh"
#include "../ptx/grid_dependency.cuh"
#include "../ptx/smem.cuh"
#include "../ptx/wgmma.cuh"
#include "prefill_config.cuh"
#include "prefill_schedule.cuh"
#include "query_recipe.cuh"
#include "rotate.cuh"
#include "wgmma_image.cuh"

namespace tq4::sm90 {

template <int D_>
struct PrepareConfig {
  static constexpr int D = D_;
  static constexpr int kThreads = D <= 128 ? 512 : 256;     // one CTA an SM: it makes R once
  static constexpr int kGroups = kThreads / 128;            // warpgroups
  static constexpr int kParts = QueryImage<D>::kRows / 64;  // of an image, a warpgroup each
  static constexpr int kBlocks = D / 32;                    // of dims
  static constexpr int kSteps = D / 16;                     // of k
  static constexpr int kRegs = D / 2;                       // accumulators a lane
  // R as the K-major operand: row = column of the product, 64 k a panel.
  using Matrix = ValueMajorImage<D, D>;
  static constexpr bool kHoldsLow = D <= 128;  // both parts of D = 256 do not fit
  static constexpr int kAlign = 1024;
  static constexpr int kSmemBytes = kAlign + (kHoldsLow ? 2 : 1) * Matrix::kBytes;

  // Dim of the rotated q in column `column` of the product.
  TQ4_HOST_DEVICE static constexpr int column_dim(int column) {
    return column % 8 / 2 * (D / 4) + column / 8 * 2 + 1 - column % 2;
  }
  // First of the pair of dims of q at k = 8 chunk + 2 pair.
  TQ4_HOST_DEVICE static constexpr int k_dim(int chunk, int pair) {
    return chunk / 4 * 32 + 8 * pair + 2 * (chunk % 4);
  }
};

template <int D>
__device__ __forceinline__ void write_rotation_image(const float* rotation, uint8_t* image) {
  using Image = WgmmaImage<D>;
#pragma unroll 4
  for (int i = threadIdx.x; i < D * (D / 8); i += PrepareConfig<D>::kThreads) {
    const int row = i / (D / 8), chunk = i % (D / 8);
    uint32_t words[4];
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const float2 v = __ldg(
          reinterpret_cast<const float2*>(rotation + row * D + Image::rotation_dim(chunk, pair)));
      words[pair] = ptx::pack_f16x2(v.x, v.y);
    }
    *reinterpret_cast<uint4*>(image + Image::rotation_offset(row, chunk)) =
        make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// Some of this thread's chunks of R, all in flight together.
template <typename Config>
struct MatrixBatch {
  static constexpr int D = Config::D, kChunks = D / 8, kTotal = D * kChunks;
  static constexpr int kBatch = 4;
  static constexpr int kStep = kBatch * Config::kThreads;
  float2 v[kBatch][4];

  // The last chunk may be made twice, of the same bytes.
  __device__ __forceinline__ static int index(int first, int i) {
    return min(first + i * Config::kThreads, kTotal - 1);
  }

  __device__ __forceinline__ void load(const float* rotation, int first) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int column = index(first, i) / kChunks, chunk = index(first, i) % kChunks;
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        v[i][pair] = __ldg(reinterpret_cast<const float2*>(
            rotation + Config::column_dim(column) * D + Config::k_dim(chunk, pair)));
      }
    }
  }

  // Parts of R / unit to shared memory; an address of 0 leaves a part out.  Returns whether there
  // is a low part.
  __device__ __forceinline__ bool store(int first, float unit, uint32_t high, uint32_t low) const {
    const float inverse = rotation_inverse(unit);
    // D = 256 has no register for the inverse; its Hadamard matrices have powers of two as entries.
    const auto scaled = [&](float entry) {
      return D == 256 ? __fdividef(entry, unit) : entry * inverse;
    };
    bool has_low = false;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = Config::Matrix::offset(index(first, i) / kChunks, index(first, i) % kChunks);
      uint32_t h[4], l[4];
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const float a = scaled(v[i][pair].x), b = scaled(v[i][pair].y);
        h[pair] = ptx::pack_f16x2(a, b);
        const float2 rounded = unpack_pair(h[pair], DType::kFloat16);
        has_low |= a != rounded.x || b != rounded.y;
        l[pair] = ptx::pack_f16x2(a - rounded.x, b - rounded.y);
      }
      if (high != 0) ptx::st_shared_v4(high + at, h[0], h[1], h[2], h[3]);
      if (low != 0) ptx::st_shared_v4(low + at, l[0], l[1], l[2], l[3]);
    }
    return has_low;
  }
};

// All of R.  Returns whether this thread's entries have a low part.  To be followed by a fence and
// a barrier.
template <typename Config>
__device__ __forceinline__ bool load_rotation(const float* rotation, float unit, uint32_t high,
                                              uint32_t low) {
  using Batch = MatrixBatch<Config>;
  bool has_low = false;
#pragma unroll 1
  for (int first = threadIdx.x; first < Batch::kTotal; first += Batch::kStep) {
    Batch batch;
    batch.load(rotation, first);
    has_low |= batch.store(first, unit, high, low);
  }
  return has_low;
}

// The lane's two rows as loaded: chunk b of a q to be rotated is dims 32 b + 8 t .. + 7, of a
// rotated one dims 8 b .. + 7 of its quarter.
template <int D>
struct RawRows {
  uint4 chunk[2][D / 32];
};

// Rows of part `part` of all images; false if there is none.
template <typename Config>
__device__ __forceinline__ bool load_rows(const AttentionParams& p, int part, int num_parts,
                                          RawRows<Config::D>& raw) {
  constexpr int D = Config::D;
  if (part >= num_parts) return false;
  const int heads = p.cache.num_kv_heads, group = p.num_q_heads / heads;
  const int index = part / Config::kParts, slot = index / heads, kv_head = index - slot * heads;
  const PrefillTile tile = find_prefill_tile(p.query_start_loc, p.num_seqs, group,
                                             QueryImage<D>::kRows, p.short_query_len, slot);
  if (tile.seq < 0) return false;
  const bool rotates = p.q_rotation != nullptr;
  const int thread = ptx::thread_idx_volatile();  // not carried through the loop
  const int g = thread % 32 / 4, t = thread % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row =
        tile.first_row + part % Config::kParts * 64 + thread % 128 / 32 * 16 + g + 8 * i;
    const int token = row / group;
    const auto* src = reinterpret_cast<const uint4*>(
        static_cast<const uint16_t*>(p.q) + (tile.q_begin + token) * p.q_token_stride +
        (kv_head * group + row - token * group) * p.q_head_stride + t * (rotates ? 8 : D / 4));
    const int step = rotates ? 4 : 1;
#pragma unroll
    for (int b = 0; b < D / 32; ++b) {
      raw.chunk[i][b] = make_uint4(0, 0, 0, 0);
      if (token < tile.q_len) raw.chunk[i][b] = __ldg(src + b * step);
    }
  }
  return true;
}

// c (+)= q M for one part of the matrix.
template <typename Config>
__device__ __forceinline__ void rotate_rows(const RawRows<Config::D>& raw, uint32_t matrix,
                                            bool accumulate, float (&c)[Config::kRegs]) {
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < Config::kSteps; ++step) {
    const uint4& x = raw.chunk[0][step / 2];
    const uint4& y = raw.chunk[1][step / 2];
    const uint32_t a[4] = {step % 2 ? x.z : x.x, step % 2 ? y.z : y.x, step % 2 ? x.w : x.y,
                           step % 2 ? y.w : y.y};
    const uint64_t b =
        ptx::wgmma_descriptor(matrix + step / 4 * Config::Matrix::kPanelBytes + step % 4 * 32, 16,
                              1024, ptx::WgmmaSwizzle::k128B);
    ptx::wgmma_f16<false>(c, a, b, accumulate || step > 0);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_hold(c);
}

// Row i of the lane in c, which holds q_rot * row_scale / unit, to its image: codes and row scale.
template <typename Config, int i>
__device__ __forceinline__ void write_row(const AttentionParams& p, float unit, float row_scale,
                                          const float (&c)[Config::kRegs], int part,
                                          uint8_t* images) {
  constexpr int D = Config::D;
  using Image = QueryImage<D>;
  uint8_t* const image = images + static_cast<int64_t>(part / Config::kParts) * Image::kBytes;
  const int thread = ptx::thread_idx_volatile();  // not carried through the loop
  const int g = thread % 32 / 4, t = thread % 4;
  const int row = part % Config::kParts * 64 + thread % 128 / 32 * 16 + g + 8 * i;
  float largest = 0.f;
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
    largest =
        ptx::max_nan(largest, ptx::max_nan(fabsf(c[4 * j + 2 * i]), fabsf(c[4 * j + 2 * i + 1])));
  }
  largest = quad_max_nan(largest);
  const float step = query_unit(largest);
  // A negative sm_scale goes into the codes: the running maximum needs positive row scales.
  const float signed_step = p.sm_scale < 0.f ? -step : step;
  const float inverse = query_inverse(largest, signed_step);
  uint32_t words[D / 16];
#pragma unroll
  for (int w = 0; w < D / 16; ++w) {
    const float* v = &c[8 * w + 2 * i];
    words[w] = query_codes(v[0], v[1], v[4], v[5], signed_step, inverse);
  }
  if constexpr (D % 64 == 0) {  // a quarter is whole chunks
#pragma unroll
    for (int w = 0; w < D / 16; w += 4) {
      *reinterpret_cast<uint4*>(image + Image::Codes::offset(row, (t * (D / 4) + 4 * w) / 16)) =
          make_uint4(words[w], words[w + 1], words[w + 2], words[w + 3]);
    }
  } else {
#pragma unroll
    for (int w = 0; w < D / 16; w += 2) {
      const int dim = t * (D / 4) + 4 * w;
      *reinterpret_cast<uint2*>(image + Image::Codes::offset(row, dim / 16) + dim % 16) =
          make_uint2(words[w], words[w + 1]);
    }
  }
  if (t == 0) {
    float scale =
        __fdiv_rn(step * unit, row_scale) * (p.k_code_scale * fabsf(p.sm_scale) * sm80::kLog2e);
    if (scale == 0.f) scale = 1e-30f;  // 0 * (-inf) must not turn into NaN
    *reinterpret_cast<float*>(image + Image::kScales + 4 * row) = scale;
  }
}

// Image (slot, KV head) at images + (slot * Hkv + head) * QueryImage::kBytes.
template <int D>
__global__ void __launch_bounds__(PrepareConfig<D>::kThreads, 1)
    prepare_queries_kernel(const __grid_constant__ AttentionParams p, uint8_t* images,
                           int num_images, uint8_t* rotation_image, int32_t* counters,
                           int num_counters) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Config = PrepareConfig<D>;
  ptx::allow_dependent_launch();
  if (blockIdx.x == gridDim.x - 1) {
    for (int i = threadIdx.x; i < num_counters; i += Config::kThreads) counters[i] = 0;
    if (p.out_rotation != nullptr) write_rotation_image<D>(p.out_rotation, rotation_image);
    return ptx::wait_for_predecessor();
  }
  const uint32_t high =
      round_up(ptx::smem_address(ptx::dynamic_shared()), static_cast<uint32_t>(Config::kAlign));
  const uint32_t low = Config::kHoldsLow ? high + Config::Matrix::kBytes : 0;
  const int num_parts = num_images * Config::kParts;
  const int stride = (gridDim.x - 1) * Config::kGroups;
  const int own = threadIdx.x / 128;  // the warpgroup's part of those that the CTA takes at once

  RawRows<D> raw;
  int first = blockIdx.x * Config::kGroups;
  // The matrix travels while the rows are looked up, where it is one batch.
  constexpr bool kEarly = MatrixBatch<Config>::kTotal <= MatrixBatch<Config>::kStep;
  MatrixBatch<Config> matrix;
  float unit = 1.f;
  if (p.q_rotation != nullptr) {
    unit = rotation_unit(p.q_rotation);
    if constexpr (kEarly) matrix.load(p.q_rotation, threadIdx.x);
  }
  bool exists = load_rows<Config>(p, first + own, num_parts, raw);
  bool any_low = false;
  if (p.q_rotation != nullptr) {
    bool has_low;
    if constexpr (kEarly) {
      has_low = matrix.store(threadIdx.x, unit, high, low);
    } else {
      has_low = load_rotation<Config>(p.q_rotation, unit, high, low);
    }
    ptx::fence_shared_async();            // the matrix is read by the tensor cores
    any_low = __syncthreads_or(has_low);  // the matrix is complete
  }
  for (; first < num_parts; first += stride) {
    float c[Config::kRegs], row_scale[2] = {1.f, 1.f};
    if (p.q_rotation == nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int b = 0; b < Config::kBlocks; ++b) {
          const uint4& x = raw.chunk[i][b];
          const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
          for (int u = 0; u < 4; ++u) {
            const float2 v = unpack_pair(words[u], p.dtype);
            c[4 * (4 * b + u) + 2 * i] = v.y;
            c[4 * (4 * b + u) + 2 * i + 1] = v.x;
          }
        }
      }
    } else {
      if (p.dtype == DType::kBFloat16) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float largest = 0.f;
#pragma unroll
          for (int b = 0; b < Config::kBlocks; ++b) {
            largest = fmaxf(largest, largest_of8(raw.chunk[i][b], p.dtype));
          }
          row_scale[i] = fp16_row_scale(quad_max_nan(largest));
#pragma unroll
          for (int b = 0; b < Config::kBlocks; ++b) {
            raw.chunk[i][b] = to_fp16(raw.chunk[i][b], row_scale[i], p.dtype);
          }
        }
      }
      rotate_rows<Config>(raw, high, false, c);
      if (Config::kHoldsLow && any_low) rotate_rows<Config>(raw, low, true, c);
      if constexpr (!Config::kHoldsLow) {
        if (any_low) {      // the parts take turns in shared memory
          __syncthreads();  // the high part has been read
          load_rotation<Config>(p.q_rotation, unit, 0, high);
          ptx::fence_shared_async();
          __syncthreads();  // the low part is complete
          rotate_rows<Config>(raw, high, true, c);
          __syncthreads();  // the low part has been read
          load_rotation<Config>(p.q_rotation, unit, high, 0);
          ptx::fence_shared_async();
          __syncthreads();  // the high part is back
        }
      }
    }
    const bool now = exists;
    // In between, as the next rows then take registers that this one has left.
    if (now) write_row<Config, 0>(p, unit, row_scale[0], c, first + own, images);
    exists = load_rows<Config>(p, first + stride + own, num_parts, raw);
    if (now) write_row<Config, 1>(p, unit, row_scale[1], c, first + own, images);
  }
  // The end of this kernel stands for the end of those before it.
  ptx::wait_for_predecessor();
#endif
}

}  // namespace tq4::sm90
