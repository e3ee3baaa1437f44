// The kernel of store and compress for many rows on Hopper, sm_90a: x [rows, D] of fp16 or bf16,
// 16-byte aligned, whose rotation is none or given by its signs -> codes and norms as in
// encode_kernel.cuh.
//
// A warpgroup takes tiles of 64 rows, grid-strided; each of its warps brings its own 16 of them and
// shares nothing with others but B:
//
//   global x  --cp.async-->  tile  --ldmatrix-->  A  --wgmma-->  accumulators  -->  codes in global
//   16 x D                   in shared                x B        y n, fp32          16 x D/2 bytes
//
//   B = diag(signs) H times a power of two, or the identity; exact.  Its columns are in the order
//       of FragmentMap::code_dim, so that a lane accumulates D/4 consecutive dims of rows g, g + 8.
//
// A goes through registers: what cp.async wrote, the tensor cores may read from shared memory only
// behind a proxy fence of every thread and a barrier of the warpgroup, before each tile.  A warp
// that reads its rows itself waits for nobody.
//
// Beside encode_kernel.cuh, per warp and 16 rows: one product in the place of signs, 32 products
// and butterflies, 540 instructions instead of 890 (D = 128).  A tile's place is free once it is in
// registers, so that with two of them two tiles are in flight while a third is worked on.  16 warps
// of 128 registers: while the tensor cores have one warpgroup's tile (512 cycles), the other three
// quantise.  12 warps with the next tile's products beside this one's quantising would be two sets
// of accumulators in turn, so twice the code to fetch, for what the other warpgroups hide already.
//
// A tile's place is filled anew behind the issue of its products, not in front: the tensor cores
// begin 45 instructions earlier (D = 128) and multiply while the copies are issued.  Four lanes
// copy a row, so that an instruction asks for 64 bytes of it, half a line; a hint has the L2 fetch
// the line whole.
//
// Shared memory (dynamic): [B][tiles of warp 0: 2][of 1] ...
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../layout.h"
#include "../ptx/arith.cuh"
#include "../ptx/dynamic_smem.cuh"
#include "../ptx/global_access.cuh"
#include "../ptx/ldmatrix.cuh"
#include "../ptx/opaque.cuh"
#include "../ptx/quantise.cuh"
#include "../ptx/smem.cuh"
#include "../ptx/wgmma.cuh"
#include "encode_cells.cuh"
#include "encode_input.cuh"
#include "encode_params.h"
#include "encode_quantise.cuh"
#include "fragment_map.cuh"
#include "warp.cuh"
#include "wgmma_image.cuh"

