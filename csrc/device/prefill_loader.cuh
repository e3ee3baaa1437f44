// Prefill, steps 1 and 2: pages to the raw ring, raw slices to K and V tiles.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../params.h"
#include "../ptx/arith.cuh"
#include "../ptx/smem.cuh"
#include "codebook.cuh"
#include "prefill_config.cuh"
#include "unpack4.cuh"

namespace tq4::sm80 {

// What the page loader needs, kept in shared memory: loop invariants that would otherwise push the
// accumulators out of their registers.
struct alignas(16) PageInfo {
  const int32_t* table;  // the sequence's row of block_table
  int key_begin;         // first key of tile 0
  int key_end;           // keys from here on are not loaded
};
static_assert(sizeof(PageInfo) == 16, "read as one vector");

// Where one thread copies and unpacks its slice of every tile: byte offsets that never change, made
// once and read back as one vector.
struct alignas(16) ThreadSlot {
  uint32_t source;  // of the K codes in a block, KV head and (where fixed) token included
  uint32_t norm;    // of the norm in a block; slice 0 copies K's, slice 1 V's
  uint32_t raw;     // of the K codes in a stage
  uint32_t tiles;   // low half: chunk 0 in the K tile; high half: chunk 0 in the V tile
};

// [1/7] pages -> raw ring.
//
// Page ids travel in the same groups, kStages tiles ahead of the codes they lead to, so that no
// thread ever waits for (or holds in a register) an entry of the block table.
template <typename Config>
struct PageLoader {
  uint32_t smem;
  int copy_bytes;   // widest aligned copy: 16, 8 or 4
  int block_shift;  // log2(block_size), or -1

  __device__ __forceinline__ int block_of(int token, const PageView& view) const {
    return block_shift >= 0 ? token >> block_shift : token / view.block_size;
  }

  // Tiles start at multiples of kTile: where block_size divides it, a thread always copies the same
  // token of a block.
  __device__ __forceinline__ bool fixed_token() const {
    return block_shift >= 0 && 1 << block_shift <= Config::kTile;
  }

  __device__ __forceinline__ void write_slot(const PageView& view, int kv_head) const {
    const int row = threadIdx.x / Config::kThreadsPerToken;
    const int slice = threadIdx.x % Config::kThreadsPerToken;
    const int in_block = fixed_token() ? row & ((1 << block_shift) - 1) : 0;
    // A slice lies inside one quarter of the head dimension; the V tile takes the slices of a token
    // as neighbouring chunks, which keeps the stores free of conflicts (undone by value_dim).
    constexpr int kSlicesPerQuarter = Config::kThreadsPerToken / 4;
    const int chunk = slice % kSlicesPerQuarter * Config::kKeyChunksPerSlice;
    ThreadSlot slot;
    slot.source = view.k_codes + kv_head * view.code_head_stride +
                  in_block * view.code_token_stride + slice * Config::kSlice;
    slot.norm = (slice == 0 ? view.k_norms : view.v_norms) + kv_head * view.norm_head_stride +
                in_block * view.norm_token_stride;
    slot.raw = row * Config::kCodeBytes + slice * Config::kSlice;
    slot.tiles = Config::Key::offset(row, slice / kSlicesPerQuarter, chunk) |
                 Config::Value::offset(row, slice) << 16;
    ptx::st_shared_v4(smem + Config::kSlots + 16 * threadIdx.x, slot.source, slot.norm, slot.raw,
                      slot.tiles);
  }

  __device__ __forceinline__ uint32_t page_slot(int tile, unsigned row) const {
    return smem + Config::kPages + 4 * (tile % Config::kPageSlots * Config::kTile + row);
  }

