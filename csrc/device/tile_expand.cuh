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
//   value_offset(token, chunk)  of the chunk with the fp16 values of dims 8 chunk .. + 7
//   write_scale(image, token, k_norm)  writes what the scores of a token are multiplied by
// Bytes that no chunk covers are not written.  TileImage has the usual answers.
//
// Keys are INT8 codes in the order in which unpack_int8 leaves them (dims pairwise swapped: 1, 0,
// 3, 2), values fp16(c / v_unit) * fp16(norm * v_unit).  Tokens past the end of a sequence are
// zeros.
//
// A thread makes one chunk at a time: neighbouring lanes write neighbouring chunks of a token, so
// that a warp writes whole lines wherever the policy keeps the chunks of a token (or eight of them)
// together.  That matters more than wide reads: a tile is written with three times the bytes that
// are read.
#pragma once
#include <cstdint>

#include "../params.h"
#include "../ptx/arith.cuh"
#include "../ptx/grid_dependency.cuh"
#include "codebook.cuh"
#include "common.cuh"
#include "page_copy.h"
#include "tile_workspace.h"
#include "unpack4.cuh"

namespace tq4 {

template <int D, int kTokens>
struct TileImage {
  static constexpr int kHeadDim = D;
  static constexpr int kTileTokens = kTokens;
  static constexpr int kKeyChunks = D / 16;
  TQ4_HOST_DEVICE static constexpr int key_dim(int chunk) { return 16 * chunk; }
  TQ4_HOST_DEVICE static constexpr int key_dims(int) { return 16; }
};

constexpr int kExpandThreads = 256;
// CTAs an SM: enough loads in flight to hide that a code waits for its entry of the block table.
constexpr int kExpandCtas = 4;

// The tokens of one tile in the cache.
struct TileSource {
  const int32_t* table;  // the sequence's row of block_table
  int first_key;         // of the tile
  int num_keys;          // of the sequence
  int kv_head;
  int block_shift;  // log2(block_size), or -1
  bool copy8;       // codes are 8-byte aligned
};

struct TokenPlace {
  const uint8_t* block;  // not to be followed unless `there`
  int in_block;
  bool there;
};

// Entries of the block table past the last page are garbage: never read, let alone followed.
__device__ __forceinline__ TokenPlace find_token(const PageView& view, const TileSource& source,
                                                 int token) {
  const int key = source.first_key + token;
  const int entry = source.block_shift >= 0 ? key >> source.block_shift : key / view.block_size;
  TokenPlace place;
  place.there = key < source.num_keys;
  const int block = place.there ? __ldg(source.table + entry) : 0;
  place.block = view.base + block * view.block_stride;
  place.in_block = key - entry * view.block_size;
  return place;
}

__device__ __forceinline__ uint32_t load_word(const uint8_t* p) {
  return __ldg(reinterpret_cast<const uint32_t*>(p));
}

// Calls make(indices of up to kBatch chunks) until the tile's chunks are done: what is loaded for
// one call is in flight together.
template <int kTotal, typename Make>
__device__ __forceinline__ void for_each_batch(Make&& make) {
  constexpr int kSteps = ceil_div(kTotal, kExpandThreads);
  constexpr int kBatch = kSteps < 4 ? kSteps : 4;
#pragma unroll 1
  for (int first = threadIdx.x; first < kTotal; first += kBatch * kExpandThreads) {
    int index[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      index[i] = first + i * kExpandThreads;
      if (kTotal % (kBatch * kExpandThreads) != 0 && index[i] >= kTotal) index[i] = -1;
    }
    make(index);
  }
}

template <typename Image>
__device__ __forceinline__ void expand_keys(const PageView& view, const TileSource& source,
                                            const ByteTable& codes, uint8_t* image) {
  const auto make = [&](auto& index) {
    constexpr int kBatch = sizeof(index) / sizeof(index[0]);
    uint32_t words[kBatch][2];
    bool there[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      words[i][0] = words[i][1] = 0;
      there[i] = false;
      if (index[i] < 0) continue;
      const int token = index[i] / Image::kKeyChunks, chunk = index[i] % Image::kKeyChunks;
      const TokenPlace place = find_token(view, source, token);
      there[i] = place.there;
      const uint8_t* src = place.block +
                           (view.k_codes + source.kv_head * view.code_head_stride +
                            place.in_block * view.code_token_stride) +
                           Image::key_dim(chunk) / 2;
      constexpr bool kAligned8 = Image::kKeyChunks * 16 == Image::kHeadDim;
      if (!place.there) continue;
      if (kAligned8 && source.copy8) {
        const uint2 both = __ldg(reinterpret_cast<const uint2*>(src));
        words[i][0] = both.x, words[i][1] = both.y;
      } else {
        words[i][0] = load_word(src);
        if (Image::key_dims(chunk) == 16) words[i][1] = load_word(src + 4);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (index[i] < 0) continue;
      const int token = index[i] / Image::kKeyChunks, chunk = index[i] % Image::kKeyChunks;
      uint4 x;
      unpack_int8(words[i][0], codes, x.x, x.y);
      unpack_int8(words[i][1], codes, x.z, x.w);
      if (Image::key_dims(chunk) == 8) x.z = x.w = 0;
      if (!there[i]) x = make_uint4(0, 0, 0, 0);
      *reinterpret_cast<uint4*>(image + Image::key_offset(token, chunk)) = x;
    }
  };
  for_each_batch<Image::kTileTokens * Image::kKeyChunks>(make);
}

template <typename Image>
__device__ __forceinline__ void expand_values(const PageView& view, const TileSource& source,
                                              const ByteTable& high, const ByteTable& low,
                                              float v_unit, uint8_t* image) {
  constexpr int kChunks = Image::kHeadDim / 8;
  const auto make = [&](auto& index) {
    constexpr int kBatch = sizeof(index) / sizeof(index[0]);
    uint32_t words[kBatch];
    float norms[kBatch];
    bool there[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      words[i] = 0;
      norms[i] = 0.f;
      there[i] = false;
      if (index[i] < 0) continue;
      const int token = index[i] / kChunks, chunk = index[i] % kChunks;
      const TokenPlace place = find_token(view, source, token);
      there[i] = place.there;
      if (!place.there) continue;
      words[i] = load_word(place.block + (view.v_codes + source.kv_head * view.code_head_stride +
                                          place.in_block * view.code_token_stride + 4 * chunk));
      norms[i] = __uint_as_float(
          load_word(place.block + (view.v_norms + source.kv_head * view.norm_head_stride +
                                   place.in_block * view.norm_token_stride)));
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (index[i] < 0) continue;
      const int token = index[i] / kChunks, chunk = index[i] % kChunks;
      const float norm = norms[i] * v_unit;
      const uint32_t norm2 = ptx::pack_f16x2(norm, norm);
      uint32_t x[4];
      unpack_fp16(words[i], high, low, x);
      uint4 y = make_uint4(ptx::mul_f16x2(x[0], norm2), ptx::mul_f16x2(x[1], norm2),
                           ptx::mul_f16x2(x[2], norm2), ptx::mul_f16x2(x[3], norm2));
      if (!there[i]) y = make_uint4(0, 0, 0, 0);
      *reinterpret_cast<uint4*>(image + Image::value_offset(token, chunk)) = y;
    }
  };
  for_each_batch<Image::kTileTokens * kChunks>(make);
}

template <typename Image>
__device__ __forceinline__ void expand_scales(const PageView& view, const TileSource& source,
                                              uint8_t* image) {
  for (int token = threadIdx.x; token < Image::kTileTokens; token += kExpandThreads) {
    const TokenPlace place = find_token(view, source, token);
    float norm = 0.f;
    if (place.there) {
      norm = __uint_as_float(
          load_word(place.block + (view.k_norms + source.kv_head * view.norm_head_stride +
                                   place.in_block * view.norm_token_stride)));
    }
    Image::write_scale(image, token, norm);
  }
}

// Where the sequences' tiles end, kExpandThreads sequences at a time.
struct TileEnds {
  int64_t ends[kExpandThreads];  // tiles of one head up to and with each sequence of the group
  int64_t warp_totals[kExpandThreads / kWarpSize];
};

// Fills `shared` for the sequences [first_seq, first_seq + kExpandThreads); returns their tiles.
__device__ __forceinline__ int64_t scan_tiles(const AttentionParams& p, const TileWorkspace& w,
                                              int first_seq, TileEnds& shared) {
  const int seq = first_seq + static_cast<int>(threadIdx.x);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int64_t sum = 0;
  if (seq < p.num_seqs) {
    const int q_len = p.query_start_loc[seq + 1] - p.query_start_loc[seq];
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
  for (int i = 0; i < kExpandThreads / kWarpSize; ++i) {
    if (i == warp) sum += total;
    total += shared.warp_totals[i];
  }
  shared.ends[threadIdx.x] = sum;
  __syncthreads();  // the ends are written; the warps' totals are no longer read
  return total;
}

// A fixed grid of any size, kExpandThreads threads a CTA: which tiles there are, only the lengths
// on the device say.
template <typename Image>
__global__ void __launch_bounds__(kExpandThreads, kExpandCtas)
    expand_tiles_kernel(const __grid_constant__ AttentionParams p,
                        const __grid_constant__ TileWorkspace w, int pass) {
  __shared__ CodebookTables tables;
  __shared__ TileEnds tile_ends;
  ptx::allow_dependent_launch();
  // An attention kernel of the pass before may still read the workspace.
  if (pass > 0) ptx::wait_for_predecessor();
  if (threadIdx.x < kWarpSize) {
    write_codebook_tables(&tables, p.k_codes, p.k_centroids, p.v_centroids);
  }
  const PageView& view = p.cache;
  const int heads = view.num_kv_heads;
  const uint32_t block_size = static_cast<uint32_t>(view.block_size);
  const int block_shift = (block_size & (block_size - 1)) == 0 ? __popc(block_size - 1) : -1;
  const bool copy8 = copy_width(view) >= 8;

  const int64_t pass_begin = pass * w.pass_tiles, pass_end = pass_begin + w.capacity;
  int64_t tile_index = pass_begin + blockIdx.x;  // among the tiles of all passes
  int64_t tiles_before = 0;                      // of one head, before first_seq
  for (int first_seq = 0; first_seq < p.num_seqs && tiles_before * heads < pass_end;
       first_seq += kExpandThreads) {
    const int64_t tiles_here = scan_tiles(p, w, first_seq, tile_ends);
    const int64_t all_end = (tiles_before + tiles_here) * heads;
    const int64_t end = all_end < pass_end ? all_end : pass_end;
    for (; tile_index < end; tile_index += gridDim.x) {
      const int64_t index = tile_index - tiles_before * heads;
      int lo = 0, hi = kExpandThreads - 1;
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
      source.num_keys = p.seq_lens[seq];
      const int q_len = p.query_start_loc[seq + 1] - p.query_start_loc[seq];
      source.first_key = unit_keys(source.num_keys, q_len, p.window_left, w.tile_tokens).begin +
                         tile * Image::kTileTokens;
      source.block_shift = block_shift;
      source.copy8 = copy8;
      uint8_t* image = w.tiles + (place.first_tile + tile) * static_cast<int64_t>(Image::kBytes);
      expand_keys<Image>(view, source, tables.k_codes, image);
      expand_values<Image>(view, source, tables.v_high, tables.v_low, tables.v_unit, image);
      expand_scales<Image>(view, source, image);
    }
    tiles_before += tiles_here;
  }
  // The end of this kernel stands for the end of those before it: the next one waits for this one
  // only.
  ptx::wait_for_predecessor();
}

}  // namespace tq4