namespace tq4 {

template <typename T, int D>
struct EncodeWgmmaConfig {
  static_assert(sizeof(T) == 2 && (D == 64 || D == 128), "what the products and registers are for");
  using Element = T;
  using Map = FragmentMap<D>;
  static constexpr int kHeadDim = D;
  static constexpr int kWarpgroups = 4;
  static constexpr int kGroupThreads = 128;
  static constexpr int kThreads = kWarpgroups * kGroupThreads;
  static constexpr int kTileRows = 64;
  static constexpr int kWords = D / 32;           // of codes, of a lane's part of a row
  using Tile = KeyMajorImage<2 * D, 16>;          // a warp's rows; 2 D: bytes
  using Matrix = KeyMajorImage<2 * D, D>;         // B: row = column of the product
  static constexpr int kRing = 2 * Tile::kBytes;  // of a warp
  static constexpr int kSmemBytes = Matrix::kBytes + kThreads / kWarpSize * kRing;
  // Entries of B.  D squares of it are at most 1: sums of squares of rotated rows overflow no
  // earlier than those of x.
  static constexpr float kUnit = D == 128 ? 0.0625f : 0.125f;
};

// Whether the kernel can do it; T is a 16-bit type, D 64 or 128.
inline bool encode_wgmma_takes(const EncodeParams& p, int head_dim) {
  return (head_dim == 64 || head_dim == 128) && !p.has_matrix && p.aligned_input &&
         p.code_width >= head_dim / 8;
}

// ---- B.

// A thread's part of B: chunk threadIdx % (D / 8) of rows threadIdx / (D / 8), + 32, ...  `signs`:
// of the chunk's columns of the rotation, in the uppermost bits.
template <class C>
__device__ __forceinline__ void fill_matrix(uint32_t s_matrix, bool hadamard,
                                            const uint32_t (&signs)[8]) {
  constexpr int D = C::kHeadDim, kChunks = D / 8, kRowsAtOnce = C::kThreads / kChunks;
  constexpr int kRounds = D / kRowsAtOnce;
  static_assert(kRounds == 1 || (kRowsAtOnce == 32 && kRounds == 4), "dim + 8 a round, no carries");
  constexpr bool kHalf = std::is_same_v<typename C::Element, __half>;
  constexpr uint32_t kOne = kHalf ? 0x3c00u : 0x3f80u, kBoth = 0x10001u, kMinus = 0x80008000u;
  constexpr uint32_t kUnitBits =
      kHalf ? (D == 128 ? 0x2c00u : 0x3000u) : (D == 128 ? 0x3d80u : 0x3e00u);
  const uint32_t chunk = threadIdx.x % kChunks, first = threadIdx.x / kChunks;
  const uint32_t dim = C::Map::code_dim(first / 8, first / 2 % 4, first % 2), block = dim / 8;
  // H[dim][k] is -1 to the number of common one bits of dim and k = 8 chunk + e: those of e differ
  // within the chunk, those of block and chunk are a sign of all of it.
  const uint32_t flip1 = dim << 31, flip2 = (dim >> 1 & 1) * kMinus,
                 flip4 = (dim >> 2 & 1) * kMinus;
  const uint32_t flip = static_cast<uint32_t>(__popc(block & chunk) & 1) * kMinus;
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = (ptx::prmt(signs[2 * i], signs[2 * i + 1], 0x7632) & kMinus) ^ (flip1 ^ flip) ^
               (kUnitBits * kBoth) ^ (i % 2 ? flip2 : 0) ^ (i / 2 ? flip4 : 0);
    if (!hadamard) words[i] = static_cast<int>(dim % 8 / 2) == i ? kOne << (dim % 2 * 16) : 0;
  }
  const uint32_t place = s_matrix + C::Matrix::offset(first, chunk);
#pragma unroll
  for (int j = 0; j < kRounds; ++j) {
    const uint32_t more = ((j & 1) * (chunk & 1) ^ (j >> 1) * (chunk >> 1 & 1)) * kMinus;
    const uint32_t round_flip = hadamard ? more : 0;
    // Opaque: one LOP3 a word.
    const uint32_t mask = ptx::opaque(hadamard || block + j == chunk ? ~0u : 0u);
    ptx::st_shared_v4(place + j * kRowsAtOnce * 128, (words[0] ^ round_flip) & mask,
                      (words[1] ^ round_flip) & mask, (words[2] ^ round_flip) & mask,
                      (words[3] ^ round_flip) & mask);
  }
}

// ---- Rows.

// The row whose addresses a lane works out (own_row).
struct RowCursor {
  uint64_t x;
  uint32_t token, head;
  uint32_t row;  // row g of the warp's 16
};

// By how much it moves from tile to tile.
struct RowStride {
  int64_t x, wrap;  // bytes; wrap: more, where the head number wraps around
  uint32_t token, head, row;
};

__device__ __forceinline__ void advance(RowCursor& cursor, const RowStride& stride,
                                        uint32_t heads) {
  cursor.row += stride.row;
  cursor.token += stride.token;
  cursor.head += stride.head;
  cursor.x += stride.x;
  if (cursor.head >= heads) {
    cursor.head -= heads;
    ++cursor.token;
    cursor.x += stride.wrap;
  }
}

// Where the own row goes.
struct OwnTarget {
  int64_t slot;  // negative: not stored
  uint32_t head;
};

// Starts the copies of the warp's 16 rows, four lanes a row.  `place`: of chunk t of row g.  Rows
// past the end are not read.
template <class C>
__device__ __forceinline__ void copy_rows(uint32_t place, const RowCursor& cursor,
                                          uint32_t num_rows, uint64_t policy) {
  // Opaque as in load_tile; `place` has no uniform part that ptxas could tell from the rest.
  const uint32_t places[2] = {ptx::opaque(place), ptx::opaque(place ^ 64)};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint8_t* x = ptx::opaque(reinterpret_cast<const uint8_t*>(from_owner(cursor.x, r)) +
                                   threadIdx.x % 4 * 16);
    if (cursor.row + 8 * r < num_rows) {
#pragma unroll
      for (int i = 0; i < C::kHeadDim / 32; ++i) {
        ptx::cp_async_once_line(places[i % 2] + i / 2 * C::Tile::kPanelBytes + r * 1024, x + 64 * i,
                                policy);
      }
    }
  }
}

