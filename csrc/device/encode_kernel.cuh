// The kernel of store and compress: x [rows, D] -> codes and norms.  sm_80 and up.
//
// Per row (one token, one KV head):  n = |x|,  y = R x / (n + 1e-10),  index_i = number of
// boundaries below y_i, two indices a byte.
//
// A warp takes tiles of 16 rows, grid-strided, and shares nothing with other warps but tables:
//
//   global x  --cp.async-->  tile  --ldmatrix-->  A  --mma-->  accumulators  -->  codes in global
//   16 x D                   in shared            x R^T        y n, fp32          16 x D/2 bytes
//
// fragment_map.cuh chooses which dim is which fragment element, so that a lane accumulates D/4
// consecutive dims of two rows, that is D/8 consecutive bytes of codes each: no shuffles.  A tile
// has one buffer: once the products have consumed it, the next tile is fetched behind the
// quantiser, which takes most of the time.
//
// The rotation is recognised by its entries (rotation_fragments.cuh) and taken one of three ways:
//   none      block-diagonal identity: the products only move x into place
//   Hadamard  H_D = H_32 (x) H_(D/32): two k16 steps a group of 32 dims, with the matrix' column
//   signs
//             applied to x, then butterflies over the groups, which all lie in one lane's registers
//   general   all D/16 k16 steps against R = high + low in fp16 (error 2^-22 of the largest entry)
// For D = 128 and a tile that is 32 or 256 HMMA.  A dense product for every rotation would spend 12
// of the 18 cycles that HBM leaves a warp for 32 values (H200) on the tensor cores alone.
//
// Quantising, per value: FFMA.SAT, FFMA, SHFL, FFMA and 11/8 of packing (cell_table.cuh).
//
// Shared memory (dynamic): [R's fragments, only with a rotation][one x tile a warp]
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../layout.h"
#include "../ptx/arith.cuh"
#include "../ptx/dynamic_smem.cuh"
#include "../ptx/ldmatrix.cuh"
#include "../ptx/mma.cuh"
#include "../ptx/mma_bf16.cuh"
#include "../ptx/opaque.cuh"
#include "../ptx/quantise.cuh"
#include "../ptx/smem.cuh"
#include "cell_table.cuh"
#include "common.cuh"
#include "encode_params.h"
#include "fragment_map.cuh"
#include "rotation_fragments.cuh"

