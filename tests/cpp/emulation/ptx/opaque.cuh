// CPU version of csrc/ptx/opaque.cuh.
#pragma once

namespace tq4::ptx {

template <typename T>
T* opaque(T* p) {
  return p;
}

}  // namespace tq4::ptx
