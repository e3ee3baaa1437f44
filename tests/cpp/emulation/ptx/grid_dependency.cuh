// CPU versions of csrc/ptx/grid_dependency.cuh: kernels run one after the other.
#pragma once

namespace tq4::ptx {

inline void allow_dependent_launch() {}
inline void wait_for_predecessor() {}

}  // namespace tq4::ptx