namespace tq4 {

template <typename T, int D>
struct EncodeConfig {
  using Element = T;
  using Map = FragmentMap<D>;
  static constexpr int kHeadDim = D;
  static constexpr int kElementBytes = sizeof(T);
  // Padded so that 8 rows of 16 bytes (ldmatrix), or 4 rows of 32 bytes (fp32), meet 32 banks.
  static constexpr int kRowBytes = D * kElementBytes + 8 * kElementBytes;
  static constexpr int kTileBytes = 16 * kRowBytes;
  // A launch uses as many as have room for their tiles in shared memory.
  static constexpr int kMaxWarps = D * kElementBytes > 512 ? 8 : 16;
  // R in shared memory: all of it, or for D = 256 slices of 32 columns, refilled for each round of
  // tiles.
  static constexpr int kSlices = D == 256 ? 8 : 1;
  static constexpr int kSliceTiles = Map::kTiles / kSlices;
  using Rotation = RotationFragments<D, kSliceTiles>;
  static constexpr int kSplits = std::is_same_v<T, float> ? 2 : 1;  // fp16 parts of an x
};

enum class RotationKind { kNone, kHadamard, kGeneral };

// acc[group][tile][c]: c0, c1 = row g, c2, c3 = row g + 8, dims code_dim(4 group + tile, t, 0..1).
template <class C>
using Accumulators = float[C::Map::kPassGroups][4][4];

// ---- Input.

// A value that all lanes hold alike, told to the compiler: branches on it need no divergent copies
// of the shuffles behind them.
__device__ __forceinline__ int warp_uniform(int value) { return __shfl_sync(kFullWarp, value, 0); }

// Row of a tile whose addresses this lane works out: g for even t, g + 8 for odd t.  The other
// lanes of the same g get them by shuffles, which is cheaper than every lane doing two rows.
__device__ __forceinline__ int own_row() {
  const int lane = threadIdx.x % kWarpSize;
  return lane / 4 + lane % 2 * 8;
}

// Value of the lane that owns row g + 8 r.
template <typename V>
__device__ __forceinline__ V from_owner(V value, int r) {
  return __shfl_sync(kFullWarp, value, r, 4);
}

// Where the lane's own row goes.
struct RowTarget {
  int64_t slot;  // negative: not stored
  uint32_t head;
  bool exists;  // false: past the last row
};

// Starts the loads of a tile: x to shared memory, four lanes a row, and the own row's slot.
template <class C>
__device__ __forceinline__ void load_tile(uint32_t s_tile, RowTarget& target, const EncodeParams& p,
                                          const EncodeSide& side, int tile_idx) {
  constexpr int kChunks = C::kHeadDim * C::kElementBytes / 64;
  const int g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
  const int row = tile_idx * 16 + own_row();
  // Rows past the end are read as the last one and not written.
  const uint32_t clamped = min(row, p.num_rows - 1);
  const uint32_t token = p.heads.quotient(clamped), head = clamped - token * p.heads.divisor;
  const uint64_t own_x =
      reinterpret_cast<uint64_t>(side.x + token * side.token_stride + head * side.head_stride);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // One register pair and immediate offsets below, instead of a sum for each chunk.
    const uint8_t* x = ptx::opaque(reinterpret_cast<const uint8_t*>(from_owner(own_x, r)) + 16 * t);
    const uint32_t dst = s_tile + (g + 8 * r) * C::kRowBytes + 16 * t;
    if (p.aligned_input) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) ptx::cp_async<16>(dst + 64 * i, x + 64 * i);
    } else {
#pragma unroll 1
      for (int i = 0; i < kChunks; ++i) {
        uint32_t words[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const uint8_t* word = x + 64 * i + 4 * w;
          if constexpr (C::kElementBytes == 4) {
            words[w] = __ldg(reinterpret_cast<const uint32_t*>(word));
          } else {
            const uint16_t* pair = reinterpret_cast<const uint16_t*>(word);
            words[w] = __ldg(pair) | static_cast<uint32_t>(__ldg(pair + 1)) << 16;
          }
        }
        ptx::st_shared_v4(dst + 64 * i, words[0], words[1], words[2], words[3]);
      }
    }
  }
  ptx::cp_async_commit();
  // Nothing may depend on the slot here: it is needed only when the tile is written.
  target.exists = row < p.num_rows;
  target.head = head;
  target.slot = token;
  if (p.slot_mapping != nullptr) target.slot = __ldg(p.slot_mapping + token);
}

// The lane's pairs of an A fragment of x, in fp32: [i] is register a_i.
template <class C>
struct PairFragment {
  float2 v[4];
};

// x of one k16 step, as A fragment of 16-bit pairs.
template <class C>
__device__ __forceinline__ void load_fragment(uint32_t (&a)[4], uint32_t s_tile, int step) {
  static_assert(C::kElementBytes == 2, "ldmatrix moves 16-bit elements");
  const int lane = threadIdx.x % kWarpSize;
  ptx::ldmatrix_x4(a, s_tile + lane % 16 * C::kRowBytes +
                          C::Map::input_dim(step, lane / 16, 0, 0) * C::kElementBytes);
}

template <class C>
__device__ __forceinline__ void load_fragment(PairFragment<C>& a, uint32_t s_tile, int step) {
  if constexpr (C::kElementBytes == 4) {
    const int g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint2 pair = ptx::ld_shared_v2(s_tile + (g + i % 2 * 8) * C::kRowBytes +
                                           C::Map::input_dim(step, i / 2, t, 0) * C::kElementBytes);
      a.v[i] = {__uint_as_float(pair.x), __uint_as_float(pair.y)};
    }
  } else {
    uint32_t words[4];
    load_fragment<C>(words, s_tile, step);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<typename C::Element, __nv_bfloat16>) {
        a.v[i] = {__uint_as_float(words[i] << 16), __uint_as_float(words[i] & 0xffff0000u)};
      } else {
        a.v[i] = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
      }
    }
  }
}