// Starts the load of the own row's slot.
__device__ __forceinline__ void load_target(OwnTarget& target, const RowCursor& cursor,
                                            const EncodeParams& p) {
  const uint32_t num_rows = p.num_rows;
  const bool exists = cursor.row + threadIdx.x % 2 * 8 < num_rows;
  const bool mapped = p.slot_mapping != nullptr;
  target.head = cursor.head;
  target.slot = exists && !mapped ? int64_t{cursor.token} : -1;
  ptx::ld_global_if(target.slot, p.slot_mapping + cursor.token, exists && mapped);
}

// Codes (lanes t = 0, 1 of a row's four) or norms (t = 2, 3) of the own row.
struct Destination {
  uint8_t* base;
  int64_t block_stride;
  int32_t token_stride, head_stride;
};

__device__ __forceinline__ Destination make_destination(const EncodeParams& p,
                                                        const EncodeSide& side, bool norms) {
  if (norms) return {side.norms, p.norm_block_stride, p.norm_token_stride, p.norm_head_stride};
  return {side.codes, p.code_block_stride, p.code_token_stride, p.code_head_stride};
}

// Negative: not stored.
__device__ __forceinline__ int64_t find_address(const EncodeParams& p, const Destination& to,
                                                const OwnTarget& target) {
  const uint32_t slot = static_cast<uint32_t>(target.slot);
  const uint32_t block = p.block.quotient(slot), offset = slot - block * p.block.divisor;
  const int64_t address = reinterpret_cast<int64_t>(to.base) + block * to.block_stride +
                          (offset * to.token_stride + target.head * to.head_stride);
  return target.slot < 0 ? -1 : address;
}

// ---- Values: acc[4 j + 2 r + odd] is dim t D/4 + 2 j + odd of row g + 8 r.

template <class C>
using WgmmaAccumulators = float[C::kHeadDim / 2];

// The own row's sum of squares.
template <class C>
__device__ __forceinline__ float own_square_sum(const WgmmaAccumulators<C>& acc) {
  float sums[2][2] = {};  // two chains of additions a row
#pragma unroll
  for (int i = 0; i < C::kHeadDim / 2; ++i) {
    float& sum = sums[i / 2 % 2][i % 2];
    sum = fmaf(acc[i], acc[i], sum);
  }
  const float first = sums[0][0] + sums[0][1], second = sums[1][0] + sums[1][1];
  const bool odd = threadIdx.x % 2;
  float sum = odd ? second : first;
  sum += __shfl_xor_sync(kFullWarp, odd ? first : second, 1);
  return sum + __shfl_xor_sync(kFullWarp, sum, 2);
}

// As quantise of encode_quantise.cuh.  Boundaries are read where they are compared with, which is
// rare: a register less.
template <class C>
__device__ __forceinline__ void quantise_bytes(WgmmaAccumulators<C>& acc, const float (&scales)[2],
                                               const Quantiser& quantiser, const float* boundaries,
                                               uint32_t (&words)[2][C::kWords]) {
  if (quantiser.exact) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float scale = scales[r] * quantiser.axis.scale;
#pragma unroll
      for (int w = 0; w < C::kWords; ++w) {
        uint32_t bytes[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float* pair = acc + 16 * w + 4 * j + 2 * r;
          bytes[j] = ptx::bit_select(
              kEvenNibble, cell_line(pair[0], scale, quantiser.axis.bias, quantiser.even_intercept),
              cell_line(pair[1], scale, quantiser.axis.bias, quantiser.odd_intercept));
        }
        words[r][w] = ptx::prmt(ptx::prmt(bytes[0], bytes[1], 0x0062),
                                ptx::prmt(bytes[2], bytes[3], 0x0062), 0x5410);
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < C::kHeadDim / 2; ++i) acc[i] *= scales[i / 2 % 2];
#pragma unroll
  for (int i = 0; i < 2 * C::kWords; ++i) words[i % 2][i / 2] = 0;
#pragma unroll 1
  for (int i = 0; i < kNumBoundaries; ++i) {
    const float boundary = __ldg(boundaries + i);
#pragma unroll
    for (int k = 0; k < C::kHeadDim / 2; ++k) {
      const int e = k / 4 % 4 * 2 + k % 2;
      if (acc[k] > boundary) words[k / 2 % 2][k / 16] += 1u << nibble_shift(e);
    }
  }
}

