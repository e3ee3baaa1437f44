// Queries of the sm_90a prefill kernel: rotated, scaled and quantised once, left in the workspace
// as images of what the attention kernel wants in shared memory (wgmma_image.cuh).  The matrix of
// the output rotation is left there too, and the counters of the attention kernel are reset.
//
//   q --cp.async--> ring --LDS--> A fragments x R^T (shared memory, fp16: high parts, low parts)
//     --wgmma--> q_rot --> s_q, q8
//
// A fixed grid; a CTA takes images in turn, in parts of 64 rows for each of its warpgroups.  The
// rows of the next parts travel meanwhile: each thread copies what it will multiply itself, so the
// ring needs no barriers.  The low parts are all zero, and skipped, for Hadamard matrices.
//
// Registers are bounded so that a CTA of the kernel that unpacks keys (tile_expand.cuh) finds room
// beside this one: neither needs the other, and each is a few microseconds of latency.
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
  static constexpr int kThreads = D <= 128 ? 512 : 256;  // one CTA an SM: it makes R once
  static constexpr int kRegisters = D <= 128 ? 112 : 255;
  static constexpr int kGroups = kThreads / 128;            // warpgroups
  static constexpr int kParts = QueryImage<D>::kRows / 64;  // of an image, a warpgroup each
  static constexpr int kBlocks = D / 32;                    // of dims
  static constexpr int kPieceBlocks = D == 96 ? 3 : 2;      // multiplied at once
  static constexpr int kSteps = D / 16;                     // of k
  static constexpr int kRegs = D / 2;                       // accumulators a lane
  // R as the K-major operand: row = column of the product, 64 k a panel.
  using Matrix = ValueMajorImage<D, D>;
  static constexpr bool kHoldsLow = D <= 128;       // both parts of D = 256 do not fit
  static constexpr int kStages = D <= 128 ? 2 : 1;  // of q: parts on their way
  static constexpr int kStageBytes = 2 * kBlocks * kThreads * 16;
  static constexpr int kAlign = 1024;
  static constexpr int kRing = (kHoldsLow ? 2 : 1) * Matrix::kBytes;  // offset
  static constexpr int kRotationChunks = kRing + kStages * kStageBytes;
  static constexpr int kSmemBytes = kAlign + kRotationChunks + 32 * kThreads;
  // An SM's shared memory comes in steps, of which 196 KB is the last but one: beyond it, a CTA
  // that unpacks keys finds room beside this one.
  static_assert(D != 128 || kSmemBytes > 196 * 1024);
  static_assert(kSmemBytes <= 212 * 1024);

  // Dim of the rotated q in column `column` of the product.
  TQ4_HOST_DEVICE static constexpr int column_dim(int column) {
    return column % 8 / 2 * (D / 4) + column / 8 * 2 + 1 - column % 2;
  }
  // First of the pair of dims of q at k = 8 chunk + 2 pair.
  TQ4_HOST_DEVICE static constexpr int k_dim(int chunk, int pair) {
    return chunk / 4 * 32 + 8 * pair + 2 * (chunk % 4);
  }
};

// Chunk `index` of the matrix of the output rotation, dealt out over the threads of the grid.  It
// passes through 32 bytes of shared memory, so that nothing waits for it.
template <int D>
struct RotationChunk {
  uint32_t place;
  int index;

  __device__ __forceinline__ bool exists() const { return index < D * (D / 8); }

  __device__ __forceinline__ void copy(const float* rotation) const {
    const float* row = rotation + index / (D / 8) * D;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      ptx::cp_async<8>(place + 8 * pair, row + WgmmaImage<D>::rotation_dim(index % (D / 8), pair));
    }
  }

  __device__ __forceinline__ void write(uint8_t* image) const {
    uint32_t words[4];
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const uint2 v = ptx::ld_shared_v2(place + 8 * pair);
      words[pair] = ptx::pack_f16x2(__uint_as_float(v.x), __uint_as_float(v.y));
    }
    const int at = WgmmaImage<D>::rotation_offset(index / (D / 8), index % (D / 8));
    *reinterpret_cast<uint4*>(image + at) = make_uint4(words[0], words[1], words[2], words[3]);
  }
};

// Some of this thread's chunks of R, all in flight together.
template <typename Config>
struct MatrixBatch {
  static constexpr int D = Config::D, kChunks = D / 8, kTotal = D * kChunks;
  static constexpr int kBatch = 4;
  static constexpr int kStep = kBatch * Config::kThreads;
  float2 v[kBatch][4];

