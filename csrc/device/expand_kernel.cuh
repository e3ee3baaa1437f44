// The kernel of gather and decompress: codes and norms -> vectors [rows, D].  sm_80 and up.
//
// Per row (one token, one KV head):  x = n (c[index] @ R), or n c[index] without a rotation.
//
// A warp takes tiles of 16 rows, grid-strided:
//
//   codes in global  -->  centroids = A  --mma-->  accumulators  -->  vectors in global
//   16 x D/2 bytes        high + low fp16    R     times n            16 x D
//
// fragment_map.cuh: on the side of the codes lane t of a row owns quarter t (D/8 consecutive
// bytes); of the output it owns every fourth chunk of 8 dims (16 bytes of fp16).  A tile's columns
// are made in groups of 32, so that few accumulators are live.
//
// Centroids and R are each split into two fp16 parts and the product of the two low parts is left
// out: relative error 2^-22.  Where R's low parts are all zero, which is so for rotations with
// entries
// +-1/sqrt(D), their products are skipped.
//
// Shared memory (dynamic): R's fragments.  D = 256 does not fit: slices of 32 columns are refilled
// for each round of tiles.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../layout.h"
#include "../ptx/arith.cuh"
#include "../ptx/dynamic_smem.cuh"
#include "../ptx/mma.cuh"
#include "common.cuh"
#include "expand_params.h"
#include "fragment_map.cuh"
#include "rotation_fragments.cuh"
#include "warp.cuh"

namespace tq4 {

template <typename T, int D>
struct ExpandConfig {
  using Element = T;
  using Map = FragmentMap<D>;
  static constexpr int kHeadDim = D;
  static constexpr int kThreads = D == 256 ? 256 : 384;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kSlices = D == 256 ? 8 : 1;  // of R in shared memory
  static constexpr int kSliceTiles = Map::kTiles / kSlices;
  using Rotation = RotationFragments<D, kSliceTiles>;
  // The next tile's codes are read ahead, where the registers allow it.
  static constexpr bool kPrefetch = D != 256;
};

// Where a row comes from and goes to.
struct ExpandRow {
  const uint8_t* codes;
  uint8_t* out;  // null: nothing is written
  float norm;
};

// Row (output token, head).  Reads nothing past the end of a sequence.
__device__ __forceinline__ ExpandRow find_row(const ExpandParams& p, const ExpandSide& side,
                                              int row) {
  ExpandRow found = {nullptr, nullptr, 0.f};
  if (row >= p.num_rows) return found;
  const uint32_t out_token = p.heads.quotient(row);
  const uint32_t head = row - out_token * p.heads.divisor;
  int64_t block = out_token;
  uint32_t offset = 0;
  if (p.block_table != nullptr) {
    // The last sequence that starts at or before the token: an empty one shares its start with the
    // next.
    int first = 0, last = p.num_seqs;
    while (first < last) {
      const int middle = (first + last) / 2;
      if (__ldg(p.out_start_loc + middle + 1) <= static_cast<int>(out_token)) {
        first = middle + 1;
      } else {
        last = middle;
      }
    }
    if (first == p.num_seqs) return found;  // past out_start_loc[num_seqs]
    const int token = static_cast<int>(out_token) - __ldg(p.out_start_loc + first);
    if (token < 0 || token >= __ldg(p.seq_lens + first)) return found;
    const uint32_t page = p.block.quotient(token);
    offset = token - page * p.block.divisor;
    block = __ldg(p.block_table + first * p.block_table_stride + page);
  }
  found.codes = side.codes + block * p.code_block_stride +
                (offset * p.code_token_stride + head * p.code_head_stride);
  found.norm = __ldg(
      reinterpret_cast<const float*>(side.norms + block * p.norm_block_stride +
                                     (offset * p.norm_token_stride + head * p.norm_head_stride)));
  found.out = side.out + out_token * side.token_stride + head * side.head_stride;
  return found;
}

template <int kWords>
__device__ __forceinline__ void read_words(uint32_t (&words)[kWords], const uint8_t* p, int width) {
  if (kWords % 4 == 0 && width == 16) {
#pragma unroll
    for (int w = 0; w + 3 < kWords; w += 4) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(p + 4 * w));
      words[w] = v.x;
      words[w + 1] = v.y;
      words[w + 2] = v.z;
      words[w + 3] = v.w;
    }
  } else if (kWords % 2 == 0 && width >= 8) {
#pragma unroll
    for (int w = 0; w + 1 < kWords; w += 2) {
      const uint2 v = __ldg(reinterpret_cast<const uint2*>(p + 4 * w));
      words[w] = v.x;
      words[w + 1] = v.y;
    }
  } else {
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = __ldg(reinterpret_cast<const uint32_t*>(p + 4 * w));
  }
}

