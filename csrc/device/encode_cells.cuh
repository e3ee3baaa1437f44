// Cells as in cell_table.cuh, with intercepts for which a byte of codes ends in bits 16..23, so
// that bytes are put together by permutations: 7 instructions for 8 codes instead of 11.
//
//   odd dims    r = 128 + i       integer part in bits 16..19
//   even dims   r = 8 + i         for i < 8:  [8, 16), exponent 130, units in bits 20..22
//               r = 2 i           for i >= 8: [16, 32), exponent 131, units of 2 in bits 20..22
//
// Of the even ones bit 23 is the lowest of the exponent, which is the highest of i; r runs from one
// range into the other without a step at i = 8.  The line in a cell still rises by less than 1, the
// least distance of two thresholds.
#pragma once
#include <cmath>
#include <cstdint>

#include "cell_table.cuh"
#include "common.cuh"

namespace tq4 {

// Where the even dims' r begins to mean i.
TQ4_HOST_DEVICE constexpr float even_threshold(int i) {
  return static_cast<float>(i < 8 ? 8 + i : 2 * i);
}

// As make_cell.
TQ4_HOST_DEVICE Cell make_byte_cell(CellSet cells, int c, float u) {
  const bool inside = cells >> c & 1;
  const int below = cells_below(cells, c);
  const float at = inside ? u : static_cast<float>(c) * (1.f / kCellSpan);
  const float even = inside ? even_threshold(below + 1) - 0x1p-19f
                            : even_threshold(below) + (below < 8 ? 0.5f : 1.f);
  const float odd = static_cast<float>(128 + below) + (inside ? 1.f - 0x1p-16f : 0.5f);
  return {fmaf(-kCellStep, at, even), fmaf(-kCellStep, at, odd)};
}

// Of the byte of two neighbouring dims in bits 16..23, the bits that are the even one's.
inline constexpr uint32_t kEvenNibble = 0xfff00000u;

}  // namespace tq4
