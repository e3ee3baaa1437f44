// What a warp has in common.
#pragma once
#include "common.cuh"

namespace tq4 {

// A value that all lanes hold alike, told to the compiler: branches on it need no divergent copies
// of the shuffles behind them, and operands that an instruction takes from uniform registers no
// loop to get there.
__device__ __forceinline__ int warp_uniform(int value) { return __shfl_sync(kFullWarp, value, 0); }

// The warp's number in its CTA.
__device__ __forceinline__ int warp_index() {
  return warp_uniform(static_cast<int>(threadIdx.x) / kWarpSize);
}

}  // namespace tq4