// Eight consecutive values of a row.
template <typename T>
__device__ __forceinline__ void write_values(uint8_t* p, const float (&v)[8], bool aligned) {
  constexpr int kWords = 2 * sizeof(T);
  uint32_t words[kWords];
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    if constexpr (std::is_same_v<T, float>) {
      words[w] = __float_as_uint(v[w]);
    } else if constexpr (std::is_same_v<T, __half>) {
      words[w] = ptx::pack_f16x2(v[2 * w], v[2 * w + 1]);
    } else {
      words[w] = ptx::pack_bf16x2(v[2 * w], v[2 * w + 1]);
    }
  }
  if (aligned) {
#pragma unroll
    for (int w = 0; w < kWords; w += 4) {
      *reinterpret_cast<uint4*>(p + 4 * w) =
          make_uint4(words[w], words[w + 1], words[w + 2], words[w + 3]);
    }
  } else {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if constexpr (sizeof(T) == 4) {
        *reinterpret_cast<uint32_t*>(p + 4 * w) = words[w];
      } else {
        *reinterpret_cast<uint16_t*>(p + 4 * w) = static_cast<uint16_t>(words[w]);
        *reinterpret_cast<uint16_t*>(p + 4 * w + 2) = static_cast<uint16_t>(words[w] >> 16);
      }
    }
  }
}

// The table's value for dim e of a word, from the lane that holds it.  Tables repeat after 16
// lanes, so the nibble above the index does not matter.
template <typename V>
__device__ __forceinline__ V look_up(V table, uint32_t word, int e) {
  return __shfl_sync(kFullWarp, table, static_cast<int>(word >> nibble_shift(e)));
}

// A fragments of one k16 step: high and low parts of the centroids of both rows.
// a0, a1: rows g and g + 8, dims code_dim(2 step, t, 0..1); a2, a3: those of code_dim(2 step + 1,
// ...).
__device__ __forceinline__ void decode_step(uint32_t (&high)[4], uint32_t (&low)[4],
                                            uint32_t row_word, uint32_t other_word, int step,
                                            uint32_t split_centroids) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = i % 2 == 0 ? row_word : other_word;
    const int e = step % 2 * 4 + i / 2 * 2;
    const uint32_t even = look_up(split_centroids, word, e);
    const uint32_t odd = look_up(split_centroids, word, e + 1);
    high[i] = ptx::prmt(even, odd, 0x5410);
    low[i] = ptx::prmt(even, odd, 0x7632);
  }
}

// A lane's share of 16 rows: its quarter of the codes of rows g and g + 8.
template <class C>
struct CodeTile {
  uint32_t words[2][C::Map::kGroups];
  uint8_t* out[2];  // null: nothing is written
  float norm[2];
};