  // Each CTA begins elsewhere: the L2 serves those that want the same line one after the other.
  // Some chunks may be made twice, of the same bytes.
  __device__ __forceinline__ static int index(int first, int i) {
    return static_cast<int>((first + i * Config::kThreads + blockIdx.x * 128u) % kTotal);
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
    bool has_low = false;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = Config::Matrix::offset(index(first, i) / kChunks, index(first, i) % kChunks);
      uint32_t h[4], l[4];
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const float a = v[i][pair].x * inverse, b = v[i][pair].y * inverse;
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

// Chunk b of row i of a thread in a stage of the ring: dims 32 b + 8 t .. + 7 of a q to be rotated,
// dims 8 b .. + 7 of its quarter of a rotated one.
template <typename Config>
__device__ __forceinline__ uint32_t ring_chunk(uint32_t stage, int i, int b) {
  return stage + ((i * Config::kBlocks + b) * Config::kThreads + ptx::thread_idx_volatile()) * 16;
}

// Starts copying the rows of part `part` of all images; false if there is none.  Rows past the last
// of their sequence repeat it; nobody reads their results.
template <typename Config>
__device__ __forceinline__ bool copy_rows(const AttentionParams& p, int part, int num_parts,
                                          uint32_t stage) {
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
        min(tile.first_row + part % Config::kParts * 64 + thread % 128 / 32 * 16 + g + 8 * i,
            tile.q_len * group - 1);
    const int token = row / group;
    const auto* src = reinterpret_cast<const uint4*>(
        static_cast<const uint16_t*>(p.q) + (tile.q_begin + token) * p.q_token_stride +
        (kv_head * group + row - token * group) * p.q_head_stride + t * (rotates ? 8 : D / 4));
    const int step = rotates ? 4 : 1;
#pragma unroll
    for (int b = 0; b < D / 32; ++b) {
      ptx::cp_async_once<16>(ring_chunk<Config>(stage, i, b), src + b * step,
                             ptx::read_once_policy());
    }
  }
  return true;
}

// What brings the lane's rows of a stage into fp16's range.
template <typename Config>
__device__ __forceinline__ void find_row_scales(DType dtype, uint32_t stage, float (&scale)[2]) {
  if (dtype != DType::kBFloat16) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float largest = 0.f;
#pragma unroll
    for (int b = 0; b < Config::kBlocks; ++b) {
      largest =
          fmaxf(largest, largest_of8(ptx::ld_shared_v4(ring_chunk<Config>(stage, i, b)), dtype));
    }
    scale[i] = fp16_row_scale(quad_max_nan(largest));
  }
}

