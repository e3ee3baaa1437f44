// Registers that the compiler must neither compute anew nor move.
#pragma once
#include "common.cuh"

namespace tq4 {

// The value, by a way the compiler cannot see through.  What is cheap to compute from constants it
// would otherwise compute anew for every tile, and fragments loaded in pairs it would copy into
// place for every MMA.  Whole warps only.
template <typename T>
__device__ __forceinline__ T pinned(T x) {
  return __shfl_sync(kFullWarp, x, threadIdx.x % kWarpSize);
}

}  // namespace tq4