// Row g is found by the lanes with even t, row g + 8 by those with odd t; all four read both.
template <class C>
__device__ __forceinline__ CodeTile<C> load_codes(const ExpandParams& p, const ExpandSide& side,
                                                  int tile_idx) {
  const int lane = threadIdx.x % kWarpSize, t = lane % 4;
  const ExpandRow own = find_row(p, side, tile_idx * 16 + lane / 4 + lane % 2 * 8);
  CodeTile<C> tile;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    tile.out[r] = reinterpret_cast<uint8_t*>(
        __shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(own.out), r, 4));
    const uint8_t* codes = reinterpret_cast<const uint8_t*>(
        __shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(own.codes), r, 4));
    tile.norm[r] = __shfl_sync(kFullWarp, own.norm, r, 4);
    if (tile.out[r] != nullptr) {
      read_words(tile.words[r], codes + t * C::Map::kQuarterBytes, p.code_width);
    } else {
#pragma unroll
      for (int w = 0; w < C::Map::kGroups; ++w) tile.words[r][w] = 0;
    }
  }
  return tile;
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    expand_kernel(const __grid_constant__ ExpandParams p) {
  using Map = typename C::Map;
  using T = typename C::Element;
  auto& s_rotation = *reinterpret_cast<typename C::Rotation*>(ptx::dynamic_shared());
  __shared__ uint32_t s_scratch;

  const int warp = warp_index();
  const int lane = threadIdx.x % kWarpSize, t = lane % 4;
  const ExpandSide& side = p.sides[blockIdx.x % p.num_sides];
  const int cta = blockIdx.x / p.num_sides, num_ctas = gridDim.x / p.num_sides;
  const int num_tiles = (p.num_rows - 1) / 16 + 1;

  // [1/4] Tables: lanes i and i + 16 hold centroid i.
  const float centroid = side.centroids[lane % kNumCentroids];
  const bool rotated = side.rotation != nullptr;
  float r_scale = 1.f, c_scale = 1.f;
  bool use_low = false;
  if (rotated) {
    r_scale = scale_of_rotation(scan_rotation<C::kHeadDim>(side.rotation, &s_scratch).largest);
    float largest = fabsf(centroid);
#pragma unroll
    for (int i = 1; i < kNumCentroids; i *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, i));
    }
    c_scale = scale_of_rotation(largest);
    if constexpr (C::kSlices == 1) {
      const bool low = fill_rotation_fragments<C::kHeadDim, C::kSliceTiles, false>(
          s_rotation, side.rotation, r_scale, 0);
      use_low =
          __syncthreads_or(low) != 0;  // also: the fragments are complete before they are read
    }
  }
  const uint32_t split_centroids = split_fp16(centroid * c_scale);
  const float unscale = 1.f / (c_scale * r_scale);

  const int stride = num_ctas * C::kWarps;
  int tile_idx = warp * num_ctas + cta;
  CodeTile<C> next;
  if constexpr (C::kPrefetch) next = load_codes<C>(p, side, tile_idx);
  // All warps of a CTA run the same number of rounds, because slices are filled together.
  for (int first = 0; first < num_tiles; first += stride) {
    if (C::kSlices == 1 && tile_idx >= num_tiles) break;
    // [2/4] The codes of this tile.
    if constexpr (!C::kPrefetch) next = load_codes<C>(p, side, tile_idx);
    const CodeTile<C> tile = next;
    tile_idx += stride;

    if (!rotated) {
      if constexpr (C::kPrefetch) next = load_codes<C>(p, side, tile_idx);
      // [3/4] Centroids times the norm, in the lane's quarter.
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int w = 0; w < Map::kGroups; ++w) {
          float v[8];
#pragma unroll
          for (int e = 0; e < 8; ++e) v[e] = look_up(centroid, tile.words[r][w], e) * tile.norm[r];
          if (tile.out[r] != nullptr) {
            write_values<T>(tile.out[r] + (t * Map::kQuarter + 8 * w) * sizeof(T), v,
                            p.aligned_output);
          }
        }
      }
      continue;
    }

    // [3/4] Rotate back, 32 columns at a time.
    uint32_t high[Map::kSteps][4], low[Map::kSteps][4];
#pragma unroll
    for (int step = 0; step < Map::kSteps; ++step) {
      decode_step(high[step], low[step], tile.words[0][step / 2], tile.words[1][step / 2], step,
                  split_centroids);
    }
    // The products hide the next tile's loads.
    if constexpr (C::kPrefetch) next = load_codes<C>(p, side, tile_idx);
    const float factors[2] = {tile.norm[0] * unscale, tile.norm[1] * unscale};
#pragma unroll 1
    for (int group = 0; group < Map::kGroups; ++group) {
      if constexpr (C::kSlices > 1) {
        __syncthreads();  // every warp has read the previous slice
        const bool low_part = fill_rotation_fragments<C::kHeadDim, C::kSliceTiles, false>(
            s_rotation, side.rotation, r_scale, group * C::kSliceTiles);
        use_low = __syncthreads_or(low_part) != 0;  // also: the slice is complete before it is read
      }
      float acc[4][4] = {};
#pragma unroll
      for (int step = 0; step < Map::kSteps; ++step) {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const int at = C::kSlices > 1 ? pair : group * 2 + pair;
          const uint4 b = s_rotation.high[at][step][lane];
          ptx::mma_m16n8k16_f16f16f32(acc[2 * pair], high[step], b.x, b.y);
          ptx::mma_m16n8k16_f16f16f32(acc[2 * pair + 1], high[step], b.z, b.w);
          ptx::mma_m16n8k16_f16f16f32(acc[2 * pair], low[step], b.x, b.y);
          ptx::mma_m16n8k16_f16f16f32(acc[2 * pair + 1], low[step], b.z, b.w);
          if (use_low) {
            const uint4 b_low = s_rotation.low[at][step][lane];
            ptx::mma_m16n8k16_f16f16f32(acc[2 * pair], high[step], b_low.x, b_low.y);
            ptx::mma_m16n8k16_f16f16f32(acc[2 * pair + 1], high[step], b_low.z, b_low.w);
          }
        }
      }
      // [4/4] c0, c1 of the four tiles are 8 consecutive dims of row g, c2, c3 those of row g + 8.
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float v[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] = acc[e / 2][2 * r + e % 2] * factors[r];
        if (tile.out[r] != nullptr) {
          write_values<T>(tile.out[r] + Map::output_dim(4 * group, t, 0) * sizeof(T), v,
                          p.aligned_output);
        }
      }
    }
  }
}

}  // namespace tq4
