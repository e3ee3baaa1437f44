// What the copy engine knows about an array in global memory (PTX ISA, "Tensor-map"): as large and
// as aligned as the driver's CUtensorMap, made by the host and passed as a kernel parameter.
#pragma once
#include <cstdint>

namespace tq4 {

struct alignas(64) TensorMap {
  uint64_t words[16];
};

// Token-major pages as arrays [num_blocks, block_size, row], in boxes of 16 rows: one map for codes
// and one for norms, whose boxes have rows of other lengths.  A box begins at a multiple of 16
// bytes of its row; the copy engine counts in elements, of which a box's row has up to 256.
struct PageMaps {
  TensorMap codes, norms;
};
constexpr int kMapElementBytes = 8;

}  // namespace tq4
