// First kernel of decode: rotated and quantised queries in the workspace.
//
//   q_rot = q R^T           TF32 tensor cores, R as a sum of two TF32 values: fp32-accurate
// and then to codes (decode_query.cuh).
//
// A CTA takes blocks of 16 rows (token, head), one MMA tile high.  Warp w computes dims 8 w .. 8 w
// + 7 of the product (D = 256: and 128 more); the warps meet once a block for the rows' maxima.
// The k index of the product is permuted so that both operands are read four neighbours at a time:
// within 16 dims, lane t has 4 t .. 4 t + 3, two for each k8 step.
//
// The main kernel waits for this one, and there is little to compute: what counts is how often it
// waits for memory.  Once: every load of a block, R and q alike, is under way before the first is
// used; q comes one piece a thread, and goes to the fragments through shared memory.
#pragma once
#include <cstdint>

#include "../params.h"
#include "../ptx/arith.cuh"
#include "../ptx/grid_dependency.cuh"
#include "../ptx/mma_tf32.cuh"
#include "common.cuh"
#include "decode_plan.h"
#include "decode_query.cuh"
#include "parameter_lines.cuh"
#include "rotate.cuh"

namespace tq4 {

template <int D>
struct PrepareConfig {
  static constexpr int kWarps = D <= 128 ? D / 8 : 16;
  static constexpr int kTiles = D / 8 / kWarps;  // n8 tiles of a warp
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kPieces = kPrepareRows * D / 4 / kThreads;  // of q, that a thread loads
  // Of q in shared memory, in values: half a warp's pieces lie on different banks.
  static constexpr int kRowPitch = D + 16;
  static_assert(kPieces * kThreads * 4 == kPrepareRows * D, "the pieces come out even");
};

// The first block of rows from `first` on, `step` apart, that has something to rotate; the same for
// all threads.
__device__ __forceinline__ int next_block(const AttentionParams& p, const DecodeBatch& batch,
                                          int first, int step, int num_rows) {
  if (p.short_query_len == 0) return first;
#pragma unroll 1
  for (; first < num_rows; first += step) {
    const uint32_t heads = p.num_q_heads;
    const uint32_t end = static_cast<uint32_t>(min(first + kPrepareRows, num_rows));
#pragma unroll 1
    for (uint32_t place = static_cast<uint32_t>(first) / heads; place * heads < end; ++place) {
      if (query_token(p, batch, place) >= 0) return first;
    }
  }
  return first;
}

// The 16 rows of q from `first` on, dealt out to the threads in pieces of 4 values.  Rows past the
// last repeat it, rows of places that are not used are those of token 0; nobody reads their
// results.
template <int D>
struct QueryPieces {
  using Config = PrepareConfig<D>;
  const uint16_t* source[Config::kPieces];
  uint2 piece[Config::kPieces];

  // Apart from the loads: what may have to be looked up on the way must not hold up others.
  __device__ __forceinline__ void find(const AttentionParams& p, const DecodePlan& plan,
                                       const DecodeBatch& batch, int first, int num_rows) {
#pragma unroll
    for (int i = 0; i < Config::kPieces; ++i) {
      const int at = static_cast<int>(threadIdx.x) + i * Config::kThreads;
      const int index = min(first + at / (D / 4), num_rows - 1);
      const int place = static_cast<int>(plan.query_divider.quotient(index));
      const int64_t token = max(query_token(p, batch, place), 0);
      source[i] = static_cast<const uint16_t*>(p.q) + token * p.q_token_stride +
                  (index - place * p.num_q_heads) * p.q_head_stride + at % (D / 4) * 4;
    }
  }

  __device__ __forceinline__ void load(bool aligned8) {
#pragma unroll
    for (int i = 0; i < Config::kPieces; ++i) {
      if (aligned8) {
        piece[i] = *reinterpret_cast<const uint2*>(source[i]);
      } else {
        piece[i].x = source[i][0] | static_cast<uint32_t>(source[i][1]) << 16;
        piece[i].y = source[i][2] | static_cast<uint32_t>(source[i][3]) << 16;
      }
    }
  }

  __device__ __forceinline__ void store(uint16_t* rows) const {
#pragma unroll
    for (int i = 0; i < Config::kPieces; ++i) {
      const int at = static_cast<int>(threadIdx.x) + i * Config::kThreads;
      *reinterpret_cast<uint2*>(rows + at / (D / 4) * Config::kRowPitch + at % (D / 4) * 4) =
          piece[i];
    }
  }
};

// The lane's part of R for one n8 tile.  B[k][n] = R[n][k]: of row 8 n_tile + g, dims 16 k + 4 t ..
template <int D>
struct RotationTile {
  float4 part[D / 16];

  __device__ __forceinline__ void load(const float* rotation, int n_tile) {
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
    const float* row = rotation + (8 * n_tile + g) * D + 4 * t;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) part[k] = *reinterpret_cast<const float4*>(row + 16 * k);
  }
};

