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

// Shift that brings dimension i (0..7, little-endian word of 4 code bytes) to bit 0: the EVEN
// dimension of a byte is its HIGH nibble.
TQ4_HOST_DEVICE constexpr int nibble_shift(int i) { return (i / 2) * 8 + (i % 2 == 0 ? 4 : 0); }

// Index of dimension i of the 8 in a word of codes.
TQ4_HOST_DEVICE constexpr uint32_t nibble(uint32_t word, int i) {
  return word >> nibble_shift(i) & 15u;
}

// Exact division of 0 <= n < 2^40 by a divisor 1 <= d < 2^24 known at launch, as one high product.
//
// With m = ceil(2^64 / d) and e = m d - 2^64 (0 <= e < d):  n m / 2^64 = n / d + n e / (d 2^64),
// and the second term is below 1 / d, so below the distance to the next integer, when n e < 2^64.
// d = 1 would need m = 2^64: it is stored as m = 0 and means "the quotient is n".
struct Divider {
  uint64_t magic;
  uint32_t divisor;

  static constexpr Divider make(uint32_t d) {
    return {d == 1 ? 0 : UINT64_MAX / d + 1, d};
  }

  TQ4_HOST_DEVICE uint64_t quotient(uint64_t n) const {
#ifdef __CUDA_ARCH__
    const uint64_t q = __umul64hi(n, magic);
#else
    const uint64_t q = static_cast<uint64_t>(static_cast<unsigned __int128>(n) * magic >> 64);
#endif
    return magic == 0 ? n : q;
  }
};

}  // namespace tq4
