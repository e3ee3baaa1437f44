// A rotation matrix as B fragments in shared memory, and the recognition of Hadamard rotations.
//
// Fragment elements stand for dims as fragment_map.cuh says; g = lane / 4, t = lane % 4.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../ptx/arith.cuh"
#include "common.cuh"
#include "fragment_map.cuh"

namespace tq4 {

// What one pass over the matrix finds out.
struct RotationScan {
  bool hadamard;  // R = largest * H * diag(signs), H Sylvester's Hadamard matrix
  float largest;  // largest |entry|
};

// Bits in which entries 4 column .. + 3 of row i are not those of a Hadamard rotation with row 0
// `top`: H[i][j] = -1 to the number of common one bits of i and j, and row 0 of H is all ones.
__device__ __forceinline__ uint32_t hadamard_difference(const uint4& v, const uint4& top,
                                                        uint32_t i, uint32_t column) {
  const uint32_t s0 = static_cast<uint32_t>(__popc(i & (column * 4))) << 31;
  const uint32_t s1 = i << 31, s2 = i >> 1 << 31;
  return (v.x ^ top.x ^ s0) | (v.y ^ top.y ^ (s0 ^ s1)) | (v.z ^ top.z ^ (s0 ^ s2)) |
         (v.w ^ top.w ^ (s0 ^ s1 ^ s2));
}

constexpr uint32_t kMagnitudeBits = 0x7fffffffu;

// Bits in which the magnitudes of four entries are not `corner`.
__device__ __forceinline__ uint32_t magnitude_difference(const uint4& v, uint32_t corner) {
  return ((v.x ^ corner) | (v.y ^ corner) | (v.z ^ corner) | (v.w ^ corner)) & kMagnitudeBits;
}

// Reads all of R with the whole CTA, whose size is a multiple of D / 4 threads.  `scratch` is one
// shared word.  Contains barriers.
//
// A Hadamard rotation is told by its entries, all of them: nothing but the matrix reaches the
// kernel, and a wrong guess would be a silently wrong result.  64 KB from L2 take about 1 us, once
// a CTA, behind the first tile's loads.
template <int D>
__device__ __forceinline__ RotationScan scan_rotation(const float* __restrict__ rotation,
                                                      uint32_t* scratch) {
  constexpr int kQuads = D / 4;  // float4 in a row
  constexpr bool kPowerOfTwo = (D & (D - 1)) == 0;
  constexpr int kTotal = D * kQuads;
  constexpr int kBatch = 8;  // loads in flight a thread: the latency is paid once for each batch
  const uint4* quads = reinterpret_cast<const uint4*>(rotation);
  const int thread = threadIdx.x, threads = blockDim.x;
  const int column = thread % kQuads;  // the same for all of a thread's loads
  const uint32_t corner = quads[0].x & kMagnitudeBits;
  const uint4 top = quads[column];
  uint32_t largest = 0, difference = 0;
#pragma unroll 1
  for (int first = thread; first < kTotal; first += kBatch * threads) {
    uint4 batch[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int q = first + k * threads;
      batch[k] = quads[q < kTotal ? q : first];  // the end of the matrix: the same entries again
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const uint4 v = batch[k];
      largest =
          max(max(largest, v.x & kMagnitudeBits), max(v.y & kMagnitudeBits, v.z & kMagnitudeBits));
      largest = max(largest, v.w & kMagnitudeBits);
      if constexpr (kPowerOfTwo) {
        const int q = first + k * threads;
        difference |= hadamard_difference(v, top, (q < kTotal ? q : first) / kQuads, column);
      }
    }
  }
  difference |= magnitude_difference(top, corner);
  if (threadIdx.x == 0) *scratch = 0;
  __syncthreads();  // orders the zero before the maxima below
  largest = __reduce_max_sync(kFullWarp, largest);
  if (threadIdx.x % kWarpSize == 0) atomicMax(scratch, largest);
  // Also orders every warp's maximum before the read below.
  const bool differs = __syncthreads_or(difference != 0) != 0;
  RotationScan scan;
  scan.largest = __uint_as_float(*scratch);
  scan.hadamard = kPowerOfTwo && !differs && scan.largest > 0.f && scan.largest < INFINITY;
  return scan;
}

// An fp32 number as the sum of two fp16 ones, packed {high, low}: relative error 2^-22 while the
// number stays within [2^-3, 2^15] (smaller ones: absolute error 2^-25).
__device__ __forceinline__ uint32_t split_fp16(float x) {
  const __half high = __float2half_rn(x);
  const __half low = __float2half_rn(x - __half2float(high));
  return __half_as_ushort(high) | static_cast<uint32_t>(__half_as_ushort(low)) << 16;
}

// Entries are scaled so that the largest becomes this: keeps the low parts of typical entries
// (1/sqrt(D) of an orthogonal matrix) out of fp16's subnormals.  Dividing by the largest entry
// rather than by a power of two makes matrices of +-1/sqrt(D) exact in one fp16.
inline constexpr float kRotationUnit = 1024.f;

__device__ __forceinline__ float scale_of_rotation(float largest) {
  return largest > 0.f ? kRotationUnit / largest : 1.f;
}

// B fragments of kTiles column tiles of a rotation, R = (high + low) / scale.
template <int D, int kTiles>
struct RotationFragments {
  // [tile / 2][k16 step][lane] = {b0, b1 of the even tile, b0, b1 of the odd tile}
  uint4 high[kTiles / 2][D / 16][kWarpSize];
  uint4 low[kTiles / 2][D / 16][kWarpSize];
};

// Fills the fragments of column tiles first_tile .. first_tile + kTiles - 1 with the whole CTA.
// kStore: x @ R^T, B[k][n] = R[n][k]; else x @ R, B[k][n] = R[k][n]; dims as in fragment_map.cuh.
// Returns whether this thread wrote a low part that is not zero.  Callers put barriers between it
// and the readers before and after.
template <int D, int kTiles, bool kStore>
__device__ __forceinline__ bool fill_rotation_fragments(RotationFragments<D, kTiles>& fragments,
                                                        const float* __restrict__ rotation,
                                                        float scale, int first_tile) {
  using Map = FragmentMap<D>;
  constexpr int kTotal = kTiles * Map::kSteps * kWarpSize;
  constexpr int kBatch = 4;  // as in scan_rotation
  const int threads = blockDim.x;
  uint32_t low_bits = 0;
#pragma unroll 1
  for (int first = threadIdx.x; first < kTotal; first += kBatch * threads) {
    float2 pairs[kBatch][2];  // b0, b1
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int i = min(first + k * threads, kTotal - 1);
      // Neighbouring threads write neighbouring 8 bytes.
      const int lane = i / 2 % kWarpSize, g = lane / 4, t = lane % 4;
      const int step = i / 2 / kWarpSize % Map::kSteps;
      const int tile = first_tile + i / 2 / kWarpSize / Map::kSteps * 2 + i % 2;
#pragma unroll
      for (int high = 0; high < 2; ++high) {
        if constexpr (kStore) {
          const int row = Map::code_dim(tile, g / 2, g % 2);
          const float* entry = rotation + row * D + Map::input_dim(step, high, t, 0);
          pairs[k][high] = *reinterpret_cast<const float2*>(entry);
        } else {
          const int column = Map::output_dim(tile, g / 2, g % 2);
          const float* entry = rotation + Map::code_dim(2 * step + high, t, 0) * D + column;
          pairs[k][high] = {entry[0], entry[D]};
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int i = first + k * threads;
      if (i >= kTotal) continue;
      uint2 high, low;
      const uint32_t x0 = split_fp16(pairs[k][0].x * scale), y0 = split_fp16(pairs[k][0].y * scale);
      const uint32_t x1 = split_fp16(pairs[k][1].x * scale), y1 = split_fp16(pairs[k][1].y * scale);
      high.x = ptx::prmt(x0, y0, 0x5410);
      high.y = ptx::prmt(x1, y1, 0x5410);
      low.x = ptx::prmt(x0, y0, 0x7632);
      low.y = ptx::prmt(x1, y1, 0x7632);
      reinterpret_cast<uint2*>(fragments.high)[i] = high;
      reinterpret_cast<uint2*>(fragments.low)[i] = low;
      low_bits |= (low.x | low.y) & 0x7fff7fffu;
    }
  }
  return low_bits != 0;
}

}  // namespace tq4
