// Copies of boxes of an array by the sm_90 copy engine (PTX ISA, "cp.async.bulk.tensor").
#pragma once
#include <cstdint>

#include "../device/tensor_map.h"

namespace tq4::ptx {

// The first copy needs the map: fetches it ahead.
__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}

// The map's box from element (x, y, z, w) on, x being the innermost dimension, to shared memory,
// 128-byte aligned; counted off the barrier.  What lies outside of the array becomes 0.  Of bytes
// that nobody reads again; `policy` is read_once_policy().
__device__ __forceinline__ void tensor_copy_once_to_shared(uint32_t dst, const TensorMap& map,
                                                           int x, int y, int z, int w,
                                                           uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(dst),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier),
      "l"(policy)
      : "memory");
}

}  // namespace tq4::ptx