// c (+)= q M for one part of the matrix, some blocks of dims at a time: A fragments stay in
// registers until their products are done.
template <typename Config>
__device__ __forceinline__ void rotate_rows(DType dtype, uint32_t stage,
                                            const float (&row_scale)[2], uint32_t matrix,
                                            bool accumulate, float (&c)[Config::kRegs]) {
#pragma unroll
  for (int first = 0; first < Config::kBlocks; first += Config::kPieceBlocks) {
    uint4 raw[2][Config::kPieceBlocks];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int b = 0; b < Config::kPieceBlocks; ++b) {
        raw[i][b] = to_fp16(ptx::ld_shared_v4(ring_chunk<Config>(stage, i, first + b)),
                            row_scale[i], dtype);
      }
    }
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 2 * Config::kPieceBlocks; ++k) {
      const uint4& x = raw[0][k / 2];
      const uint4& y = raw[1][k / 2];
      const int step = 2 * first + k;
      const uint32_t a[4] = {k % 2 ? x.z : x.x, k % 2 ? y.z : y.x, k % 2 ? x.w : x.y,
                             k % 2 ? y.w : y.y};
      const uint64_t b =
          ptx::wgmma_descriptor(matrix + step / 4 * Config::Matrix::kPanelBytes + step % 4 * 32, 16,
                                1024, ptx::WgmmaSwizzle::k128B);
      ptx::wgmma_f16<false>(c, a, b, accumulate || step > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(c);
  }
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
__global__ void __maxnreg__(PrepareConfig<D>::kRegisters)
    prepare_queries_kernel(const __grid_constant__ AttentionParams p, uint8_t* images,
                           int num_images, uint8_t* rotation_image, int32_t* counters,
                           int num_counters) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Config = PrepareConfig<D>;
  ptx::allow_dependent_launch();
  const uint32_t high =
      round_up(ptx::smem_address(ptx::dynamic_shared()), static_cast<uint32_t>(Config::kAlign));
  const uint32_t low = Config::kHoldsLow ? high + Config::Matrix::kBytes : 0;
  const uint32_t ring = high + Config::kRing;
  const int num_parts = num_images * Config::kParts;
  const int stride = gridDim.x * Config::kGroups;
  const int own = threadIdx.x / 128;  // the warpgroup's part of those that the CTA takes at once

  int first = blockIdx.x * Config::kGroups;
  // The matrix travels while the rows are looked up, where it is one batch.
  constexpr bool kEarly = MatrixBatch<Config>::kTotal <= MatrixBatch<Config>::kStep;
  MatrixBatch<Config> matrix;
  float unit = 1.f;
  if (p.q_rotation != nullptr) {
    unit = rotation_unit(p.q_rotation);
    if constexpr (kEarly) matrix.load(p.q_rotation, threadIdx.x);
  }
  RotationChunk<D> chunk{high + Config::kRotationChunks + 32 * threadIdx.x,
                         static_cast<int>(threadIdx.x * gridDim.x + blockIdx.x)};
  const bool has_output = p.out_rotation != nullptr && chunk.exists();
  if (has_output) chunk.copy(p.out_rotation);
  uint32_t exist = 0;  // bit i: there is something in stage i
#pragma unroll
  for (int i = 0; i < Config::kStages; ++i) {
    if (copy_rows<Config>(p, first + i * stride + own, num_parts, ring + i * Config::kStageBytes)) {
      exist |= 1u << i;
    }
    ptx::cp_async_commit();
  }
  if (blockIdx.x == 0) {
    for (int i = threadIdx.x; i < num_counters; i += Config::kThreads) counters[i] = 0;
  }
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
  int stage = 0;
#pragma unroll 1
  for (; first < num_parts; first += stride) {
    const uint32_t rows = ring + stage * Config::kStageBytes;
    ptx::cp_async_wait<Config::kStages - 1>();  // the thread's own copies
    float c[Config::kRegs], row_scale[2] = {1.f, 1.f};
    if (p.q_rotation == nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int b = 0; b < Config::kBlocks; ++b) {
          const uint4 x = ptx::ld_shared_v4(ring_chunk<Config>(rows, i, b));
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
      find_row_scales<Config>(p.dtype, rows, row_scale);
      rotate_rows<Config>(p.dtype, rows, row_scale, high, false, c);
      if (Config::kHoldsLow && any_low) {
        rotate_rows<Config>(p.dtype, rows, row_scale, low, true, c);
      }
      if constexpr (!Config::kHoldsLow) {
        if (any_low) {      // the parts take turns in shared memory
          __syncthreads();  // the high part has been read
          load_rotation<Config>(p.q_rotation, unit, 0, high);
          ptx::fence_shared_async();
          __syncthreads();  // the low part is complete
          rotate_rows<Config>(p.dtype, rows, row_scale, high, true, c);
          __syncthreads();  // the low part has been read
          load_rotation<Config>(p.q_rotation, unit, high, 0);
          ptx::fence_shared_async();
          __syncthreads();  // the high part is back
        }
      }
    }
    const bool exists = exist >> stage & 1;
    exist &= ~(1u << stage);
    if (copy_rows<Config>(p, first + Config::kStages * stride + own, num_parts, rows)) {
      exist |= 1u << stage;
    }
    ptx::cp_async_commit();
    stage = (stage + 1) % Config::kStages;
    if (exists) {
      write_row<Config, 0>(p, unit, row_scale[0], c, first + own, images);
      write_row<Config, 1>(p, unit, row_scale[1], c, first + own, images);
    }
  }
  if (has_output) {
    while (true) {
      ptx::cp_async_wait<0>();
      chunk.write(rotation_image);
      chunk.index += gridDim.x * Config::kThreads;
      if (!chunk.exists()) break;
      chunk.copy(p.out_rotation);
      ptx::cp_async_commit();
    }
  }
  ptx::cp_async_wait<0>();
  // The end of this kernel stands for the end of those before it.
  ptx::wait_for_predecessor();
#endif
}

}  // namespace tq4::sm90
