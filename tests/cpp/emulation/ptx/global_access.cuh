// CPU versions of csrc/ptx/global_access.cuh.
#pragma once
#include "../cuda_cpu.h"

namespace tq4::ptx {

namespace detail {
template <typename T>
T* global_pointer(int64_t address) {
  if (address % static_cast<int64_t>(sizeof(T)) != 0) emulation::fail("misaligned global access");
  return reinterpret_cast<T*>(address);
}
}  // namespace detail

inline void ld_global_if(int64_t& value, const int64_t* p, bool condition) {
  if (condition) value = *detail::global_pointer<const int64_t>(reinterpret_cast<int64_t>(p));
}

template <int kCount>
void st_global(int64_t address, const uint32_t (&words)[kCount]) {
  struct alignas(4 * kCount) Vector {
    uint32_t words[kCount];
  };
  std::memcpy(detail::global_pointer<Vector>(address), words, sizeof words);
}

inline int32_t ld_global_relaxed(const int32_t* p) { return *p; }

inline void st_global(int64_t address, float value) {
  *detail::global_pointer<float>(address) = value;
}

}  // namespace tq4::ptx
