// Host side of every kernel launch: errors become exceptions, shared memory above 48 KB is opted
// into, and the few device properties a launcher needs are read once.
//
// Nothing here synchronises or allocates, so all of it is legal during CUDA-graph capture.
#pragma once
#include <cuda_runtime_api.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "../params.h"

namespace tq4 {

// Throws std::runtime_error naming `what` unless `status` is success.
inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  // A failed runtime call also sets the thread's last error; clear it so that it does not surface
  // again in somebody else's next check.  A sticky error (a crashed kernel) survives this.
  (void)cudaGetLastError();
  std::string message = std::string(what) + ": " + cudaGetErrorString(status);
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction) {
    message +=
        " (this build of tq4 has no code for the current GPU: rebuild with its compute capability "
        "in TORCH_CUDA_ARCH_LIST)";
  }
  throw std::runtime_error(message);
}

struct DeviceProperties {
  int num_sms;
  int arch;            // major * 10 + minor
  int max_smem_bytes;  // per CTA, after opt-in
};

inline int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// Attribute queries, not cudaGetDeviceProperties: that one takes milliseconds.
inline DeviceProperties query_device_properties(int device) {
  const auto attribute = [device](cudaDeviceAttr name) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
    return value;
  };
  return {attribute(cudaDevAttrMultiProcessorCount),
          attribute(cudaDevAttrComputeCapabilityMajor) * 10 +
              attribute(cudaDevAttrComputeCapabilityMinor),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

// Properties of the current device, cached.  Threads that race write the same values; the count
// is written last and marks the entry as complete.
inline DeviceProperties device_properties() {
  constexpr int kCachedDevices = 64;
  struct Entry {
    std::atomic<int> num_sms{0}, arch{0}, max_smem_bytes{0};
  };
  static Entry cache[kCachedDevices];
  const int device = current_device();
  if (device >= kCachedDevices) return query_device_properties(device);
  Entry& entry = cache[device];
  const int num_sms = entry.num_sms.load(std::memory_order_acquire);
  if (num_sms > 0) {
    return {num_sms, entry.arch.load(std::memory_order_relaxed),
            entry.max_smem_bytes.load(std::memory_order_relaxed)};
  }
  const DeviceProperties queried = query_device_properties(device);
  entry.arch.store(queried.arch, std::memory_order_relaxed);
  entry.max_smem_bytes.store(queried.max_smem_bytes, std::memory_order_relaxed);
  entry.num_sms.store(queried.num_sms, std::memory_order_release);
  return queried;
}

// Enqueues kernel<<<grid, block, smem_bytes, stream>>>(args...).  An empty grid is no work, not an
// error.  Clusters and programmatic launches need `attributes`.
template <typename... KernelArgs, typename... Args>
void launch_kernel_with(const cudaLaunchAttribute* attributes, unsigned num_attributes,
                        void (*kernel)(KernelArgs...), dim3 grid, dim3 block, size_t smem_bytes,
                        Stream stream, const Args&... args) {
  static_assert(sizeof...(KernelArgs) == sizeof...(Args), "one argument per kernel parameter");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  // The default is 48 KB, static shared memory included.
  constexpr size_t kDefaultSmemBytes = 32 * 1024;
  if (smem_bytes > kDefaultSmemBytes) {
    // Per device and function; cheap enough (a driver-side table) to repeat at every launch, which
    // is simpler than remembering for which devices it was done.
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(smem_bytes)),
               "opting into shared memory");
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = const_cast<cudaLaunchAttribute*>(attributes);
  config.numAttrs = num_attributes;
  const auto launch = [&](KernelArgs... values) {  // converts each argument to its parameter type
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&values))...};
    return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers);
  };
  check_cuda(launch(args...), "kernel launch");
}

template <typename... KernelArgs, typename... Args>
void launch_kernel(void (*kernel)(KernelArgs...), dim3 grid, dim3 block, size_t smem_bytes,
                   Stream stream, const Args&... args) {
  launch_kernel_with(nullptr, 0, kernel, grid, block, smem_bytes, stream, args...);
}

// Whether this build's code of a kernel waits for its predecessors, as overlapped launches need:
// code made from PTX older than sm_90 runs on newer devices, but without those instructions.
template <typename... KernelArgs>
bool waits_for_predecessors(void (*kernel)(KernelArgs...), int arch) {
  if (arch < 90) return false;
  static std::atomic<int> known{0};  // 2 * arch + answer of the last device asked about
  int answer = known.load(std::memory_order_relaxed);
  if (answer / 2 != arch) {
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)),
               "cudaFuncGetAttributes");
    answer = 2 * arch + (attributes.ptxVersion >= 90 ? 1 : 0);
    known.store(answer, std::memory_order_relaxed);
  }
  return answer % 2 == 1;
}

// Launches a kernel that, if `overlapped`, may start before its predecessor on the stream has ended
// (it says itself where it waits).
template <typename... KernelArgs, typename... Args>
void launch_dependent_kernel(bool overlapped, void (*kernel)(KernelArgs...), dim3 grid, dim3 block,
                             size_t smem_bytes, Stream stream, const Args&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  launch_kernel_with(&attribute, overlapped ? 1 : 0, kernel, grid, block, smem_bytes, stream,
                     args...);
}

}  // namespace tq4
