// CPU version of csrc/ptx/mma_bf16.cuh.
#pragma once
#include "../intrinsics.h"

namespace tq4::ptx {

inline void mma_m16n8k16_bf16bf16f32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                     uint32_t b1) {
  const auto value = [](uint64_t word, int i) {
    return emulation::from_bits<float>(static_cast<uint32_t>(word >> (16 * i)) << 16);
  };
  const auto as = emulation::exchange(emulation::kMmaBfloat, a[0], a[1], a[2], a[3]);
  uint64_t all_a[32][4];
  std::memcpy(all_a, as, sizeof all_a);
  const auto bs = emulation::exchange(emulation::kMmaBfloatB, b0, b1);
  const int g = emulation::lane() / 4, t = emulation::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), col = 2 * t + i % 2;
    double sum = d[i];
    for (int k = 0; k < 16; ++k) {
      const int quad = k % 8 / 2, high = k / 8;
      sum += static_cast<double>(value(all_a[4 * (row % 8) + quad][row / 8 + 2 * high], k % 2)) *
             value(bs[4 * col + quad][high], k % 2);
    }
    d[i] = static_cast<float>(sum);
  }
}

}  // namespace tq4::ptx
