// What the copy engine knows about an array in global memory (PTX ISA, "Tensor-map"): as large and
// as aligned as the driver's CUtensorMap, made by the host and passed as a kernel parameter.
#pragma once
#include <cstdint>

namespace tq4 {

struct alignas(64) TensorMap {
  uint64_t words[16];
};

// The codes and the norms of token-major pages as arrays [num_blocks, K or V, block_size, bytes of
// all heads], in boxes of 2 x 16 rows.  A box begins at a multiple of 16 bytes of its row; the copy
// engine counts in elements, of which a box's row has up to 256.
struct PageMaps {
  TensorMap codes, norms;
};
constexpr int kMapElementBytes = 8;

}  // namespace tq4
