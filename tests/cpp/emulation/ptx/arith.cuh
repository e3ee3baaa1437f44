// CPU versions of csrc/ptx/arith.cuh.
#pragma once
#include "../cuda_cpu.h"

namespace tq4::ptx {

inline uint32_t thread_idx_volatile() { return threadIdx.x; }
inline uint32_t opaque(uint32_t x) { return x; }

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.f : y;
}
inline float rcp_approx(float x) { return 1.f / x; }
inline float max_nan(float a, float b) { return a != a ? a : b != b ? b : std::fmax(a, b); }
inline float tanh_accurate(float x) {
  const float e = exp2_approx(x * 2.885390081777927f);
  return 1.f - 2.f * rcp_approx(e + 1.f);
}

inline uint32_t pack_f16x2(float lo, float hi) {
  return emulation::float_to_half(lo) | static_cast<uint32_t>(emulation::float_to_half(hi)) << 16;
}
inline uint32_t pack_bf16x2(float lo, float hi) {
  return emulation::float_to_bfloat(lo) | static_cast<uint32_t>(emulation::float_to_bfloat(hi))
                                              << 16;
}
inline uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  const auto half = [](uint32_t x, int i) {
    return emulation::half_to_float(static_cast<uint16_t>(x >> (16 * i)));
  };
  return pack_f16x2(half(a, 0) * half(b, 0), half(a, 1) * half(b, 1));
}

inline uint32_t prmt(uint32_t lo, uint32_t hi, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(hi) << 32 | lo;
  uint32_t y = 0;
  for (int i = 0; i < 4; ++i) {
    const int nibble = selector >> (4 * i) & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (nibble & 7))) & 0xff;
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;  // sign replication
    y |= byte << (8 * i);
  }
  return y;
}

inline uint32_t dot_u8x4(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 4; ++i) c += (a >> (8 * i) & 255) * (b >> (8 * i) & 255);
  return c;
}

inline uint32_t bit_select(uint32_t mask, uint32_t a, uint32_t b) {
  return (a & mask) | (b & ~mask);
}

}  // namespace tq4::ptx
