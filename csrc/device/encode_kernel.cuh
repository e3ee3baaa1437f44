// The kernel of store and compress: x [rows, D] -> codes and norms.  sm_80 and up.  Where no
// rotation is given as a matrix, encode_rows.cuh does few rows instead and, on Hopper,
// encode_wgmma.cuh does many.
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
// consecutive dims of two rows, that is D/8 consecutive bytes of codes each: no shuffles.  A warp
// has two buffers for tiles where shared memory has room: the next tile is fetched while this one
// is worked on.  With one, it is fetched once the products have consumed this one, behind the
// quantiser.
//
// The rotation is given by its signs, or recognised by its entries (rotation_fragments.cuh), and
// taken one of three ways:
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
#include <cstdint>

#include "../layout.h"
#include "../ptx/arith.cuh"
#include "../ptx/dynamic_smem.cuh"
#include "../ptx/smem.cuh"
#include "encode_input.cuh"
#include "encode_params.h"
#include "encode_quantise.cuh"
#include "encode_rotate.cuh"
#include "rotation_fragments.cuh"
#include "warp.cuh"

namespace tq4 {

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
  uint32_t scratch;
};

template <class C>
__global__ void __launch_bounds__(C::kMaxWarps* kWarpSize, 1)
    encode_kernel(const __grid_constant__ EncodeParams p) {
  using Map = typename C::Map;
  uint8_t* const s_dynamic = ptx::dynamic_shared();
  auto& s_rotation = *reinterpret_cast<typename C::Rotation*>(s_dynamic);
  __shared__ EncodeTables s_tables;
  if (touch_line(p)) return;

  const int warp = warp_index();
  const int lane = threadIdx.x % kWarpSize, t = lane % 4;
  const int num_warps = blockDim.x / kWarpSize;
  const int two_sides = p.num_sides - 1;
  const EncodeSide& side = p.sides[blockIdx.x & two_sides];
  const int cta = blockIdx.x >> two_sides, num_ctas = gridDim.x >> two_sides;
  const int num_tiles = (p.num_rows - 1) / 16 + 1, tile_stride = num_ctas * num_warps;
  const uint32_t s_tile = ptx::smem_address(s_dynamic) +
                          (p.has_matrix ? sizeof(typename C::Rotation) : 0) +
                          warp * p.tile_buffers * C::kTileBytes;
  const bool ahead = p.tile_buffers == 2;
  // CTAs first: a few tiles spread over all SMs, and the last round's over all SMs too.
  int tile_idx = warp * num_ctas + cta;

  // [1/6] Start the loads.  Those of the tables are few and come first: behind the first tiles of
  // all SMs they would take as long as the tiles.
  // Warps without a tile load none: all of them at the last row's address is 30 us (H200).
  const float boundary = __ldg(side.boundaries + min(lane, kNumBoundaries - 1));
  const float centroid = __ldg(side.centroids + lane % kNumCentroids);
  uint2 signs = {0, 0};
  const uint32_t flip = threadIdx.x;
  if (side.rotation != nullptr && flip < kFlipWords<C>) signs = load_signs<C>(side.rotation, flip);
  signs = {ptx::opaque(signs.x), ptx::opaque(signs.y)};  // nothing made of them here would wait
  RowTarget target{-1, 0, false};
  const uint64_t policy = ptx::read_once_policy();
  if (tile_idx < num_tiles) load_tile<C>(s_tile, target, p, side, tile_idx, policy);

  // [2/6] Tables.
  RotationKind kind = RotationKind::kNone;
  float gain = 1.f, rotation_scale = 1.f;
  if (side.signs) {
    kind = RotationKind::kHadamard;
    gain = side.entry / kGroupUnit;
  } else if (side.rotation != nullptr) {
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
    fill_fragments<C>(s_tables.groups, kind == RotationKind::kHadamard);
    uint32_t* const flips = reinterpret_cast<uint32_t*>(s_tables.groups.signs);
    if (flip < kFlipWords<C>) flips[flip] = flips_of(signs);
#pragma unroll 1
    for (uint32_t i = flip + blockDim.x; i < kFlipWords<C>; i += blockDim.x) {  // CTAs of few warps
      flips[i] = side.rotation != nullptr ? flips_of(load_signs<C>(side.rotation, i)) : 0;
    }
  }
  const Quantiser quantiser = make_quantiser(boundary);
  __syncthreads();  // the tables are complete before any warp reads them; the last barrier of warps
                    // that share nothing else (but for the slices of a general D = 256 rotation)

  const bool keep_together = C::kSlices > 1 && kind == RotationKind::kGeneral;
  uint32_t s_now = s_tile;
  for (int first_tile = 0; first_tile < num_tiles; first_tile += tile_stride) {
    if (tile_idx >= num_tiles && !keep_together) break;
    tile_idx += tile_stride;
    const RowTarget current = target;
    const uint32_t s_next = 2 * s_tile + C::kTileBytes - s_now;
    if (ahead) {
      if (tile_idx < num_tiles) {
        load_tile<C>(s_next, target, p, side, tile_idx, policy);
      } else {
        target.exists = false;  // a warp that stays only for the others' barriers writes nothing
        ptx::cp_async_commit();
      }
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    __syncwarp();  // every lane's part of the tile has arrived
    float norms[2], row_scale[2] = {1.f, 1.f}, decoded[2] = {0.f, 0.f};
#pragma unroll
    for (int pass = 0; pass < Map::kPasses; ++pass) {
      // [3/6] Rotate.  Norms come from x, except that products with groups keep the sum of squares
      // (up to a constant): there the accumulators give it without converting x to fp32.
      Accumulators<C> acc;
      if (pass == 0 && (Map::kPasses > 1 || kind == RotationKind::kGeneral)) {
        find_norms_of_input<C>(s_now, norms);
      }
      if (kind == RotationKind::kGeneral) {
        row_scale[0] = general_row_scale<C>(norms[0]);
        row_scale[1] = general_row_scale<C>(norms[1]);
        multiply_general<C>(acc, s_now, s_rotation, side.rotation, rotation_scale, row_scale, pass);
      } else {
        const bool hadamard = kind == RotationKind::kHadamard;
        multiply_groups<C>(acc, s_now, s_tables.groups, hadamard, pass);
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
        if (ahead) {
          s_now = s_next;
        } else if (tile_idx < num_tiles) {
          load_tile<C>(s_tile, target, p, side, tile_idx, policy);
        } else {
          target.exists = false;  // a warp that stays only for the others' barriers writes nothing
        }
      }
      // [5/6] Quantise and pack.
      float scales[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        scales[r] = gain * ptx::rcp_approx((norms[r] + kNormEpsilon) * row_scale[r]);
      }
      uint32_t words[2][Map::kPassGroups];
      quantise<C>(acc, scales, quantiser, words);
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
