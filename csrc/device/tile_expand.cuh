// Pages to images of unpacked K and V tiles in a workspace (tile_workspace.h): every tile once, in
// the form in which a prefill kernel wants it in shared memory.
//
// What an image looks like is up to a policy, a class with these static members:
//   kHeadDim, kTileTokens
//   kBytes                      of an image, a multiple of 128
//   kKeyChunks                  16-byte chunks of int8 key codes a token
//   key_dim(chunk)              first dim of such a chunk, a multiple of 8
//   key_dims(chunk)             how many it holds, 16 or 8; the rest of the chunk becomes zero
//   key_offset(token, chunk)    byte offset in the image of a key chunk, a multiple of 16
//   kValueChunks                16-byte chunks of fp16 values a token; those past the last dim
//                               become zeros
//   value_offset(token, chunk)  of the chunk with the fp16 values of dims 8 chunk .. + 7
//   kExpandThreads              threads of a CTA: as many as leave room for the kernel beside it
//   write_scale(image, token, k_norm)  writes what the scores of a token are multiplied by, and its
//                               share of what neither chunks nor scales cover
// TileImage has the usual answers.
//
// Keys are INT8 codes in the order in which unpack_int8 leaves them (dims pairwise swapped: 1, 0,
// 3, 2), values fp16(c / v_unit) * fp16(norm * v_unit).  Tokens past the end of a sequence are
// zeros.
//
// A CTA takes tiles in turn: the packed bytes of a tile come to shared memory in one go (two
// threads a token, so that its page is looked up once), then a thread makes one chunk at a time.
// Neighbouring lanes write neighbouring chunks of a token, so that a warp writes whole lines
// wherever the policy keeps the chunks of a token (or eight of them) together: three times as many
// bytes are written as are read.
#pragma once
#include <cstdint>

#include "../params.h"
#include "../ptx/arith.cuh"
#include "../ptx/dynamic_smem.cuh"
#include "../ptx/grid_dependency.cuh"
#include "../ptx/smem.cuh"
#include "codebook.cuh"
#include "common.cuh"
#include "page_copy.h"
#include "tile_workspace.h"
#include "unpack4.cuh"

namespace tq4 {

// CTAs an SM: enough loads in flight to hide that a code waits for its entry of the block table.
// With the 64 registers a thread of 128, or the 80 of 256, one of them finds room beside a CTA that
// prepares queries.
template <typename Image>
constexpr int kExpandCtas = Image::kExpandThreads == 128 ? 8 : 3;

// The tokens of one tile in the cache.
struct TileSource {
  const int32_t* table;  // the sequence's row of block_table
  int first_key;         // of the tile
  int last_key;          // of the sequence
  int kv_head;