// c[2 i + e] = dim 2 t + e of the tile, row 8 i + g.  Four accumulators, so that no MMA waits for
// the one before.
template <int D, DType kType>
__device__ __forceinline__ void rotate_rows(const uint16_t* rows, const RotationTile<D>& rotation,
                                            float (&c)[4]) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  float sum[4][4] = {};
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint2 raw = *reinterpret_cast<const uint2*>(
          rows + (8 * i + g) * PrepareConfig<D>::kRowPitch + 16 * k + 4 * t);
      const float2 x = unpack_pair(raw.x, kType), y = unpack_pair(raw.y, kType);
      a[0][i] = __float_as_uint(x.x), a[0][2 + i] = __float_as_uint(x.y);
      a[1][i] = __float_as_uint(y.x), a[1][2 + i] = __float_as_uint(y.y);
    }
    const float4 r = rotation.part[k];
    ptx::mma_m16n8k8_tf32(sum[0], a[0], ptx::tf32_low(r.x), ptx::tf32_low(r.y));
    ptx::mma_m16n8k8_tf32(sum[1], a[1], ptx::tf32_low(r.z), ptx::tf32_low(r.w));
    ptx::mma_m16n8k8_tf32(sum[2], a[0], ptx::tf32_high(r.x), ptx::tf32_high(r.y));
    ptx::mma_m16n8k8_tf32(sum[3], a[1], ptx::tf32_high(r.z), ptx::tf32_high(r.w));
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) c[i] = (sum[0][i] + sum[1][i]) + (sum[2][i] + sum[3][i]);
}

template <int D>
__global__ void __launch_bounds__(PrepareConfig<D>::kThreads, 1)
    decode_prepare_kernel(const __grid_constant__ AttentionParams p,
                          const __grid_constant__ DecodePlan plan) {
  using Config = PrepareConfig<D>;
  __shared__ float maxima[kPrepareRows][Config::kWarps];
  __shared__ uint2 row_storage[kPrepareRows * Config::kRowPitch / 4];
  __shared__ ParameterLines kept_lines[Config::kWarps];
  ptx::allow_dependent_launch();

  const ParameterLines lines = ParameterLines::touch(p, plan);
  auto* rows = reinterpret_cast<uint16_t*>(row_storage);
  auto* workspace = static_cast<uint8_t*>(p.workspace);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const DecodeBatch batch = decode_batch(p, plan);
  const int num_rows = static_cast<int>(plan.query_rows);
  const int step = gridDim.x * kPrepareRows;
  const bool aligned8 =
      (reinterpret_cast<uintptr_t>(p.q) | static_cast<uint64_t>(p.q_token_stride * 2) |
       static_cast<uint64_t>(p.q_head_stride * 2)) %
          8 ==
      0;
  const bool rotates = p.q_rotation != nullptr;
  QueryPieces<D> pieces;
  RotationTile<D> rotation;
  if (rotates) rotation.load(p.q_rotation, warp);
  int first = blockIdx.x * kPrepareRows;
  first = next_block(p, batch, first, step, num_rows);
  pieces.find(p, plan, batch, first, num_rows);
  pieces.load(aligned8);
  clear_findings(p, plan);
  prefetch_batch(p);
  const float scale = unit_scale(p, plan);
  lines.keep(kept_lines);

#pragma unroll 1
  while (first < num_rows) {
    pieces.store(rows);
    __syncthreads();  // the rows are there; the last block's maxima have been read
    const int next = next_block(p, batch, first + step, step, num_rows);
    if (next < num_rows) {
      pieces.find(p, plan, batch, next, num_rows);
      pieces.load(aligned8);
    }

    // c[tile][2 i + e]: row 8 i + g, dim 8 (warp + tile * kWarps) + 2 t + e.
    float c[Config::kTiles][4];
#pragma unroll
    for (int tile = 0; tile < Config::kTiles; ++tile) {
      const int n_tile = warp + tile * Config::kWarps;
      if (rotates) {
        if (tile > 0) {
          __syncwarp();  // keeps the loads behind the tile before: registers hold one tile of R
          rotation.load(p.q_rotation, n_tile);
        }
        if (p.dtype == DType::kBFloat16) {
          rotate_rows<D, DType::kBFloat16>(rows, rotation, c[tile]);
        } else {
          rotate_rows<D, DType::kFloat16>(rows, rotation, c[tile]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t pair = *reinterpret_cast<const uint32_t*>(
              rows + (8 * i + g) * Config::kRowPitch + 8 * n_tile + 2 * t);
          const float2 v = unpack_pair(pair, p.dtype);
          c[tile][2 * i] = v.x;
          c[tile][2 * i + 1] = v.y;
        }
      }
    }
    if (Config::kTiles > 1 && rotates && next < num_rows) {
      rotation.load(p.q_rotation, warp);  // for the next block
    }

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float largest = 0.f;
#pragma unroll
      for (int tile = 0; tile < Config::kTiles; ++tile) {
        largest =
            ptx::max_nan(largest, ptx::max_nan(fabsf(c[tile][2 * i]), fabsf(c[tile][2 * i + 1])));
      }
      largest = quad_max_nan(largest);
      if (t == 0) maxima[8 * i + g][warp] = largest;
    }
    __syncthreads();  // every warp's maxima are there; the rows have been read

    // A loop, though of two: its code is long, and fetched for the first time.
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      float largest = 0.f;
#pragma unroll
      for (int w = 0; w < Config::kWarps; ++w) {
        largest = ptx::max_nan(largest, maxima[8 * i + g][w]);
      }
      const int index = first + 8 * i + g;
      if (index >= num_rows) break;
#pragma unroll
      for (int tile = 0; tile < Config::kTiles; ++tile) {
        const int64_t at = int64_t{index} * D + 8 * (warp + tile * Config::kWarps) + 2 * t;
        write_query(plan.mode, workspace + plan.query_codes, workspace + plan.query_residual, at,
                    largest, i == 0 ? c[tile][0] : c[tile][2], i == 0 ? c[tile][1] : c[tile][3]);
      }
      if (warp == 0 && t == 0) {
        reinterpret_cast<float*>(workspace + plan.query_scale)[index] =
            row_unit(plan.mode, largest) * scale;
      }
    }
    first = next;
  }
}

}  // namespace tq4
