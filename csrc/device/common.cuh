// Small things every kernel uses.  Compiles for the host too (tests/cpp), so nothing here may
// touch a device-only intrinsic outside __CUDA_ARCH__.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define TQ4_HOST_DEVICE __host__ __device__ __forceinline__
#define TQ4_DEVICE __device__ __forceinline__
#else
#define TQ4_HOST_DEVICE inline
#define TQ4_DEVICE inline
#endif

namespace tq4 {

inline constexpr int kWarpSize = 32;
inline constexpr uint32_t kFullWarp = 0xffffffffu;

template <typename T>
TQ4_HOST_DEVICE constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

template <typename T>
TQ4_HOST_DEVICE constexpr T round_up(T a, T multiple) {
  return ceil_div(a, multiple) * multiple;
}

TQ4_HOST_DEVICE constexpr bool is_power_of_two(int n) { return n > 0 && (n & (n - 1)) == 0; }

// n / d for n >= 0, d > 0: a 64-bit division takes five times as long, and is hardly ever needed.
TQ4_HOST_DEVICE int64_t divide(int64_t n, int64_t d) {
  if ((n | d) >> 32 == 0) return static_cast<uint32_t>(n) / static_cast<uint32_t>(d);
  return n / d;
}

// Shift that brings dimension i (0..7, little-endian word of 4 code bytes) to bit 0: the EVEN
// dimension of a byte is its HIGH nibble.
TQ4_HOST_DEVICE constexpr int nibble_shift(int i) { return (i / 2) * 8 + (i % 2 == 0 ? 4 : 0); }

// Index of dimension i of the 8 in a word of codes.
TQ4_HOST_DEVICE constexpr uint32_t nibble(uint32_t word, int i) {
  return word >> nibble_shift(i) & 15u;
}

// Exact division of any 32-bit number by a divisor known at launch, in five instructions
// (Granlund and Montgomery, "Division by invariant integers using multiplication", figure 4.1).
struct Divider {
  uint32_t divisor, magic;
  int32_t shift1, shift2;

  TQ4_HOST_DEVICE static constexpr Divider make(uint32_t d) {
    int bits = 0;
    while (bits < 32 && (uint64_t{1} << bits) < d) ++bits;
    const uint64_t magic = ((uint64_t{1} << 32) * ((uint64_t{1} << bits) - d)) / d + 1;
    return {d, static_cast<uint32_t>(magic), bits > 1 ? 1 : bits, bits > 1 ? bits - 1 : 0};
  }

  TQ4_HOST_DEVICE uint32_t quotient(uint32_t n) const {
#ifdef __CUDA_ARCH__
    const uint32_t high = __umulhi(n, magic);
#else
    const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(n) * magic >> 32);
#endif
    return (high + ((n - high) >> shift1)) >> shift2;
  }
};

}  // namespace tq4
