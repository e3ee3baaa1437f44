// Programmatic dependent launch (PTX ISA, "griddepcontrol"): a kernel launched with that attribute
// may start before its predecessor in the stream has ended.  No-ops before sm_90, and where the
// launch does not carry the attribute.
#pragma once

namespace tq4::ptx {

// The next kernel may be scheduled once every CTA has said this or exited.
__device__ __forceinline__ void allow_dependent_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the predecessor has ended and what it wrote is visible.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace tq4::ptx
