// CPU version of csrc/ptx/prefetch.cuh.
#pragma once

namespace tq4::ptx {

inline void prefetch_l2(const void*) {}

}  // namespace tq4::ptx
