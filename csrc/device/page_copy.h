// Facts about a paged cache that the kernels' loaders need.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../params.h"
#include "common.cuh"

namespace tq4 {

// Widest copy (16, 8 or 4 bytes) to which every token's codes are aligned.  Token-major rows of one
// KV head are 136 bytes: 8.
TQ4_HOST_DEVICE int copy_width(const PageView& view) {
  const uint64_t bits =
      reinterpret_cast<uintptr_t>(view.base) | static_cast<uint64_t>(view.block_stride) |
      static_cast<uint64_t>(view.code_token_stride) | static_cast<uint64_t>(view.code_head_stride) |
      static_cast<uint64_t>(view.k_codes) | static_cast<uint64_t>(view.v_codes);
  return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : 4;
}

// Whether a token's row of all heads lies together; else a head's tokens do.
TQ4_HOST_DEVICE bool is_token_major(const PageView& view) {
  return view.code_token_stride == view.norm_token_stride;
}

// Whether the copy engine can take the codes and norms of one head and 16 tokens: as boxes of rows
// from token-major pages, as contiguous runs from head-major ones.  Both begin at multiples of 16
// bytes (a box elsewhere is an illegal instruction): token-major pages have a multiple of 4 heads.
inline bool takes_bulk_fields(const PageView& view) {
  uint64_t bits = reinterpret_cast<uintptr_t>(view.base) | static_cast<uint64_t>(view.block_stride);
  if (is_token_major(view)) {
    bits |= static_cast<uint64_t>(view.code_token_stride);
  } else {
    bits |= static_cast<uint64_t>(view.code_head_stride | view.norm_head_stride);
  }
  bits |= static_cast<uint64_t>(view.k_codes | view.v_codes | view.k_norms | view.v_norms);
  return view.num_blocks > 0 && bits % 16 == 0;
}

// log2(block_size), or -1 when it is not a power of two.
inline int block_shift(const PageView& view) {
  for (int shift = 0; shift < 31; ++shift) {
    if (view.block_size == 1 << shift) return shift;
  }
  return -1;
}

}  // namespace tq4
