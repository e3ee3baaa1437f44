// Lookup tables of one kernel launch in shared memory, made from the codebooks once a CTA.
#pragma once
#include <cuda_fp16.h>

#include <cstdint>

#include "../params.h"
#include "../ptx/smem.cuh"
#include "unpack4.cuh"

namespace tq4 {

// The units are powers of two that bring the largest |centroid| into [0.5, 1): the fp16 tables then
// keep full precision for any codebook, and the norm takes the unit.
struct CodebookTables {
  ByteTable k_codes;        // int8
  ByteTable k_high, k_low;  // fp16(k centroid / k_unit) by bytes
  ByteTable v_high, v_low;  // fp16(v centroid / v_unit) by bytes
  float k_unit, v_unit;     // value of one table unit: centroid = table * unit
  float pad[2];
};
static_assert(sizeof(CodebookTables) == 96, "read as 16-byte vectors");

namespace detail {

// Lane i < 16 holds centroid i; returns the power of two and writes the byte tables.
__device__ inline float write_fp16_table(float centroid, ByteTable* high, ByteTable* low) {
  const int lane = threadIdx.x % 32;
  float largest = fabsf(centroid);
#pragma unroll
  for (int step = 8; step > 0; step /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  }
  int exponent = 0;
  frexpf(largest, &exponent);
  exponent = largest > 0.f && largest < INFINITY ? max(-100, min(100, exponent)) : 0;
  const uint32_t bits = __half_as_ushort(__float2half_rn(ldexpf(centroid, -exponent)));
  if (lane < 16) {
    reinterpret_cast<uint8_t*>(high)[lane] = static_cast<uint8_t>(bits >> 8);
    reinterpret_cast<uint8_t*>(low)[lane] = static_cast<uint8_t>(bits);
  }
  return ldexpf(1.f, exponent);
}

}  // namespace detail

// To be called by one whole warp; visible to the CTA after its next barrier.
__device__ inline void write_codebook_tables(CodebookTables* tables, const int8_t* k_codes,
                                             const float* k_centroids, const float* v_centroids) {
  const int lane = threadIdx.x % 32;
  if (lane < 16) reinterpret_cast<int8_t*>(&tables->k_codes)[lane] = k_codes[lane];
  const float k_unit =
      detail::write_fp16_table(k_centroids[lane % 16], &tables->k_high, &tables->k_low);
  const float v_unit =
      detail::write_fp16_table(v_centroids[lane % 16], &tables->v_high, &tables->v_low);
  if (lane == 0) {
    tables->k_unit = k_unit;
    tables->v_unit = v_unit;
  }
}

// A table in registers.  The shared-memory read (rather than a constant or a kernel parameter)
// keeps it out of the uniform registers, from which every PRMT would first have to be copied.
__device__ __forceinline__ ByteTable load_table(const ByteTable* table) {
  const uint4 w = ptx::ld_shared_v4(ptx::smem_address(table));
  return {w.x, w.y, w.z, w.w};
}

}  // namespace tq4