// ---- Norms.  Rows g and g + 8 belong to the four lanes of one g.

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}

template <class C>
__device__ __forceinline__ void find_norms_of_input(uint32_t s_tile, float (&norms)[2]) {
  float sums[2] = {0.f, 0.f};
#pragma unroll 4
  for (int step = 0; step < C::Map::kSteps; ++step) {
    PairFragment<C> x;
    load_fragment<C>(x, s_tile, step);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[i % 2] = fmaf(x.v[i].x, x.v[i].x, sums[i % 2]);
      sums[i % 2] = fmaf(x.v[i].y, x.v[i].y, sums[i % 2]);
    }
  }
  norms[0] = ptx::sqrt_approx(quad_sum(sums[0]));
  norms[1] = ptx::sqrt_approx(quad_sum(sums[1]));
}

template <class C>
__device__ __forceinline__ void find_norms_of_groups(const Accumulators<C>& acc, float unit,
                                                     float (&norms)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 8 * C::Map::kPassGroups; ++i) {
      const float v = acc[i / 8][i / 2 % 4][i % 2 + 2 * r];
      sum = fmaf(v, v, sum);
    }
    norms[r] = ptx::sqrt_approx(quad_sum(sum) * unit);
  }
}

// ---- None and Hadamard: groups of 32 dims.

// acc[tile] += x B for the four column tiles of a group.  x is exact: 16-bit elements as they are,
// fp32 as the sum of three bf16, each the truncation of what is left.
template <class C>
__device__ __forceinline__ void multiply_group(float (&acc)[4][4], uint32_t s_tile, int step,
                                               const uint32_t (&signs)[2],
                                               const uint32_t (&b)[4][2]) {
  uint32_t a[4];
  if constexpr (C::kElementBytes == 2) {
    load_fragment<C>(a, s_tile, step);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] ^= signs[i / 2];
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
      if constexpr (std::is_same_v<typename C::Element, __half>) {
        ptx::mma_m16n8k16_f16f16f32(acc[tile], a, b[tile][0], b[tile][1]);
      } else {
        ptx::mma_m16n8k16_bf16bf16f32(acc[tile], a, b[tile][0], b[tile][1]);
      }
    }
  } else {
    PairFragment<C> rest;
    load_fragment<C>(rest, s_tile, step);
#pragma unroll
    for (int part = 0; part < 3; ++part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t x = __float_as_uint(rest.v[i].x), y = __float_as_uint(rest.v[i].y);
        a[i] = ptx::prmt(x, y, 0x7632) ^ signs[i / 2];
        rest.v[i].x -= __uint_as_float(x & 0xffff0000u);
        rest.v[i].y -= __uint_as_float(y & 0xffff0000u);
      }
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) {
        ptx::mma_m16n8k16_bf16bf16f32(acc[tile], a, b[tile][0], b[tile][1]);
      }
    }
  }
}

// The square of this is a power of two too, and small enough that sums of squares of rotated rows
// overflow no earlier than those of x.
inline constexpr float kGroupUnit = 0.125f;

// Tables of the none and Hadamard ways.
struct GroupTables {
  uint4 fragments[2][2][kWarpSize];  // B of step s, tiles 2 pair, 2 pair + 1: [s][pair][lane]
  uint2 signs[32][4];                // flips of x: [step][t] for high = 0, 1
};