// ---- Products.

// x of the warp's 16 rows as A operands of all k16 steps.
template <class C>
using WgmmaRows = uint32_t[C::kHeadDim / 16][4];

// `place`: of the chunk that this lane names of the first step: chunk lane / 16 of row lane % 16.
template <class C>
__device__ __forceinline__ void read_rows(WgmmaRows<C>& rows, uint32_t place) {
#pragma unroll
  for (int step = 0; step < C::kHeadDim / 16; ++step) {
    // A step is two chunks, and the swizzle an exclusive or: another one goes to the next step.
    ptx::ldmatrix_x4(rows[step], (place ^ step % 4 * 32) + step / 4 * C::Tile::kPanelBytes);
  }
}

template <class C>
__device__ __forceinline__ void issue_products(WgmmaAccumulators<C>& acc, const WgmmaRows<C>& rows,
                                               uint64_t matrix) {
#pragma unroll
  for (int step = 0; step < C::kHeadDim / 16; ++step) {
    const uint64_t b =
        ptx::wgmma_advance(matrix, step / 4 * C::Matrix::kPanelBytes + step % 4 * 32);
    if constexpr (std::is_same_v<typename C::Element, __half>) {
      ptx::wgmma_f16<false>(acc, rows[step], b, step > 0);
    } else {
      ptx::wgmma_bf16<false>(acc, rows[step], b, step > 0);
    }
  }
  ptx::wgmma_commit();
}