  // Entries past the last page of a sequence are garbage: never read, let alone followed.
  __device__ __forceinline__ void copy_page_id(int tile, unsigned row, const PageView& view) const {
    const uint4 info = ptx::ld_shared_v4(smem + Config::kPageInfo);
    const int token = info.z + tile * Config::kTile + row;
    if (token >= static_cast<int>(info.w)) return;
    const auto* table =
        reinterpret_cast<const int32_t*>(static_cast<uint64_t>(info.y) << 32 | info.x);
    ptx::cp_async<4>(page_slot(tile, row), table + block_of(token, view));
  }

  template <int kBytes>
  __device__ __forceinline__ void copy_slice(uint32_t dst, const uint8_t* src) const {
#pragma unroll
    for (int i = 0; i < Config::kSlice; i += kBytes) ptx::cp_async<kBytes>(dst + i, src + i);
  }

  __device__ __forceinline__ void copy_codes(uint32_t dst, const uint8_t* src) const {
    if constexpr (Config::kSlice % 16 == 0) {
      if (copy_bytes == 16) return copy_slice<16>(dst, src);
    }
    if constexpr (Config::kSlice % 8 == 0) {
      if (copy_bytes >= 8) return copy_slice<8>(dst, src);
    }
    copy_slice<4>(dst, src);
  }