  // The others are read as the last one, so that no load depends on a branch; whoever uses them
  // selects zeros instead.
  __device__ __forceinline__ bool has(int token) const { return first_key + token <= last_key; }
};

// What of the cache's shape is worked out once a CTA.
struct PageShape {
  Divider block_size;
  int width;  // of copies of codes
};

// A tile as packed in the cache.
template <typename Image>
struct alignas(16) PackedTile {
  static constexpr int kRowBytes = Image::kHeadDim / 2;
  uint8_t codes[2][Image::kTileTokens][kRowBytes];  // K, V
  float norms[2][Image::kTileTokens];
};

template <int kBytes, int kRowBytes>
__device__ __forceinline__ void copy_codes(uint32_t dst, const uint8_t* src) {
#pragma unroll(kRowBytes / kBytes <= 8 ? kRowBytes / kBytes : 4)
  for (int i = 0; i < kRowBytes; i += kBytes) {
    ptx::cp_async_once<kBytes>(dst + i, src + i, ptx::read_once_policy());
  }
}

// Starts copying the codes and norms of a tile: of one token's K or V each.
template <typename Image>
__device__ __forceinline__ void copy_packed(const PageView& view, const PageShape& shape,
                                            const TileSource& source, PackedTile<Image>& packed) {
  constexpr int kRowBytes = PackedTile<Image>::kRowBytes;
#pragma unroll 1
  for (int i = threadIdx.x; i < 2 * Image::kTileTokens; i += Image::kExpandThreads) {
    const int token = i / 2, side = i % 2;
    const int key = min(source.first_key + token, source.last_key);
    const int entry = static_cast<int>(shape.block_size.quotient(key));
    const int in_block = key - entry * static_cast<int>(shape.block_size.divisor);
    const uint8_t* page = view.base + __ldg(source.table + entry) * view.block_stride;
    const uint8_t* codes =
        page + ((side == 0 ? view.k_codes : view.v_codes) + source.kv_head * view.code_head_stride +
                in_block * view.code_token_stride);
    const uint8_t* norm =
        page + ((side == 0 ? view.k_norms : view.v_norms) + source.kv_head * view.norm_head_stride +
                in_block * view.norm_token_stride);
    const uint32_t dst = ptx::smem_address(packed.codes[side][token]);
    if (shape.width == 16) {
      copy_codes<16, kRowBytes>(dst, codes);
    } else if (shape.width == 8) {
      copy_codes<8, kRowBytes>(dst, codes);
    } else {
      copy_codes<4, kRowBytes>(dst, codes);
    }
    ptx::cp_async<4>(ptx::smem_address(&packed.norms[side][token]), norm);
  }
  ptx::cp_async_commit();
}

// Chunks of a thread in flight together; one of D = 96, whose places take divisions.
template <typename Image>
constexpr int kChunksAtOnce = Image::kHeadDim == 96 ? 1 : 2;

template <typename Image>
__device__ __forceinline__ void expand_keys(const PackedTile<Image>& packed,
                                            const TileSource& source, const ByteTable& codes,
                                            uint8_t* image) {
  constexpr int kChunks = Image::kKeyChunks, kTotal = Image::kTileTokens * kChunks;
  constexpr bool kWholeChunks = kChunks * 16 == Image::kHeadDim;
#pragma unroll(kChunksAtOnce<Image>)
  for (int i = threadIdx.x; i < kTotal; i += Image::kExpandThreads) {
    const int token = i / kChunks, chunk = i % kChunks;
    const uint32_t src = ptx::smem_address(packed.codes[0][token]) + Image::key_dim(chunk) / 2;
    uint2 words;
    if constexpr (kWholeChunks) {
      words = ptx::ld_shared_v2(src);
    } else {
      words.x = ptx::ld_shared_u32(src);
      words.y = ptx::ld_shared_u32(src + (Image::key_dims(chunk) - 8) / 2);
    }
    uint4 x;
    unpack_int8(words.x, codes, x.x, x.y);
    unpack_int8(words.y, codes, x.z, x.w);
    if (Image::key_dims(chunk) == 8) x.z = x.w = 0;
    if (!source.has(token)) x = make_uint4(0, 0, 0, 0);
    *reinterpret_cast<uint4*>(image + Image::key_offset(token, chunk)) = x;
  }
}

template <typename Image>
__device__ __forceinline__ void expand_values(const PackedTile<Image>& packed,
                                              const TileSource& source, const ByteTable& high,
                                              const ByteTable& low, float v_unit, uint8_t* image) {
  constexpr int kChunks = Image::kValueChunks, kUsed = Image::kHeadDim / 8;
  constexpr int kTotal = Image::kTileTokens * kChunks;
#pragma unroll(kChunksAtOnce<Image>)
  for (int i = threadIdx.x; i < kTotal; i += Image::kExpandThreads) {
    const int token = i / kChunks, chunk = i % kChunks;
    const float norm = packed.norms[1][token] * v_unit;
    const uint32_t norm2 = ptx::pack_f16x2(norm, norm);
    uint32_t x[4];
    const int used = kUsed < kChunks ? min(chunk, kUsed - 1) : chunk;
    unpack_fp16(ptx::ld_shared_u32(ptx::smem_address(packed.codes[1][token]) + 4 * used), high, low,
                x);
    uint4 y = make_uint4(ptx::mul_f16x2(x[0], norm2), ptx::mul_f16x2(x[1], norm2),
                         ptx::mul_f16x2(x[2], norm2), ptx::mul_f16x2(x[3], norm2));
    if (!source.has(token) || chunk >= kUsed) y = make_uint4(0, 0, 0, 0);
    *reinterpret_cast<uint4*>(image + Image::value_offset(token, chunk)) = y;
  }
}

template <typename Image>
__device__ __forceinline__ void expand_scales(const PackedTile<Image>& packed,
                                              const TileSource& source, uint8_t* image) {
  for (int token = threadIdx.x; token < Image::kTileTokens; token += Image::kExpandThreads) {
    Image::write_scale(image, token, source.has(token) ? packed.norms[0][token] : 0.f);
  }
}

// Where the sequences' tiles end, kThreads sequences at a time.
template <int kThreads>
struct TileEnds {
  int64_t ends[kThreads];  // tiles of one head up to and with each sequence of the group
  int64_t warp_totals[kThreads / kWarpSize];
};

// Fills `shared` for the sequences [first_seq, first_seq + kThreads); returns their tiles.
template <int kThreads>
__device__ __forceinline__ int64_t scan_tiles(const AttentionParams& p, const TileWorkspace& w,
                                              int first_seq, TileEnds<kThreads>& shared) {
  const int seq = first_seq + static_cast<int>(threadIdx.x);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int64_t sum = 0;
  if (seq < p.num_seqs) {
    const int q_len = prefill_queries(p.query_start_loc, seq, p.short_query_len);
    sum = unit_keys(p.seq_lens[seq], q_len, p.window_left, w.tile_tokens).tiles;
  }
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int64_t other = __shfl_up_sync(kFullWarp, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == kWarpSize - 1) shared.warp_totals[warp] = sum;
  __syncthreads();  // the warps' totals are written; the ends of the last group are no longer read
  int64_t total = 0;
#pragma unroll
  for (int i = 0; i < kThreads / kWarpSize; ++i) {
    if (i == warp) sum += total;
    total += shared.warp_totals[i];
  }
  shared.ends[threadIdx.x] = sum;
  __syncthreads();  // the ends are written; the warps' totals are no longer read
  return total;
}

// A fixed grid of any size: which tiles there are, only the lengths
// on the device say.
template <typename Image>
__global__ void __launch_bounds__(Image::kExpandThreads, kExpandCtas<Image>)
    expand_tiles_kernel(const __grid_constant__ AttentionParams p,
                        const __grid_constant__ TileWorkspace w, int pass) {
  __shared__ CodebookTables tables;
  constexpr int kThreads = Image::kExpandThreads;
  __shared__ TileEnds<kThreads> tile_ends;
  auto& packed = *reinterpret_cast<PackedTile<Image>*>(ptx::dynamic_shared());
  ptx::allow_dependent_launch();
  // An attention kernel of the pass before may still read the workspace.
  if (pass > 0) ptx::wait_for_predecessor();
  if (threadIdx.x >= kThreads - kWarpSize) {  // a warp that hardly ever scans a sequence
    write_codebook_tables(&tables, p.k_codes, p.k_centroids, p.v_centroids);
  }
  const PageView& view = p.cache;
  const int heads = view.num_kv_heads;
  const PageShape shape{Divider::make(view.block_size), copy_width(view)};

  const int64_t pass_begin = pass * w.pass_tiles, pass_end = pass_begin + w.capacity;
  int64_t tile_index = pass_begin + blockIdx.x;  // among the tiles of all passes
  int64_t tiles_before = 0;                      // of one head, before first_seq
  for (int first_seq = 0; first_seq < p.num_seqs && tiles_before * heads < pass_end;
       first_seq += kThreads) {
    const int64_t tiles_here = scan_tiles(p, w, first_seq, tile_ends);
    const int64_t all_end = (tiles_before + tiles_here) * heads;
    const int64_t end = all_end < pass_end ? all_end : pass_end;
    for (; tile_index < end; tile_index += gridDim.x) {
      const int64_t index = tile_index - tiles_before * heads;
      int lo = 0, hi = kThreads - 1;
      while (lo < hi) {  // the first sequence whose tiles end after `index`
        const int mid = (lo + hi) / 2;
        if (tile_ends.ends[mid] * heads > index) {
          hi = mid;
        } else {
          lo = mid + 1;
        }
      }
      const int64_t start = lo > 0 ? tile_ends.ends[lo - 1] : 0;
      const uint32_t tiles = static_cast<uint32_t>(tile_ends.ends[lo] - start);
      const uint32_t in_sequence = static_cast<uint32_t>(index - start * heads);
      const int tile = static_cast<int>(in_sequence % tiles);
      TileSource source;
      source.kv_head = static_cast<int>(in_sequence / tiles);
      const UnitPlace place =
          unit_place(w, tiles_before + start, static_cast<int>(tiles), heads, source.kv_head);
      // The end of a unit that began in the pass before; or lengths beyond the block table's width,
      // which the host has not counted on.
      if (place.pass != pass || place.first_tile + tile >= w.capacity) continue;
      const int seq = first_seq + lo;
      source.table = p.block_table + seq * p.block_table_stride;
      const int num_keys = p.seq_lens[seq];
      source.last_key = num_keys - 1;
      const int q_len = p.query_start_loc[seq + 1] - p.query_start_loc[seq];
      source.first_key = unit_keys(num_keys, q_len, p.window_left, w.tile_tokens).begin +
                         tile * Image::kTileTokens;
      uint8_t* image = w.tiles + (place.first_tile + tile) * static_cast<int64_t>(Image::kBytes);
      __syncthreads();  // the packed tile before has been read
      copy_packed<Image>(view, shape, source, packed);
      ptx::cp_async_wait<0>();
      __syncthreads();  // all threads' copies have landed
      expand_keys<Image>(packed, source, tables.k_codes, image);
      expand_values<Image>(packed, source, tables.v_high, tables.v_low, tables.v_unit, image);
      expand_scales<Image>(packed, source, image);
    }
    tiles_before += tiles_here;
  }
  // The end of this kernel stands for the end of those before it: the next one waits for this one
  // only.
  ptx::wait_for_predecessor();
}

}  // namespace tq4