// ---- The kernel.

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    encode_wgmma_kernel(const __grid_constant__ EncodeParams p) {
  if (touch_line(p)) return;
  const uint32_t s_matrix = ptx::smem_address(ptx::dynamic_shared());
  const int lane = threadIdx.x % kWarpSize, t = lane % 4;
  const int two_sides = p.num_sides - 1;
  const EncodeSide& side = p.sides[blockIdx.x & two_sides];
  const int cta = blockIdx.x >> two_sides, num_ctas = gridDim.x >> two_sides;
  const uint32_t num_rows = p.num_rows;

  // [1/6] Start the loads, those of the tables first.
  constexpr int kChunks = C::kHeadDim / 8;
  const float boundary = __ldg(side.boundaries + min(lane, kNumBoundaries - 1));
  const bool hadamard = side.rotation != nullptr;
  uint32_t signs[8] = {};
  if (hadamard) {
    const auto* from = reinterpret_cast<const uint4*>(side.rotation) + threadIdx.x % kChunks * 2;
    const uint4 low = __ldg(from), high = __ldg(from + 1);
    signs[0] = low.x, signs[1] = low.y, signs[2] = low.z, signs[3] = low.w;
    signs[4] = high.x, signs[5] = high.y, signs[6] = high.z, signs[7] = high.w;
  }
#pragma unroll
  for (uint32_t& sign : signs) sign = ptx::opaque(sign);  // keeps the loads in front
  const uint64_t policy = ptx::read_once_policy();
  // Where the lane's chunks go.  Nothing of it is seen to be uniform: see copy_rows.
  const uint32_t s_tiles = s_matrix + C::Matrix::kBytes + threadIdx.x / kWarpSize * C::kRing;
  uint32_t copy_place = s_tiles + C::Tile::offset(lane / 4, t);
  RowCursor cursor = {};
  // The first tile; CTAs first, as in encode_kernel.  Every CTA has one, and the branches are for
  // the compiler, which would put the loads above and these behind the work on the tables.
  if (cta * C::kTileRows < p.num_rows) {
    cursor.row = (threadIdx.x / C::kGroupThreads * num_ctas + cta) * C::kTileRows +
                 threadIdx.x / kWarpSize % 4 * 16 + lane / 4;
    const uint32_t own = cursor.row + t % 2 * 8;
    cursor.token = p.heads.quotient(own);
    cursor.head = own - cursor.token * p.heads.divisor;
    cursor.x = reinterpret_cast<uint64_t>(side.x) + cursor.token * side.token_stride +
               cursor.head * side.head_stride;
    copy_rows<C>(copy_place, cursor, num_rows, policy);
  }
  ptx::cp_async_commit();
  OwnTarget target;
  load_target(target, cursor, p);
  RowStride stride;
  stride.row = num_ctas * C::kWarpgroups * C::kTileRows;
  stride.token = p.heads.quotient(stride.row);
  stride.head = stride.row - stride.token * p.heads.divisor;
  stride.x = stride.token * side.token_stride + stride.head * side.head_stride;
  stride.wrap = side.token_stride - p.heads.divisor * side.head_stride;
  advance(cursor, stride, p.heads.divisor);
  if (stride.row < num_rows) {
    copy_rows<C>(copy_place + C::Tile::kBytes, cursor, num_rows, policy);
  }
  ptx::cp_async_commit();

  // [2/6] Tables.
  fill_matrix<C>(s_matrix, hadamard, signs);
  ptx::fence_shared_async();
  const float gain = hadamard ? side.entry / C::kUnit : 1.f;
  // |B x|^2 = D kUnit^2 |x|^2
  const float norm_unit = hadamard ? 1.f / (C::kHeadDim * C::kUnit * C::kUnit) : 1.f;
  const Destination destination = make_destination(p, side, t >= 2);
  const Quantiser quantiser = make_byte_quantiser(boundary);
  // B is complete before any warpgroup multiplies; the last barrier of all.
  __syncthreads();

  // Uniform, for descriptors and branches.
  const uint64_t matrix = ptx::wgmma_descriptor(warp_uniform(static_cast<int>(s_matrix)), 16,
                                                8 * 128, ptx::WgmmaSwizzle::k128B);
  const int group = warp_uniform(threadIdx.x / C::kGroupThreads);
  uint32_t read_place = s_tiles + C::Tile::offset(lane % 16, lane / 16);
  int32_t turn = C::Tile::kBytes;  // from this tile's place to the next one's
#pragma unroll 1
  for (uint32_t tile_row = (group * num_ctas + cta) * C::kTileRows; tile_row < num_rows;
       tile_row += stride.row) {
    const int64_t own_address = find_address(p, destination, target);
    load_target(target, cursor, p);  // of the next tile
    // [3/6] To registers, once every lane's part of the warp's rows has arrived.
    ptx::cp_async_wait<1>();
    __syncwarp();
    WgmmaRows<C> rows;
    read_rows<C>(rows, read_place);
    __syncwarp();  // every lane's are there
    // [4/6] Rotate.  Meanwhile, the tile after the next into this one's place.
    advance(cursor, stride, p.heads.divisor);
    WgmmaAccumulators<C> acc;
    ptx::wgmma_fence();
    issue_products<C>(acc, rows, matrix);
    copy_rows<C>(copy_place, cursor, num_rows, policy);
    ptx::cp_async_commit();
    read_place += turn, copy_place += turn, turn = -turn;
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(acc);
#pragma unroll
    for (int step = 0; step < C::kHeadDim / 16; ++step) ptx::wgmma_hold(rows[step]);

    // [5/6] Quantise and pack.
    float norm = ptx::sqrt_approx(own_square_sum<C>(acc) * norm_unit);
    const float own_scale = gain * ptx::rcp_approx(norm + kNormEpsilon);
    const float scales[2] = {from_owner(own_scale, 0), from_owner(own_scale, 1)};
    uint32_t words[2][C::kWords];
    quantise_bytes<C>(acc, scales, quantiser, side.boundaries, words);
    if (p.norm_correction) {
      // Not kept from tile to tile: a register less.
      const float centroid = __ldg(side.centroids + lane % kNumCentroids);
      float decoded[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        decoded[r] = quad_sum(decoded_square_sum(words[r], centroid * centroid));
      }
      // A row of zero centroids decodes to zero whatever its norm.
      const float length = __fsqrt_rn(t % 2 ? decoded[1] : decoded[0]);
      norm = length > 0.f ? __fdiv_rn(norm, length) : 0.f;
    }
    // [6/6] Write.
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t address = from_owner(own_address, r);
      if (address >= 0) ptx::st_global(address + t * C::Map::kQuarterBytes, words[r]);
    }
    if (t >= 2 && own_address >= 0) ptx::st_global(own_address, norm);
  }
}

}  // namespace tq4
