// The kernel's quantisation by cells (csrc/device/cell_table.cuh), instruction by instruction, on
// the host.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "device/cell_table.cuh"

namespace tq4::test {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

class CellQuantiser {
 public:
  explicit CellQuantiser(const float* boundaries)
      : axis_(make_cell_axis(boundaries[0], boundaries[14])) {
    float positions[16] = {};
    CellSet cells = 0;
    for (int i = 0; i < 15; ++i) {
      positions[i] = boundary_position(axis_, boundaries[0], boundaries[14], boundaries[i]);
      if (positions[i] >= 0.f) cells |= CellSet{1} << cell_number(positions[i]);
    }
    for (int i = 0; i < 15; ++i) usable_ = usable_ && has_own_cell(cells, positions[i], i);
    for (int c = 0; c < kCells; ++c) {
      cells_[c] = make_cell(cells, c, positions[cells_below(cells, c)]);
    }
  }

  // Whether the boundaries can be served by cells; if not, the kernel counts them one by one.
  bool usable() const { return usable_; }

  // Index of y as an even and as an odd dimension of its byte.
  int even(float y) const {
    const float u = cell_position(axis_, y);
    return bits_of(std::fma(u, kCellStep, cell(u).even_intercept)) >> 19 & 15;
  }
  int odd(float y) const {
    const float u = cell_position(axis_, y);
    return bits_of(std::fma(u, kCellStep, cell(u).odd_intercept)) >> 15 & 15;
  }

 private:
  const Cell& cell(float u) const {
    return cells_[bits_of(std::fma(u, kCellSpan, 8388608.f)) & 31];  // 2^23: rounds to an integer
  }

  CellAxis axis_;
  Cell cells_[kCells];
  bool usable_ = true;
};

}  // namespace tq4::test
