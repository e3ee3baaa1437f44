// Facts about a paged cache that the kernels' loaders need.
#pragma once
#include <cstdint>

#include "../params.h"
#include "common.cuh"

namespace tq4 {

// Widest copy (16, 8 or 4 bytes) to which every token's codes are aligned.  Token-major rows of one
// KV head are 136 bytes: 8.
TQ4_HOST_DEVICE int copy_width(const PageView& view) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(view.base) |
                        static_cast<uint64_t>(view.block_stride) |
                        static_cast<uint64_t>(view.code_token_stride) |
                        static_cast<uint64_t>(view.code_head_stride) |
                        static_cast<uint64_t>(view.k_codes) | static_cast<uint64_t>(view.v_codes);
  return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : 4;
}

// log2(block_size), or -1 when it is not a power of two.
inline int block_shift(const PageView& view) {
  for (int shift = 0; shift < 31; ++shift) {
    if (view.block_size == 1 << shift) return shift;
  }
  return -1;
}

}  // namespace tq4
