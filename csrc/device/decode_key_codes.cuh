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

namespace tq4 {

// Selectors of the 8 codes of a word: [0] of codes 0-3, [1] of codes 4-7.
struct SplitSelectors {
  uint32_t low[2], high[2];

  __device__ __forceinline__ static SplitSelectors make(uint32_t word) {
    const uint32_t flipped = word ^ 0x88888888u;
    return {{word, word >> 16}, {flipped, flipped >> 16}};
  }
};

// A table of 16 codes in two halves (decode_codes.h), in registers.
struct SplitTable {
  struct Entries {
    alignas(16) int8_t low[8];
    int8_t high[8];

    __device__ __forceinline__ void put(int at, SplitPair pair) {
      low[at] = pair.low;
      high[at] = pair.high;
    }
  };

  uint32_t low[2], high[2];

  __device__ __forceinline__ void load(const Entries& entries) {
    const uint4 w = ptx::ld_shared_v4(ptx::smem_address(entries.low));
    low[0] = pinned(w.x), low[1] = pinned(w.y), high[0] = pinned(w.z), high[1] = pinned(w.w);
  }

  // Of kTiles A operands, which share the look-up.
  template <int kTiles>
  __device__ __forceinline__ void multiply_low(const uint32_t (&q)[kTiles][4],
                                               const SplitSelectors& of,
                                               int32_t (&sum)[kTiles][4]) const {
    multiply(low, q, of.low, sum);
  }
  template <int kTiles>
  __device__ __forceinline__ void multiply_high(const uint32_t (&q)[kTiles][4],
                                                const SplitSelectors& of,
                                                int32_t (&sum)[kTiles][4]) const {
    multiply(high, q, of.high, sum);
  }

 private:
  template <int kTiles>
  __device__ __forceinline__ static void multiply(const uint32_t (&table)[2],
                                                  const uint32_t (&q)[kTiles][4],
                                                  const uint32_t (&selectors)[2],
                                                  int32_t (&sum)[kTiles][4]) {
    const uint32_t b0 = ptx::prmt(table[0], table[1], selectors[0]);
    const uint32_t b1 = ptx::prmt(table[0], table[1], selectors[1]);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) ptx::mma_m16n8k32_s8s8s32(sum[i], q[i], b0, b1, sum[i]);
  }
};

// One table of 16 codes.
struct PlainKeyCodes {
  struct Tables {
    SplitTable::Entries codes;

    // The lane's codes, from memory: lane i mod 8 has i and i + 8.
    struct Pair {
      int first, second;
    };
    __device__ __forceinline__ static Pair fetch(const AttentionParams& p) {
      const int entry = threadIdx.x % 8;
      return {p.k_codes[entry], p.k_codes[entry + 8]};
    }

    // Returns the unit: 1, or NaN where the codes do not fit in a split table, so that no score
    // comes out right by chance.
    __device__ __forceinline__ float write(const Pair& own) {
      if (threadIdx.x < 8) codes.put(threadIdx.x, split_pair(own.first, own.second));
      const bool fits = max(abs(own.first), abs(own.second)) <= kLargestSplit;
      return __all_sync(kFullWarp, fits) ? 1.f : NAN;
    }
    __device__ __forceinline__ float write(const AttentionParams& p) { return write(fetch(p)); }
  };

  SplitTable codes;

  __device__ __forceinline__ void load(const Tables& tables) { codes.load(tables.codes); }

  // acc += q . code
  template <int kTiles>
  __device__ __forceinline__ void multiply(const uint32_t (&q)[kTiles][4], uint32_t word,
                                           int32_t (&acc)[kTiles][4]) const {
    const SplitSelectors selectors = SplitSelectors::make(word);
    codes.multiply_low(q, selectors, acc);
    codes.multiply_high(q, selectors, acc);
  }
};

// A table of codes and one of rests.
struct SplitKeyCodes {
  struct Tables {
    SplitTable::Entries codes, rests;

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
        codes.put(entry, split_pair(own.code, other.code));
        rests.put(entry, split_pair(own.rest, other.rest));
      }
      return unit;
    }
  };

  SplitTable codes, rests;

  __device__ __forceinline__ void load(const Tables& tables) {
    codes.load(tables.codes);
    rests.load(tables.rests);
  }

  // acc += q . code, rest += q . rest
  __device__ __forceinline__ void multiply(const uint32_t (&q)[1][4], uint32_t word,
                                           int32_t (&acc)[1][4], int32_t (&rest)[1][4]) const {
    const SplitSelectors selectors = SplitSelectors::make(word);
    codes.multiply_low(q, selectors, acc);
    rests.multiply_low(q, selectors, rest);
    codes.multiply_high(q, selectors, acc);
    rests.multiply_high(q, selectors, rest);
  }
};

}  // namespace tq4
