// CPU version of csrc/ptx/ldmatrix.cuh.
#pragma once
#include "../intrinsics.h"
#include "smem.cuh"

namespace tq4::ptx {

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  const auto addresses = emulation::exchange(emulation::kLdmatrix, address);
  const int lane = emulation::lane();
  for (int i = 0; i < 4; ++i) {
    const uint32_t row = static_cast<uint32_t>(addresses[8 * i + lane / 4][0]);
    if (row % 16 != 0) emulation::fail("misaligned ldmatrix row");
    r[i] = load_shared<uint32_t>(row + 4 * (lane % 4));
  }
}

}  // namespace tq4::ptx