// B is the identity, or H_32 times kGroupUnit.
template <class C>
__device__ __forceinline__ void fill_group_tables(GroupTables& tables, const float* rotation) {
  using Map = typename C::Map;
  constexpr bool kHalf = std::is_same_v<typename C::Element, __half>;
  constexpr uint32_t kOne = kHalf ? 0x3c00u : 0x3f80u;
  constexpr uint32_t kUnit = kHalf ? 0x3000u : 0x3e00u;
  for (int i = threadIdx.x; i < 2 * 2 * kWarpSize * 4; i += blockDim.x) {
    const int s = i / (kWarpSize * 8), tile = i / (kWarpSize * 4) % 2 * 2 + i / 2 % 2;
    const int lane = i / 4 % kWarpSize, high = i % 2;
    const int n = Map::code_dim(tile, lane / 8, lane / 4 % 2);
    const int k = Map::input_dim(s, high, lane % 4, 0);
    uint32_t bits;
    if (rotation == nullptr) {
      bits = (n == k ? kOne : 0u) | (n == k + 1 ? kOne << 16 : 0u);
    } else {
      bits = (kUnit | static_cast<uint32_t>(__popc(n & k) % 2) << 15) |
             (kUnit | static_cast<uint32_t>(__popc(n & (k + 1)) % 2) << 15) << 16;
    }
    reinterpret_cast<uint32_t*>(tables.fragments)[i] = bits;
  }
  for (int i = threadIdx.x; i < Map::kSteps * 4 * 2; i += blockDim.x) {
    uint32_t flips = 0;
    if (rotation != nullptr) {  // row 0 holds the column signs
      const uint2 pair =
          *reinterpret_cast<const uint2*>(rotation + Map::input_dim(i / 8, i % 2, i / 2 % 4, 0));
      flips = (pair.x >> 16 & 0x8000u) | (pair.y & 0x80000000u);
    }
    reinterpret_cast<uint32_t*>(tables.signs)[i] = flips;
  }
}

// One pass of the none and Hadamard ways, before the butterflies.
template <class C>
__device__ __forceinline__ void multiply_groups(Accumulators<C>& acc, uint32_t s_tile,
                                                const GroupTables& tables, bool hadamard,
                                                int pass) {
  using Map = typename C::Map;
  const int lane = threadIdx.x % kWarpSize, t = lane % 4;
#pragma unroll
  for (int i = 0; i < 16 * Map::kPassGroups; ++i) acc[i / 16][i / 4 % 4][i % 4] = 0.f;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const uint4 b01 = tables.fragments[s][0][lane], b23 = tables.fragments[s][1][lane];
    const uint32_t b[4][2] = {{b01.x, b01.y}, {b01.z, b01.w}, {b23.x, b23.y}, {b23.z, b23.w}};
#pragma unroll
    for (int half = 0; half < Map::kPasses; ++half) {
      // With two passes the butterfly between groups 4 apart, (u, v) -> (u + v, u - v), is done by
      // the accumulation: the first pass is the sum, the second the difference.
      if (Map::kPasses == 2 && !hadamard && half != pass) continue;
      const uint32_t flip = half == 1 && pass == 1 && hadamard ? 0x80008000u : 0u;
#pragma unroll
      for (int j = 0; j < Map::kPassGroups; ++j) {
        const int step = 2 * (half * Map::kPassGroups + j) + s;
        const uint2 table_signs = tables.signs[step][t];
        const uint32_t signs[2] = {table_signs.x ^ flip, table_signs.y ^ flip};
        multiply_group<C>(acc[j], s_tile, step, signs, b);
      }
    }
  }
}

template <class C>
__device__ __forceinline__ void butterflies(Accumulators<C>& acc) {
#pragma unroll
  for (int stage = 1; stage < C::Map::kPassGroups; stage *= 2) {
#pragma unroll
    for (int j = 0; j < C::Map::kPassGroups; ++j) {
      if ((j & stage) || j + stage >= C::Map::kPassGroups) continue;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        float& u = acc[j][i / 4][i % 4];
        float& v = acc[j + stage][i / 4][i % 4];
        const float sum = u + v, difference = u - v;
        u = sum;
        v = difference;
      }
    }
  }
}

// ---- General: all k16 steps against R's fragments.

// Power of two that brings a row of norm n to about 2^14, so that its fp16 parts keep their
// precision. fp16 rows need none.
template <class C>
__device__ __forceinline__ float general_row_scale(float norm) {
  if constexpr (std::is_same_v<typename C::Element, __half>) return 1.f;
  const int exponent = static_cast<int>(__float_as_uint(norm) >> 23);  // norm >= 0
  return __uint_as_float(static_cast<uint32_t>(min(max(2 * 127 + 14 - exponent, 1), 254)) << 23);
}

