// First touches of kernel parameters.  They lie in constant memory, and the first touch of each of
// its lines in a launch takes as long as a load from L2 or worse: a warp that needs a dozen of them
// one after the other waits for microseconds.  So, where a kernel is short, each warp touches a
// line of each struct before anything else, all at once.
#pragma once
#include <cstdint>

#include "common.cuh"

namespace tq4 {

struct ParameterLines {
  uint32_t words[2];

  template <typename First, typename Second>
  __device__ __forceinline__ static ParameterLines touch(const First& first, const Second& second) {
    return {{word(first), word(second)}};
  }

  // Late: to have been of use, or the compiler would drop them.
  template <int kWarps>
  __device__ __forceinline__ void keep(ParameterLines (&in_shared_memory)[kWarps]) const {
    in_shared_memory[threadIdx.x / kWarpSize] = *this;
  }

 private:
  template <typename Params>
  __device__ __forceinline__ static uint32_t word(const Params& params) {
    constexpr int kLine = 64 / 4, kLast = sizeof(Params) / 4 - 1;  // in words
    const int word = min(static_cast<int>(threadIdx.x / kWarpSize) * kLine, kLast);
    return reinterpret_cast<const uint32_t*>(&params)[word];
  }
};

}  // namespace tq4
