// The dynamic shared memory of a kernel.
#pragma once
#include <cstdint>

namespace tq4::ptx {

__device__ __forceinline__ uint8_t* dynamic_shared() {
  extern __shared__ __align__(1024) uint8_t dynamic_shared_bytes[];
  return dynamic_shared_bytes;
}

}  // namespace tq4::ptx
