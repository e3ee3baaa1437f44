// Shared-memory maps of the unpacked K and V tiles.  Host-compilable; tests/cpp and
// tests/test_host_maps.py check that each map is a bijection and free of bank conflicts.
//
// A 16-byte access runs in quarter-warps of 8 lanes, conflict-free when the 8 chunks differ
// modulo 8 (8 chunks = 128 bytes = all banks).
#pragma once
#include "common.cuh"

namespace tq4 {

// fp16 tile [rows][D] in 16-byte chunks (8 dims), for V and for the rotation matrix.
//   ldmatrix reads one chunk column of 8 consecutive rows -> the key must differ over 8 rows;
//   unpacking writes, per quarter-warp, rows 2i and 2i+1 at chunks {4c..4c+3} -> rows that differ
//   in bit 0 must differ by 4 in the key.  Hence bit 0 of the row goes to bit 2 of the key.
template <int D>
struct HalfTile {
  static constexpr int kChunks = D / 8;
  static constexpr int kRowBytes = D == 96 ? 256 : 2 * D;  // XOR needs a power of two of chunks

  TQ4_HOST_DEVICE static constexpr int key(int row) { return ((row & 1) << 2) | ((row >> 1) & 3); }
  TQ4_HOST_DEVICE static constexpr int offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ key(row)) << 4);
  }
};

// K tile in B-fragment order: lane (g, t) of a quarter-warp reads row g, quarter t of the head
// dimension, 16 bytes at a time.  Quarters are padded to a power of two of chunks (D = 96).
template <int D, int kElementBytes>
struct KeyTile {
  static constexpr int kUsedBytes = D / 4 * kElementBytes;
  static constexpr int kQuarterBytes = kUsedBytes <= 16   ? 16
                                       : kUsedBytes <= 32 ? 32
                                       : kUsedBytes <= 64 ? 64
                                                          : 128;
  static constexpr int kChunks = kQuarterBytes / 16;
  static constexpr int kRowBytes = 4 * kQuarterBytes;

  // The 8 lanes of an access are 2 neighbouring rows x 4 quarters at one chunk: what the row
  // pitch and the quarter pitch leave equal modulo 128 bytes, the twist tells apart.
  TQ4_HOST_DEVICE static constexpr int twist(int row, int quarter) {
    return kChunks == 1   ? 0
           : kChunks == 2 ? (row & 1)
           : kChunks == 4 ? ((quarter >> 1) | ((row & 1) << 1))
                          : (quarter | ((row & 1) << 2));
  }
  TQ4_HOST_DEVICE static constexpr int offset(int row, int quarter, int chunk) {
    return row * kRowBytes + quarter * kQuarterBytes + ((chunk ^ twist(row, quarter)) << 4);
  }
};

}  // namespace tq4
