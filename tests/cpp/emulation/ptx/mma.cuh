// CPU versions of csrc/ptx/mma.cuh: the same fragment maps.
#pragma once
#include "../cuda_cpu.h"

namespace tq4::ptx {

namespace detail {
inline int8_t byte_of(uint64_t word, int i) { return static_cast<int8_t>(word >> (8 * i)); }
inline float half_of(uint64_t word, int i) {
  return emulation::half_to_float(static_cast<uint16_t>(word >> (16 * i)));
}
}  // namespace detail

inline void mma_m16n8k32_s8s8s32(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                 const int32_t (&c)[4]) {
  const auto as = emulation::exchange(emulation::kMmaInt8, a[0], a[1], a[2], a[3]);
  uint64_t all_a[32][4];
  std::memcpy(all_a, as, sizeof all_a);
  const auto bs = emulation::exchange(emulation::kMmaInt8B, b0, b1);
  const int g = emulation::lane() / 4, t = emulation::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), col = 2 * t + i % 2;
    int32_t sum = c[i];
    for (int k = 0; k < 32; ++k) {
      const int quad = k % 16 / 4, high = k / 16;
      sum += detail::byte_of(all_a[4 * (row % 8) + quad][row / 8 + 2 * high], k % 4) *
             detail::byte_of(bs[4 * col + quad][high], k % 4);
    }
    d[i] = sum;
  }
}

inline void mma_m16n8k16_f16f16f32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                   uint32_t b1) {
  const auto as = emulation::exchange(emulation::kMmaHalf, a[0], a[1], a[2], a[3]);
  uint64_t all_a[32][4];
  std::memcpy(all_a, as, sizeof all_a);
  const auto bs = emulation::exchange(emulation::kMmaHalfB, b0, b1);
  const int g = emulation::lane() / 4, t = emulation::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), col = 2 * t + i % 2;
    double sum = d[i];
    for (int k = 0; k < 16; ++k) {
      const int quad = k % 8 / 2, high = k / 8;
      sum += static_cast<double>(
                 detail::half_of(all_a[4 * (row % 8) + quad][row / 8 + 2 * high], k % 2)) *
             detail::half_of(bs[4 * col + quad][high], k % 2);
    }
    d[i] = static_cast<float>(sum);
  }
}

}  // namespace tq4::ptx
