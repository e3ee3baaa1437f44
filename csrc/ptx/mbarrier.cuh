// Barriers in shared memory that count arrivals and, on sm_90, bytes (PTX ISA, "mbarrier").
//
// A phase ends when the expected number of threads have arrived and no expected bytes are
// outstanding; waiting names the parity (0, 1, 0, ...) of the phase that is to be over.  A fresh
// barrier is in phase 0, so a wait for parity 1 passes at once: that is how an empty ring starts.
#pragma once
#include <cstdint>

namespace tq4::ptx {

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After the inits, by the thread that did them: makes them visible to the copy engine, which a
// thread barrier alone does not order.
__device__ __forceinline__ void mbarrier_fence_init() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Release: this thread's earlier accesses to shared memory come before the end of the phase.
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile(
      "{\n"
      ".reg .b64 state;\n"
      "mbarrier.arrive.shared.b64 state, [%0];\n"
      "}" ::"r"(barrier)
      : "memory");
}

// Arrival of the calling thread's cp.async copies issued so far, once they have all landed; counts
// as one of the expected arrivals.
__device__ __forceinline__ void mbarrier_arrive_on_cp_async(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// Acquire: what came before the end of the phase is visible after this.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  // try_wait suspends the warp for a while instead of taking issue slots.
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#else
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "nanosleep.u32 20;\n"
      "bra WAIT;\n"
      "DONE:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}

// Barrier `id` (1..15) of `threads` threads of the CTA, a multiple of 32; 0 is __syncthreads.
__device__ __forceinline__ void named_barrier_sync(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Counts towards the same barrier without waiting.
__device__ __forceinline__ void named_barrier_arrive(uint32_t id, uint32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace tq4::ptx
