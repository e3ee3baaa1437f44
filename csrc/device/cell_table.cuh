// Scalar quantisation by a table of cells: the index of y among 15 boundaries in four instructions.
//
// A search over 15 boundaries costs 8 compares and selects a value, all on the ALU pipe, which runs
// at half rate: at the rate HBM delivers 33 M values that alone is more than an H200 has.  Instead
// the range of the boundaries is cut into 29 equal cells (plus one beyond each end), narrow enough
// that a cell holds at most one boundary T.  Inside one cell the index is a step function with at
// most one step, and a step function is the floor of a line: with z the position in cells and
// 0 < slope < 1,
//     floor(base + 1 + slope (z - T))  =  base  for z < T,  base + 1  for z >= T
// because |z - T| < 1 inside the cell; in a cell without a boundary floor(base + 1/2 + slope (z -
// c)), c the cell's middle, is base.  So a lane needs one number a cell, `intercept`, and all cells
// share the slope:
//     u = saturate(y * scale + bias)             FFMA.SAT   position in [0, 1]
//     c = 2^23 + 30 u, rounded to an integer     FFMA       cell number in the low 5 bits
//     e = intercept[c]                           SHFL       lane c holds cell c's
//     r = u * (30 slope) + e                     FFMA
// With the intercept raised by 16, r is in [16, 32) and its integer part sits in mantissa bits
// 19..22; raised by 256, in bits 15..18.  Even dims use the first and odd dims the second, so that
// one LOP3 merges two nibbles into a byte.
//
// Accuracy: r is rounded to 2^-15 (2^-19) cells, u to 2^-24 of the range: below 1e-6 in y, against
// the 1e-5 that the format allows around a boundary.  y equal to a boundary is not above it: the
// intercept is lowered by one unit in the last place of r.
//
// Codebooks whose boundaries are too close for 29 cells, or not finite, or out of order (callers
// may pass anything), are recognised (has_own_cell) and take the plain count.
#pragma once
#include <cmath>
#include <cstdint>

#include "common.cuh"

namespace tq4 {

inline constexpr int kCells = 32;  // one a lane; 0 .. 30 are used
inline constexpr float kCellSpan = 30.f;
inline constexpr float kCellSlope = 0.98f;
inline constexpr float kCellStep = kCellSlope * kCellSpan;  // of r for u from 0 to 1
// Wider cells would lose accuracy to the rounding of r; |y| <= 1, so this only bars boundaries that
// are not made for unit vectors.
inline constexpr float kWidestCell = 0.1f;

struct CellAxis {
  float bias;   // u at y = 0
  float scale;  // u per y
  bool valid;
};

// From the first and the last of the ascending boundaries.  The first lies in the middle of cell 1,
// the last in that of cell 29, so y beyond them falls into cells without a boundary even after
// clamping.
TQ4_HOST_DEVICE CellAxis make_cell_axis(float first, float last) {
  const float cell = (last - first) * (1.f / (kCellSpan - 2.f));
  const float begin = first - cell, end = last + cell;
  CellAxis axis;
#ifdef __CUDA_ARCH__
  axis.scale = __fdividef(1.f, end - begin);  // any value near it will do
#else
  axis.scale = 1.f / (end - begin);
#endif
  axis.bias = -begin * axis.scale;
  axis.valid = cell > 0.f && cell <= kWidestCell && fabsf(axis.bias) <= 1e4f;
  return axis;
}

TQ4_HOST_DEVICE float cell_position(const CellAxis& axis, float y) {
  const float u = fmaf(y, axis.scale, axis.bias);
  return u > 0.f ? (u < 1.f ? u : 1.f) : 0.f;  // as fma_sat: NaN becomes 0
}

// Position of boundary b; negative where no table of cells can serve the boundaries because of it.
TQ4_HOST_DEVICE float boundary_position(const CellAxis& axis, float first, float last, float b) {
  const bool usable = axis.valid && b >= first && b <= last;
  return usable ? cell_position(axis, b) : -1.f;
}

// Number of the cell around u, rounded as in the kernel's inner loop.
TQ4_HOST_DEVICE int cell_number(float u) { return static_cast<int>(rintf(u * kCellSpan)); }

// A set of cells, one bit each.
using CellSet = uint32_t;

TQ4_HOST_DEVICE int cells_below(CellSet cells, int c) {
  const CellSet below = cells & ((CellSet{1} << c) - 1);
#ifdef __CUDA_ARCH__
  return __popc(below);
#else
  int count = 0;
  for (CellSet rest = below; rest != 0; rest &= rest - 1) ++count;
  return count;
#endif
}

// Whether boundary i at position u is the i-th of the boundaries' cells.  If so for all, the
// boundaries ascend and no cell holds two.
TQ4_HOST_DEVICE bool has_own_cell(CellSet cells, float u, int i) {
  return u >= 0.f && cells_below(cells, cell_number(u)) == i;
}

struct Cell {
  float even_intercept;  // + 16
  float odd_intercept;   // + 256
};

// Entry of cell number c, given the cells that hold boundaries and the position of boundary
// cells_below(cells, c).
TQ4_HOST_DEVICE Cell make_cell(CellSet cells, int c, float u) {
  const bool inside = cells >> c & 1;
  const float value = static_cast<float>(cells_below(cells, c)) + (inside ? 1.f : 0.5f);
  const float at = inside ? u : static_cast<float>(c) * (1.f / kCellSpan);
  Cell cell;
  // One rounding each; 2^-19 and 2^-15 are the units of r in [16, 32) and [256, 512).
  cell.even_intercept = fmaf(-kCellStep, at, 16.f + value - (inside ? 0x1p-19f : 0.f));
  cell.odd_intercept = fmaf(-kCellStep, at, 256.f + value - (inside ? 0x1p-15f : 0.f));
  return cell;
}

// The byte of two neighbouring dims in bits 15..22; the other bits are garbage.
TQ4_HOST_DEVICE constexpr uint32_t merge_nibbles(uint32_t even_bits, uint32_t odd_bits) {
  return (even_bits & 0xfff80000u) | (odd_bits & 0x0007ffffu);
}

// Four such bytes, byte 0 first.
TQ4_HOST_DEVICE constexpr uint32_t merge_bytes(uint32_t b0, uint32_t b1, uint32_t b2, uint32_t b3) {
  const uint32_t low = (b1 & 0xffff8000u) | (b0 >> 8 & 0x7fffu);  // bits 7..22
  const uint32_t high = (b3 & 0xffff8000u) | (b2 >> 8 & 0x7fffu);
  return (low >> 7 & 0xffffu) | (high << 9 & 0xffff0000u);
}

}  // namespace tq4
