// Host-side checks of the dense arrays [tokens, heads, D] that store and gather read and write.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../params.h"

namespace tq4 {

inline int element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// The address and both strides (bytes) are multiples of `bytes`.
inline bool is_aligned(const void* p, int64_t stride0, int64_t stride1, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0 && stride0 % bytes == 0 &&
         stride1 % bytes == 0;
}

// Widest access (16, 8 or 4 bytes) to packed rows that follow each other without gaps.
inline int packed_width(const void* p, int64_t row_bytes) {
  return is_aligned(p, row_bytes, 0, 16) ? 16 : is_aligned(p, row_bytes, 0, 8) ? 8 : 4;
}

inline void check_alignment(const void* p, int64_t bytes, const char* name) {
  if (!is_aligned(p, 0, 0, bytes)) {
    throw std::invalid_argument(std::string(name) + ": expected memory aligned to " +
                                std::to_string(bytes) + " bytes");
  }
}

inline void check_block_size(int32_t block_size) {
  if (block_size < 1) {
    throw std::invalid_argument("cache: expected a positive block_size, got " +
                                std::to_string(block_size));
  }
}

// tokens * heads.  The margin keeps row numbers of the tiles past the end within 32 bits.
inline int32_t count_rows(const char* name, int64_t tokens, int64_t heads) {
  constexpr int64_t kMaxRows = (int64_t{1} << 31) - (int64_t{1} << 20);
  if (tokens < 0 || heads < 1 || tokens * heads > kMaxRows) {
    throw std::invalid_argument(std::string(name) + ": expected at most 2^31 - 2^20 rows, got " +
                                std::to_string(tokens) + " tokens of " + std::to_string(heads) +
                                " heads");
  }
  return static_cast<int32_t>(tokens * heads);
}

}  // namespace tq4
