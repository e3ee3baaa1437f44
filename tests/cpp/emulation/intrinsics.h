// The intrinsics and types that the store and gather kernels use beyond cuda_cpu.h.
#pragma once
#include "cuda_cpu.h"
#include "cuda_fp16.h"

namespace emulation {

struct BlockDim {
  unsigned x;
};

// Kinds of collectives beyond those of cuda_cpu.h.
enum MoreKinds { kShuffleWidth = 100, kReduceMax, kLdmatrix, kMmaBfloat, kMmaBfloatB, kReduceOr };

}  // namespace emulation

#define blockDim (::emulation::BlockDim{static_cast<unsigned>(::emulation::machine().columns)})

struct __half {
  uint16_t x;
};
struct __nv_bfloat16 {
  uint16_t x;
};
inline __half __float2half_rn(float x) { return {emulation::float_to_half(x)}; }
inline float __half2float(__half h) { return emulation::half_to_float(h.x); }
inline uint16_t __half_as_ushort(__half h) { return h.x; }

template <typename T>
T __shfl_sync(uint32_t, T value, int source, int width) {
  const int lane = emulation::lane();
  return emulation::from_bits<T>(
      emulation::exchange(emulation::kShuffleWidth,
                          emulation::to_bits(value))[lane / width * width + source % width][0]);
}

inline uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
  const auto all = emulation::exchange(emulation::kReduceMax, value);
  uint64_t result = 0;
  for (int i = 0; i < 32; ++i) result = std::max(result, all[i][0]);
  return static_cast<uint32_t>(result);
}

inline uint32_t __reduce_or_sync(uint32_t, uint32_t value) {
  const auto all = emulation::exchange(emulation::kReduceOr, value);
  uint64_t result = 0;
  for (int i = 0; i < 32; ++i) result |= all[i][0];
  return static_cast<uint32_t>(result);
}

inline int __syncthreads_or(int value) {
  static int any;
  __syncthreads();
  if (threadIdx.x == 0) any = 0;
  __syncthreads();
  any |= value;
  __syncthreads();
  const int result = any != 0;
  __syncthreads();
  return result;
}

inline int32_t atomicAdd(int32_t* p, int32_t value) {
  const int32_t old = *p;
  *p += value;
  return old;
}

inline uint32_t atomicMax(uint32_t* p, uint32_t value) {
  const uint32_t old = *p;
  *p = std::max(old, value);
  return old;
}

template <typename T>
T __ldg(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) emulation::fail("misaligned global read");
  return *p;
}

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __float_as_int(float x) { return static_cast<int>(emulation::to_bits(x)); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