  __device__ __forceinline__ void copy(int tile, const PageView& view) const {
    const unsigned thread = ptx::thread_idx_volatile();
    const unsigned row = thread / Config::kThreadsPerToken;
    const unsigned slice = thread % Config::kThreadsPerToken;
    const uint2 range = ptx::ld_shared_v2(smem + Config::kPageInfo + offsetof(PageInfo, key_begin));
    const int token = range.x + tile * Config::kTile + row;
    if (slice == 2) copy_page_id(tile + Config::kStages, row, view);
    if (token >= static_cast<int>(range.y)) return;
    uint4 slot = ptx::ld_shared_v4(smem + Config::kSlots + 16 * thread);  // ThreadSlot
    if (!fixed_token()) {
      const int in_block = token - block_of(token, view) * view.block_size;
      slot.x += in_block * view.code_token_stride;
      slot.y += in_block * view.norm_token_stride;
    }
    const int page = ptx::ld_shared_u32(page_slot(tile, row));
    const uint8_t* block = view.base + page * view.block_stride;
    const uint32_t stage = smem + Config::kRaw + tile % Config::kStages * Config::kRawBytes;
    const uint8_t* codes = block + slot.x;
    copy_codes(stage + slot.z, codes);
    copy_codes(stage + slot.z + Config::kTile * Config::kCodeBytes,
               codes + (view.v_codes - view.k_codes));
    if (slice < 2) {
      ptx::cp_async<4>(
          stage + Config::kTile * 2 * Config::kCodeBytes + 4 * (slice * Config::kTile + row),
          block + slot.y);
    }
  }
};

// [2/7] raw slice -> K tile, V tile and column scales of one buffer.
//
// Rejected: unpacking in small pieces between the HMMAs of P V, to use their free issue slots. Both
// warps of a scheduler then unpack at the same time and the tensor core waits: 315 instead of 331
// TFLOPS (docs/tuning.md).
template <typename Config>
__device__ __forceinline__ void unpack_tile(uint32_t smem, int tile) {
  const unsigned thread = ptx::thread_idx_volatile();
  const int row = thread / Config::kThreadsPerToken;
  const uint2 range = ptx::ld_shared_v2(smem + Config::kPageInfo + offsetof(PageInfo, key_begin));
  const bool valid =
      static_cast<int>(range.x) + tile * Config::kTile + row < static_cast<int>(range.y);
  const uint32_t stage = smem + Config::kRaw + tile % Config::kStages * Config::kRawBytes;
  const uint32_t buffer = smem + Config::kBuffers + tile % 2 * Config::kBufferBytes;
  const uint2 slot = ptx::ld_shared_v2(smem + Config::kSlots + 16 * thread + 8);  // raw, tiles
  const uint32_t table = smem + Config::kTables;

  const auto read_words = [](uint32_t address, uint32_t (&w)[Config::kSliceWords]) {
    if constexpr (Config::kSliceWords == 4) {
      const uint4 v = ptx::ld_shared_v4(address);
      w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
    } else {
#pragma unroll
      for (int i = 0; i < Config::kSliceWords; ++i) w[i] = ptx::ld_shared_u32(address + 4 * i);
    }
  };
  const auto read_table = [&](int offset) {
    const uint4 w = ptx::ld_shared_v4(table + offset);
    return ByteTable{w.x, w.y, w.z, w.w};
  };

  // Keys, in B-fragment order.  Chunk c of a lane's quarter is chunk 0's address ^ (c << 4).
  const uint32_t key = buffer + (slot.y & 0xffffu);
  uint32_t words[Config::kSliceWords];
  read_words(stage + slot.x, words);
  if constexpr (Config::kInt8) {
    const ByteTable k8 = read_table(offsetof(CodebookTables, k_codes));
#pragma unroll
    for (int i = 0; i < Config::kSliceWords; i += 2) {
      const uint32_t dst = key ^ (i / 2 << 4);
      uint32_t x0, x1;
      unpack_int8(words[i], k8, x0, x1);
      if (i + 1 < Config::kSliceWords) {
        uint32_t x2, x3;
        unpack_int8(words[i + 1 < Config::kSliceWords ? i + 1 : i], k8, x2, x3);
        ptx::st_shared_v4(dst, x0, x1, x2, x3);
      } else {
        ptx::st_shared_v2(dst, x0, x1);
      }
    }
  } else {
    const ByteTable high = read_table(offsetof(CodebookTables, k_high));
    const ByteTable low = read_table(offsetof(CodebookTables, k_low));
#pragma unroll
    for (int i = 0; i < Config::kSliceWords; ++i) {
      uint32_t x[4];
      unpack_fp16(words[i], high, low, x);
      ptx::st_shared_v4(key ^ (i << 4), x[0], x[1], x[2], x[3]);
    }
  }

  // Values.  The norm of a token that is not there is garbage (NaN as likely as not): select.
  const uint32_t norms = stage + Config::kTile * 2 * Config::kCodeBytes + 4 * row;
  const float v_unit = ptx::ld_shared_f32(table + offsetof(CodebookTables, v_unit));
  const float v_norm = valid ? ptx::ld_shared_f32(norms + 4 * Config::kTile) * v_unit : 0.f;
  const uint32_t v_norm2 = ptx::pack_f16x2(v_norm, v_norm);
  const uint32_t value = buffer + Config::kValuePart + (slot.y >> 16);
  read_words(stage + slot.x + Config::kTile * Config::kCodeBytes, words);
  const ByteTable high = read_table(offsetof(CodebookTables, v_high));
  const ByteTable low = read_table(offsetof(CodebookTables, v_low));
#pragma unroll
  for (int i = 0; i < Config::kSliceWords; ++i) {
    uint32_t x[4];
    unpack_fp16(words[i], high, low, x);
    ptx::st_shared_v4(value ^ (i * Config::kThreadsPerToken << 4), ptx::mul_f16x2(x[0], v_norm2),
                      ptx::mul_f16x2(x[1], v_norm2), ptx::mul_f16x2(x[2], v_norm2),
                      ptx::mul_f16x2(x[3], v_norm2));
  }

  if (thread % Config::kThreadsPerToken == 0) {
    // Two mantissa bits fewer (2^-21 relative): kMagic = 3 * 2^22, so kMagic * norm is then exact
    // and the subtraction inside the FMA leaves no error in the score.
    const float k_norm = valid ? __uint_as_float(ptx::ld_shared_u32(norms) & ~3u) : 0.f;
    const uint32_t scales = buffer + Config::kScalePart + 8 * row;
    ptx::st_shared_v2(scales, __float_as_uint(k_norm), __float_as_uint(-kMagic * k_norm));
  }
}

}  // namespace tq4::sm80
