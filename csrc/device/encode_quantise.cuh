// The quantisation step of encode_kernel: accumulators to words of codes.
#pragma once
#include <cstdint>

#include "../layout.h"
#include "../ptx/quantise.cuh"
#include "cell_table.cuh"
#include "encode_cells.cuh"
#include "encode_input.cuh"
#include "warp.cuh"

namespace tq4 {

struct Quantiser {
  CellAxis axis;
  float even_intercept, odd_intercept;  // of the cell with this lane's number
  float boundary;                       // the one with this lane's number
  bool exact;                           // the cell table is usable (uniform over the warp)
};

// Lane i holds boundary i, lanes from 15 on any; `make` makes the cell with the lane's number.
template <typename MakeCell>
__device__ __forceinline__ Quantiser make_quantiser(float boundary, MakeCell make) {
  const int lane = threadIdx.x % kWarpSize;
  const float first = __shfl_sync(kFullWarp, boundary, 0);
  const float last = __shfl_sync(kFullWarp, boundary, kNumBoundaries - 1);
  Quantiser quantiser;
  quantiser.axis = make_cell_axis(first, last);
  const float u = boundary_position(quantiser.axis, first, last, boundary);
  const bool has_boundary = lane < kNumBoundaries;
  const CellSet cells = __reduce_or_sync(
      kFullWarp, has_boundary && u >= 0.f ? CellSet{1} << cell_number(u) : CellSet{0});
  quantiser.exact =
      warp_uniform(__all_sync(kFullWarp, !has_boundary || has_own_cell(cells, u, lane)));
  const Cell cell = make(cells, lane, __shfl_sync(kFullWarp, u, cells_below(cells, lane)));
  quantiser.even_intercept = cell.even_intercept;
  quantiser.odd_intercept = cell.odd_intercept;
  quantiser.boundary = boundary;
  return quantiser;
}

__device__ __forceinline__ Quantiser make_quantiser(float boundary) {
  return make_quantiser(boundary,
                        [](CellSet cells, int c, float u) { return make_cell(cells, c, u); });
}

// Of the cells in encode_cells.cuh.
__device__ __forceinline__ Quantiser make_byte_quantiser(float boundary) {
  return make_quantiser(boundary,
                        [](CellSet cells, int c, float u) { return make_byte_cell(cells, c, u); });
}

// Bits of r; see cell_table.cuh.
__device__ __forceinline__ uint32_t cell_line(float x, float scale, float bias, float intercepts) {
  constexpr float kMagic = 8388608.f;  // 2^23: the sum's low bits are the rounded integer
  const float u = ptx::fma_sat(x, scale, bias);
  const int cell = __float_as_int(fmaf(u, kCellSpan, kMagic));  // shfl uses the low 5 bits
  return __float_as_uint(fmaf(u, kCellStep, __shfl_sync(kFullWarp, intercepts, cell)));
}

// words[r][w]: the lane's codes of row g + 8 r; y = acc * scales[r].  Destroys acc.
template <class C>
__device__ __forceinline__ void quantise(Accumulators<C>& acc, const float (&scales)[2],
                                         const Quantiser& quantiser,
                                         uint32_t (&words)[2][C::Map::kPassGroups]) {
  using Map = typename C::Map;
  if (quantiser.exact) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float scale = scales[r] * quantiser.axis.scale;
#pragma unroll
      for (int w = 0; w < Map::kPassGroups; ++w) {
        uint32_t bytes[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          bytes[j] = merge_nibbles(
              cell_line(acc[w][j][2 * r], scale, quantiser.axis.bias, quantiser.even_intercept),
              cell_line(acc[w][j][2 * r + 1], scale, quantiser.axis.bias, quantiser.odd_intercept));
        }
        words[r][w] = merge_bytes(bytes[0], bytes[1], bytes[2], bytes[3]);
      }
    }
    return;
  }
  // The definition itself: a nibble counts the boundaries below y; 15 cannot overflow it.
#pragma unroll
  for (int i = 0; i < 16 * Map::kPassGroups; ++i)
    acc[i / 16][i / 4 % 4][i % 4] *= scales[i / 2 % 2];
#pragma unroll
  for (int i = 0; i < 2 * Map::kPassGroups; ++i) words[i % 2][i / 2] = 0;
#pragma unroll 1
  for (int i = 0; i < kNumBoundaries; ++i) {
    const float boundary = __shfl_sync(kFullWarp, quantiser.boundary, i);
#pragma unroll
    for (int w = 0; w < Map::kPassGroups; ++w) {
#pragma unroll
      for (int e = 0; e < 16; ++e) {
        const int r = e / 8;
        if (acc[w][e / 2 % 4][2 * r + e % 2] > boundary) words[r][w] += 1u << nibble_shift(e % 8);
      }
    }
  }
}

// Sum of the squared centroids behind the codes of a row (this lane's share).
template <int kWords>
__device__ __forceinline__ float decoded_square_sum(const uint32_t (&words)[kWords],
                                                    float squared_centroids) {
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      // The table repeats after 16 lanes, so the fifth bit of the lane number does not matter.
      sum += __shfl_sync(kFullWarp, squared_centroids, static_cast<int>(words[w] >> (4 * e)));
    }
  }
  return sum;
}

}  // namespace tq4