// x of one k16 step as the sum of kSplits fp16 fragments, rows g and g + 8 scaled.
template <class C>
__device__ __forceinline__ void load_fp16_fragments(uint32_t (&a)[C::kSplits][4], uint32_t s_tile,
                                                    int step, const float (&row_scale)[2]) {
  if constexpr (std::is_same_v<typename C::Element, __half>) {
    load_fragment<C>(a[0], s_tile, step);
  } else {
    PairFragment<C> x;
    load_fragment<C>(x, s_tile, step);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float u = x.v[i].x * row_scale[i % 2], v = x.v[i].y * row_scale[i % 2];
      a[0][i] = ptx::pack_f16x2(u, v);
      if constexpr (C::kSplits == 2) {
        const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&a[0][i]));
        a[1][i] = ptx::pack_f16x2(u - high.x, v - high.y);
      }
    }
  }
}

// acc = x R^T for the columns of one pass.  s_rotation holds R's fragments already unless they come
// in several slices; those are filled here, and all warps of the CTA must take part.
template <class C>
__device__ __forceinline__ void multiply_general(Accumulators<C>& acc, uint32_t s_tile,
                                                 typename C::Rotation& s_rotation,
                                                 const float* rotation, float rotation_scale,
                                                 const float (&row_scale)[2], int pass) {
  using Map = typename C::Map;
  constexpr int kPassSlices = C::kSlices == 1 ? 1 : C::kSlices / Map::kPasses;
  constexpr int kSliceGroups = Map::kPassGroups / kPassSlices;
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < 16 * Map::kPassGroups; ++i) acc[i / 16][i / 4 % 4][i % 4] = 0.f;
#pragma unroll
  for (int slice = 0; slice < kPassSlices; ++slice) {
    if constexpr (C::kSlices > 1) {
      __syncthreads();  // every warp has read the previous slice
      fill_rotation_fragments<C::kHeadDim, C::kSliceTiles, true>(
          s_rotation, rotation, rotation_scale, (pass * kPassSlices + slice) * C::kSliceTiles);
      __syncthreads();  // the slice is complete before any warp reads it
    }
    // Group by group: with all columns at once the compiler fetches more fragments than fit in
    // registers.
#pragma unroll
    for (int group = 0; group < kSliceGroups; ++group) {
#pragma unroll 2
      for (int step = 0; step < Map::kSteps; ++step) {
        uint32_t a[C::kSplits][4];
        load_fp16_fragments<C>(a, s_tile, step, row_scale);
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const uint4 high = s_rotation.high[group * 2 + pair][step][lane];
          const uint4 low = s_rotation.low[group * 2 + pair][step][lane];
          float (&even)[4] = acc[slice * kSliceGroups + group][2 * pair];
          float (&odd)[4] = acc[slice * kSliceGroups + group][2 * pair + 1];
          ptx::mma_m16n8k16_f16f16f32(even, a[0], high.x, high.y);
          ptx::mma_m16n8k16_f16f16f32(odd, a[0], high.z, high.w);
          ptx::mma_m16n8k16_f16f16f32(even, a[0], low.x, low.y);
          ptx::mma_m16n8k16_f16f16f32(odd, a[0], low.z, low.w);
          if constexpr (C::kSplits == 2) {
            ptx::mma_m16n8k16_f16f16f32(even, a[1], high.x, high.y);
            ptx::mma_m16n8k16_f16f16f32(odd, a[1], high.z, high.w);
          }
        }
      }
    }
  }
}

// ---- Quantise.

struct Quantiser {
  CellAxis axis;
  float even_intercept, odd_intercept;  // of the cell with this lane's number
  bool exact;                           // the cell table is usable (uniform over the warp)
};

// The codebook of a CTA.
struct Boundaries {
  float value[kNumBoundaries + 1];
  float position[kNumBoundaries + 1];  // of value[i], see cell_table.cuh
};

