// CPU version of csrc/ptx/opaque.cuh.
#pragma once
#include <cstdint>

namespace tq4::ptx {

template <typename T>
T* opaque(T* p) {
  return p;
}

inline int64_t opaque_offset(int64_t offset) { return offset; }

}  // namespace tq4::ptx
