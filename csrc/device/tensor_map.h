// What the copy engine knows about an array in global memory (PTX ISA, "Tensor-map"): as large and
// as aligned as the driver's CUtensorMap, made by the host and passed as a kernel parameter.
#pragma once
#include <cstdint>

namespace tq4 {

struct alignas(64) TensorMap {
  uint64_t words[16];
};

}  // namespace tq4