__device__ __forceinline__ Quantiser make_quantiser(const Boundaries& boundaries) {
  Quantiser quantiser;
  quantiser.axis = make_cell_axis(boundaries.value[0], boundaries.value[kNumBoundaries - 1]);
  const Cell cell = make_cell(boundaries.position, threadIdx.x % kWarpSize);
  quantiser.even_intercept = cell.even_intercept;
  quantiser.odd_intercept = cell.odd_intercept;
  quantiser.exact = warp_uniform(__all_sync(kFullWarp, cell.exact));
  return quantiser;
}

// Bits of r; see cell_table.cuh.
__device__ __forceinline__ uint32_t cell_line(float x, float scale, float bias, float intercepts) {
  constexpr float kMagic = 8388608.f;  // 2^23: the sum's low bits are the rounded integer
  const float u = ptx::fma_sat(x, scale, bias);
  const int cell = __float_as_int(fmaf(u, kCellSpan, kMagic));  // shfl uses the low 5 bits
  return __float_as_uint(fmaf(u, kCellStep, __shfl_sync(kFullWarp, intercepts, cell)));
}

// words[r][w]: the lane's codes of row g + 8 r; y = acc * scales[r].  Destroys acc.
template <class C>
__device__ __forceinline__ void quantise(Accumulators<C>& acc, const float (&scales)[2],
                                         const Quantiser& quantiser, const Boundaries& boundaries,
                                         uint32_t (&words)[2][C::Map::kPassGroups]) {
  using Map = typename C::Map;
  if (quantiser.exact) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float scale = scales[r] * quantiser.axis.scale;
#pragma unroll
      for (int w = 0; w < Map::kPassGroups; ++w) {
        uint32_t bytes[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          bytes[j] = merge_nibbles(
              cell_line(acc[w][j][2 * r], scale, quantiser.axis.bias, quantiser.even_intercept),
              cell_line(acc[w][j][2 * r + 1], scale, quantiser.axis.bias, quantiser.odd_intercept));
        }
        words[r][w] = merge_bytes(bytes[0], bytes[1], bytes[2], bytes[3]);
      }
    }
    return;
  }
  // The definition itself: a nibble counts the boundaries below y; 15 cannot overflow it.
#pragma unroll
  for (int i = 0; i < 16 * Map::kPassGroups; ++i)
    acc[i / 16][i / 4 % 4][i % 4] *= scales[i / 2 % 2];
#pragma unroll
  for (int i = 0; i < 2 * Map::kPassGroups; ++i) words[i % 2][i / 2] = 0;
#pragma unroll 1
  for (int i = 0; i < kNumBoundaries; ++i) {
    const float boundary = boundaries.value[i];
#pragma unroll
    for (int w = 0; w < Map::kPassGroups; ++w) {
#pragma unroll
      for (int e = 0; e < 16; ++e) {
        const int r = e / 8;
        if (acc[w][e / 2 % 4][2 * r + e % 2] > boundary) words[r][w] += 1u << nibble_shift(e % 8);
      }
    }
  }
}

// Sum of the squared centroids behind the codes of a row (this lane's share).
template <int kWords>
__device__ __forceinline__ float decoded_square_sum(const uint32_t (&words)[kWords],
                                                    float squared_centroids) {
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      // The table repeats after 16 lanes, so the fifth bit of the lane number does not matter.
      sum += __shfl_sync(kFullWarp, squared_centroids, static_cast<int>(words[w] >> (4 * e)));
    }
  }
  return sum;
}

// ---- Write.

template <int kWords>
__device__ __forceinline__ void write_words(uint8_t* p, const uint32_t (&words)[kWords],
                                            int width) {
  if (kWords == 4 && width == 16) {
    *reinterpret_cast<uint4*>(p) = make_uint4(words[0], words[1], words[2], words[kWords - 1]);
  } else if (kWords % 2 == 0 && width >= 8) {
#pragma unroll
    for (int w = 0; w + 1 < kWords; w += 2) {
      *reinterpret_cast<uint2*>(p + 4 * w) = make_uint2(words[w], words[w + 1]);
    }
  } else {
#pragma unroll
    for (int w = 0; w < kWords; ++w) *reinterpret_cast<uint32_t*>(p + 4 * w) = words[w];
  }
}

