// Tiles of x for encode_kernel: configuration, loads, A fragments, norms.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../ptx/ldmatrix.cuh"
#include "../ptx/opaque.cuh"
#include "../ptx/quantise.cuh"
#include "../ptx/smem.cuh"
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
  // A launch uses as many as have room for their tiles in shared memory.  With 16 warps 128
  // registers a thread are left, just not enough for two passes.
  static constexpr int kMaxWarps = D < 256 ? 16 : kElementBytes == 2 ? 12 : 8;
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

// Touches another line of the parameters in each of four warps, for the reason given in
// parameter_lines.cuh.  Says false, since the words are upper halves of pointers and a shift.
__device__ __forceinline__ bool touch_line(const EncodeParams& p) {
  static_assert(offsetof(EncodeParams, sides[0].x) == 0 &&
                    offsetof(EncodeParams, sides[0].norms) == 64 &&
                    offsetof(EncodeParams, sides[1].codes) == 128 &&
                    offsetof(EncodeParams, heads.shift2) == 196,
                "words 16 i + 1");
  return reinterpret_cast<const uint32_t*>(&p)[threadIdx.x / kWarpSize % 4 * 16 + 1] == ~0u;
}

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
                                          const EncodeSide& side, int tile_idx, uint64_t policy) {
  constexpr int kChunks = C::kHeadDim * C::kElementBytes / 64;
  const int g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
  const int row = tile_idx * 16 + own_row();
  // Rows past the end are read as the last one and not written.
  const uint32_t clamped = min(row, p.num_rows - 1);
  const uint32_t token = p.heads.quotient(clamped), head = clamped - token * p.heads.divisor;
  const uint64_t own_x =
      reinterpret_cast<uint64_t>(side.x + token * side.token_stride + head * side.head_stride);
  // Opaque: with a uniform part of the address beside the policy, ptxas (CUDA 13.0) writes copies
  // that are illegal instructions.
  const uint32_t dst = ptx::opaque(s_tile + g * C::kRowBytes + 16 * t);
  if (p.aligned_input) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // One register pair and immediate offsets below, instead of a sum for each chunk.
      const uint8_t* x =
          ptx::opaque(reinterpret_cast<const uint8_t*>(from_owner(own_x, r)) + 16 * t);
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        ptx::cp_async_once<16>(dst + 8 * r * C::kRowBytes + 64 * i, x + 64 * i, policy);
      }
    }
  } else {
#pragma unroll 1
    for (int r = 0; r < 2; ++r) {
      const uint8_t* x = reinterpret_cast<const uint8_t*>(from_owner(own_x, r)) + 16 * t;
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
        ptx::st_shared_v4(dst + 8 * r * C::kRowBytes + 64 * i, words[0], words[1], words[2],
                          words[3]);
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

}  // namespace tq4
