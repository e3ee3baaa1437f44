// The INT8 key codebook in shared memory and in registers, and the products q . k from it, by kind
// of kernel: PlainKeyCodes (one INT8 code a key) or SplitKeyCodes (two terms, decode_codes.h).
//
// Tables    in shared memory; write() is called by all consumer warps, before a barrier of theirs
// load      from there to registers
// multiply  one word of a column's codes (8 dims), one k-step of q
//
// In registers all is pinned: uniform values end up in uniform registers, from which every byte
// permute would have to copy them first (60 instructions a tile).
#pragma once
#include <cstdint>

#include "../params.h"
#include "../ptx/arith.cuh"
#include "../ptx/mma.cuh"
#include "../ptx/smem.cuh"
#include "common.cuh"
#include "decode_codes.h"
#include "pinned.cuh"
#include "unpack4.cuh"

namespace tq4 {

// One table of 16 codes.
struct PlainKeyCodes {
  struct Tables {
    int8_t codes[16];
    uint32_t bit3_mask;

    __device__ __forceinline__ void write(const AttentionParams& p) {
      if (threadIdx.x < 16) codes[threadIdx.x] = p.k_codes[threadIdx.x];
      if (threadIdx.x == 0) bit3_mask = 0x44444444u;
    }
  };

  ByteTable table;
  uint32_t bit3;

  __device__ __forceinline__ void load(const Tables& tables) {
    const uint4 w = ptx::ld_shared_v4(ptx::smem_address(tables.codes));
    const uint32_t mask = ptx::ld_shared_u32(ptx::smem_address(&tables.bit3_mask));
    table = {pinned(w.x), pinned(w.y), pinned(w.z), pinned(w.w)};
    bit3 = pinned(mask);
  }

  // acc += q . code
  __device__ __forceinline__ void multiply(const uint32_t (&q)[4], uint32_t word,
                                           int32_t (&acc)[4]) const {
    // unpack_int8 with one LOP3 less: of its two masks an instruction can hold only one itself.
    const uint32_t entry = word & 0x77777777u;
    const uint32_t half = ((word >> 1) & bit3) | 0x32103210u;
    ptx::mma_m16n8k32_s8s8s32(acc, q, lookup4(table, entry, half),
                              lookup4(table, entry >> 16, half >> 16), acc);
  }
};

// The split tables of codes and of rests.
struct SplitKeyCodes {
  struct Tables {
    alignas(8) int8_t code[2][8];  // halves low and high
    int8_t rest[2][8];

    // Returns the unit: centroid = (code + rest / kKeyRestUnits) * unit.
    __device__ __forceinline__ float write(const AttentionParams& p) {
      const int entry = threadIdx.x % 16;
      const float centroid = p.k_centroids[entry];
      float largest = fabsf(centroid);
#pragma unroll
      for (int step = 8; step > 0; step /= 2) {
        largest = ptx::max_nan(largest, __shfl_xor_sync(kFullWarp, largest, step));
      }
      const float unit = key_unit(largest);
      const KeyTerms own = key_terms(__fdiv_rn(centroid, unit));
      const KeyTerms other = {__shfl_xor_sync(kFullWarp, own.code, 8),
                              __shfl_xor_sync(kFullWarp, own.rest, 8)};
      if (threadIdx.x < 8) {
        const SplitPair codes = split_pair(own.code, other.code);
        const SplitPair rests = split_pair(own.rest, other.rest);
        code[0][entry] = codes.low;
        code[1][entry] = codes.high;
        rest[0][entry] = rests.low;
        rest[1][entry] = rests.high;
      }
      return unit;
    }
  };

  uint32_t code_low[2], code_high[2], rest_low[2], rest_high[2];

  __device__ __forceinline__ void load(const Tables& tables) {
    const auto read = [](const int8_t (&table)[8], uint32_t (&words)[2]) {
      const uint2 w = ptx::ld_shared_v2(ptx::smem_address(table));
      words[0] = pinned(w.x), words[1] = pinned(w.y);
    };
    read(tables.code[0], code_low);
    read(tables.code[1], code_high);
    read(tables.rest[0], rest_low);
    read(tables.rest[1], rest_high);
  }

  // acc += q . code, rest += q . rest
  __device__ __forceinline__ void multiply(const uint32_t (&q)[4], uint32_t word, int32_t (&acc)[4],
                                           int32_t (&rest)[4]) const {
    const uint32_t low[2] = {word, word >> 16};
    const uint32_t flipped = word ^ 0x88888888u;
    const uint32_t high[2] = {flipped, flipped >> 16};
    const auto add = [&q](const uint32_t (&table)[2], const uint32_t (&selectors)[2],
                          int32_t (&sum)[4]) {
      ptx::mma_m16n8k32_s8s8s32(sum, q, ptx::prmt(table[0], table[1], selectors[0]),
                                ptx::prmt(table[0], table[1], selectors[1]), sum);
    };
    add(code_low, low, acc);
    add(rest_low, low, rest);
    add(code_high, high, acc);
    add(rest_high, high, rest);
  }
};

}  // namespace tq4