// The code bytes and the norm of a row.
struct RowPointers {
  uint8_t* codes;  // null: not stored
  float* norm;
};

__device__ __forceinline__ RowPointers find_pointers(const EncodeParams& p, const EncodeSide& side,
                                                     const RowTarget& target) {
  const uint32_t slot = static_cast<uint32_t>(target.slot);
  const uint32_t block = p.block.quotient(slot), offset = slot - block * p.block.divisor;
  RowPointers row;
  row.codes = side.codes + block * p.code_block_stride +
              (offset * p.code_token_stride + target.head * p.code_head_stride);
  row.norm =
      reinterpret_cast<float*>(side.norms + block * p.norm_block_stride +
                               (offset * p.norm_token_stride + target.head * p.norm_head_stride));
  if (target.slot < 0 || !target.exists) row.codes = nullptr;
  return row;
}

// ---- The kernel.

// Static shared memory.
struct EncodeTables {
  GroupTables groups;
  Boundaries boundaries;
  uint32_t scratch;
};

template <class C>
__global__ void __launch_bounds__(C::kMaxWarps* kWarpSize, 1)
    encode_kernel(const __grid_constant__ EncodeParams p) {
  using Map = typename C::Map;
  uint8_t* const s_dynamic = ptx::dynamic_shared();
  auto& s_rotation = *reinterpret_cast<typename C::Rotation*>(s_dynamic);
  __shared__ EncodeTables s_tables;

  const int warp = warp_uniform(threadIdx.x / kWarpSize);
  const int lane = threadIdx.x % kWarpSize, t = lane % 4;
  const int num_warps = blockDim.x / kWarpSize;
  const EncodeSide& side = p.sides[blockIdx.x % p.num_sides];
  const int cta = blockIdx.x / p.num_sides, num_ctas = gridDim.x / p.num_sides;
  const int num_tiles = (p.num_rows - 1) / 16 + 1, tile_stride = num_ctas * num_warps;
  const bool any_rotation = p.sides[0].rotation != nullptr || p.sides[1].rotation != nullptr;
  const uint32_t s_tile = ptx::smem_address(s_dynamic) +
                          (any_rotation ? sizeof(typename C::Rotation) : 0) + warp * C::kTileBytes;
  // CTAs first: a few tiles spread over all SMs, and the last round's over all SMs too.
  int tile_idx = warp * num_ctas + cta;

  // [1/6] Start the first tile's loads: they fly while the tables are made.
  // Warps without a tile load nothing: all of them at the last row's address is 30 us (H200).
  RowTarget target{-1, 0, false};
  if (tile_idx < num_tiles) load_tile<C>(s_tile, target, p, side, tile_idx);

  // [2/6] Tables.  Their loads are started together and used after the scan of R, which waits
  // anyway.
  const int own = min(static_cast<int>(threadIdx.x), kNumBoundaries - 1);
  const float boundary = side.boundaries[own], first_boundary = side.boundaries[0];
  const float last_boundary = side.boundaries[kNumBoundaries - 1];
  const float centroid = side.centroids[lane % kNumCentroids];
  RotationKind kind = RotationKind::kNone;
  float gain = 1.f, rotation_scale = 1.f;
  if (side.rotation != nullptr) {
    const RotationScan scan = scan_rotation<C::kHeadDim>(side.rotation, &s_tables.scratch);
    kind = warp_uniform(scan.hadamard) ? RotationKind::kHadamard : RotationKind::kGeneral;
    rotation_scale = scale_of_rotation(scan.largest);
    gain = scan.hadamard ? scan.largest / kGroupUnit : 1.f / rotation_scale;
  }
  if (kind == RotationKind::kGeneral) {
    if constexpr (C::kSlices == 1) {
      fill_rotation_fragments<C::kHeadDim, C::kSliceTiles, true>(s_rotation, side.rotation,
                                                                 rotation_scale, 0);
    }
  } else {
    fill_group_tables<C>(s_tables.groups, side.rotation);
  }
  if (threadIdx.x < kNumBoundaries) {
    const CellAxis axis = make_cell_axis(first_boundary, last_boundary);
    s_tables.boundaries.value[threadIdx.x] = boundary;
    s_tables.boundaries.position[threadIdx.x] =
        boundary_position(axis, first_boundary, last_boundary, boundary);
  }
  __syncthreads();  // the tables are complete before any warp reads them; the last barrier of warps
                    // that share nothing else (but for the slices of a general D = 256 rotation)
  const Quantiser quantiser = make_quantiser(s_tables.boundaries);

  const bool keep_together = C::kSlices > 1 && kind == RotationKind::kGeneral;
  for (int first_tile = 0; first_tile < num_tiles; first_tile += tile_stride) {
    if (tile_idx >= num_tiles && !keep_together) break;
    tile_idx += tile_stride;
    const RowTarget current = target;
    ptx::cp_async_wait<0>();
    __syncwarp();  // every lane's part of the tile has arrived
    float norms[2], row_scale[2] = {1.f, 1.f}, decoded[2] = {0.f, 0.f};
#pragma unroll
    for (int pass = 0; pass < Map::kPasses; ++pass) {
      // [3/6] Rotate.  Norms come from x, except that products with groups keep the sum of squares
      // (up to a constant): there the accumulators give it without converting x to fp32.
      Accumulators<C> acc;
      if (pass == 0 && (Map::kPasses > 1 || kind == RotationKind::kGeneral)) {
        find_norms_of_input<C>(s_tile, norms);
      }
      if (kind == RotationKind::kGeneral) {
        row_scale[0] = general_row_scale<C>(norms[0]);
        row_scale[1] = general_row_scale<C>(norms[1]);
        multiply_general<C>(acc, s_tile, s_rotation, side.rotation, rotation_scale, row_scale,
                            pass);
      } else {
        const bool hadamard = kind == RotationKind::kHadamard;
        multiply_groups<C>(acc, s_tile, s_tables.groups, hadamard, pass);
        if (Map::kPasses == 1) {
          // |H_32 x|^2 = 32 |x|^2
          const float unit = hadamard ? 1.f / (32.f * kGroupUnit * kGroupUnit) : 1.f;
          find_norms_of_groups<C>(acc, unit, norms);
        }
        if (hadamard) butterflies<C>(acc);
      }
      // [4/6] The products have consumed x: fetch the next tile.
      if (pass == Map::kPasses - 1) {
        __syncwarp();  // every lane has read its part of x before it is overwritten
        if (tile_idx < num_tiles) load_tile<C>(s_tile, target, p, side, tile_idx);
      }
      // [5/6] Quantise and pack.
      float scales[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        scales[r] = gain * ptx::rcp_approx((norms[r] + kNormEpsilon) * row_scale[r]);
      }
      uint32_t words[2][Map::kPassGroups];
      quantise<C>(acc, scales, quantiser, s_tables.boundaries, words);
      if (p.norm_correction) {
#pragma unroll
        for (int r = 0; r < 2; ++r) decoded[r] += decoded_square_sum(words[r], centroid * centroid);
      }
      // [6/6] Write.
      const RowPointers own = find_pointers(p, side, current);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint8_t* codes =
            reinterpret_cast<uint8_t*>(from_owner(reinterpret_cast<uint64_t>(own.codes), r));
        if (codes != nullptr) {
          write_words(codes + t * Map::kQuarterBytes + pass * 16, words[r], p.code_width);
        }
      }
      if (pass == Map::kPasses - 1) {  // which knows all codes of the row
        if (p.norm_correction) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            // A row of zero centroids decodes to zero whatever its norm.
            const float length = __fsqrt_rn(quad_sum(decoded[r]));
            norms[r] = length > 0.f ? __fdiv_rn(norms[r], length) : 0.f;
          }
        }
        if (t < 2 && own.codes != nullptr) *own.norm = t == 0 ? norms[0] : norms[1];
      }
    }
  }
}

}  // namespace tq4
