// CPU versions of csrc/ptx/mma_tf32.cuh.
#pragma once
#include "../cuda_cpu.h"

namespace tq4::ptx {

inline uint32_t tf32_high(float x) { return __float_as_uint(x) & 0xffffe000u; }
inline uint32_t tf32_low(float x) { return __float_as_uint(x - __uint_as_float(tf32_high(x))); }

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto value = [](uint64_t bits) {
    return __uint_as_float(static_cast<uint32_t>(bits) & 0xffffe000u);
  };
  const auto as = emulation::exchange(emulation::kMmaTf32, a[0], a[1], a[2], a[3]);
  uint64_t all_a[32][4];
  std::memcpy(all_a, as, sizeof all_a);
  const auto bs = emulation::exchange(emulation::kMmaTf32B, b0, b1);
  const int g = emulation::lane() / 4, t = emulation::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), col = 2 * t + i % 2;
    double sum = d[i];
    for (int k = 0; k < 8; ++k) {
      sum += static_cast<double>(value(all_a[4 * (row % 8) + k % 4][row / 8 + 2 * (k / 4)])) *
             value(bs[4 * col + k % 4][k / 4]);
    }
    d[i] = static_cast<float>(sum);
  }
}

}  // namespace tq4::ptx
