// The pair table of the decode kernels: one code byte (or two codes of neighbouring tokens in one
// byte) to two fp16 values by one shared-memory load.
//
//   entry of byte b     half2 { c[b >> 4], c[b & 15] }     4 bytes
//   address             table + 128 b + 4 lane              every lane has a copy in its own bank
//
// No two lanes ever meet on a bank: a load is one wavefront whatever the codes are.  The address of
// byte i of a word is a single instruction, the dot product of the word's bytes with 128 at place
// i, plus table + 4 lane: it runs on the integer multiplier, which is idle otherwise, where the
// byte permutes of K keep the ALU busy.  The values are exact for any codebook; by byte permutes
// alone the same would take 2.9 ALU instructions a value.
//
// Centroids are stored in units of a power of two that brings the largest into [0.5, 1), so that a
// codebook of any magnitude keeps fp16's precision.
#pragma once
#include <cstdint>

#include "../ptx/arith.cuh"
#include "../ptx/smem.cuh"
#include "common.cuh"

namespace tq4 {

constexpr uint32_t kPairRowBytes = 4 * kWarpSize;
constexpr uint32_t kPairTableBytes = 256 * kPairRowBytes;

__device__ __forceinline__ float power_of_two(int exponent) {
  return __uint_as_float(static_cast<uint32_t>(127 + exponent) << 23);
}

// Writes rows `first_row`, `first_row` + `row_step`, ... ; one warp, of whose lanes i and i + 16
// hold centroid i.  Returns the unit: centroid = entry * unit.
__device__ __forceinline__ float write_pair_table(uint32_t table, float centroid, int first_row,
                                                  int row_step) {
  const int lane = threadIdx.x % kWarpSize;
  float largest = fabsf(centroid);
#pragma unroll
  for (int step = 8; step > 0; step /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, step));
  }
  // By the bits of the exponent: frexpf and ldexpf would be most of this function's code.
  int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 126;
  exponent = largest > 0.f && largest < INFINITY ? max(-100, min(100, exponent)) : 0;
  const uint32_t half = ptx::pack_f16x2(centroid * power_of_two(-exponent), 0.f);
#pragma unroll 4
  for (int row = first_row; row < 256; row += row_step) {
    const uint32_t low = __shfl_sync(kFullWarp, half, row >> 4);
    const uint32_t high = __shfl_sync(kFullWarp, half, row & 15);
    ptx::st_shared_u32(table + row * kPairRowBytes + 4 * lane, low | high << 16);
  }
  return power_of_two(exponent);
}

// half2 of byte kByte of `codes`.  lane_table: the table's address + 4 * lane.
template <int kByte>
__device__ __forceinline__ uint32_t lookup_pair(uint32_t lane_table, uint32_t codes) {
  return ptx::ld_shared_u32(ptx::dot_u8x4(codes, kPairRowBytes << (8 * kByte), lane_table));
}

// Codes of two tokens, 8 dims each, to pair indices: byte i of `even` is {dim 2i of a, dim 2i of
// b}, of `odd` the same of dim 2i + 1.
struct TokenPairs {
  uint32_t even, odd;
};

__device__ __forceinline__ TokenPairs pair_tokens(uint32_t a, uint32_t b) {
  return {ptx::bit_select(0xf0f0f0f0u, a, b >> 4), ptx::bit_select(0xf0f0f0f0u, a << 4, b)};
}

}  // namespace tq4
