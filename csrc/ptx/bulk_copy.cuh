// Bulk asynchronous copies of the sm_90 copy engine (PTX ISA, "cp.async.bulk").
#pragma once
#include <cstdint>

namespace tq4::ptx {

// Arrives at the barrier and lets its phase end only after `bytes` more bytes have landed.
__device__ __forceinline__ void mbarrier_arrive_expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile(
      "{\n"
      ".reg .b64 state;\n"
      "mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;\n"
      "}" ::"r"(barrier),
      "r"(bytes)
      : "memory");
}

// `bytes` contiguous bytes, global -> shared; addresses and size are multiples of 16.  The landed
// bytes are counted off the barrier.
__device__ __forceinline__ void bulk_copy_to_shared(uint32_t dst, const void* src, uint32_t bytes,
                                                    uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(dst),
      "l"(src), "r"(bytes), "r"(barrier)
      : "memory");
}

// The same of bytes that nobody reads again; `policy` is read_once_policy().
__device__ __forceinline__ void bulk_copy_once_to_shared(uint32_t dst, const void* src,
                                                         uint32_t bytes, uint32_t barrier,
                                                         uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1], %2, [%3], %4;" ::"r"(dst),
      "l"(src), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

}  // namespace tq4::ptx
