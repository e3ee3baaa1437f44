// What the sm_90a prefill kernel multiplies, as it lies in shared memory: made once in the
// workspace, copied in bulk from there.  Host-compilable.
//
//   K      [tokens][dims] int8, K-major: panels of 128 dims, rows of 128 bytes (D = 64: 64 bytes)
//   V      [tokens][dims] fp16, MN-major: panels of 64 dims, rows of 128 bytes
//   norms  fp32 [tokens]
//
// Rows of 128 bytes take the 128-byte swizzle: 16-byte chunk c of row r lies at c ^ (r % 8); rows
// of 64 bytes the 64-byte one: c ^ (r / 2 % 4) (PTX ISA, "Asynchronous warpgroup level matrix
// shared memory layout").  Of D = 96 the last panels are not used to the end.
//
// Queries take the form of K, with kRows rows and a scale a row; the matrix that rotates the output
// the form of V, one row a rotated dim.
#pragma once
#include <cstdint>

#include "common.cuh"
#include "tile_workspace.h"

namespace tq4 {

// One K-major int8 operand of `kRows` rows.
template <int D, int kRows>
struct KeyMajorImage {
  static constexpr int kRowBytes = D == 64 ? 64 : 128;
  static constexpr int kPanels = D <= 128 ? 1 : D / 128;
  static constexpr int kPanelBytes = kRows * kRowBytes;
  static constexpr int kBytes = kPanels * kPanelBytes;

  // Of the 16-byte chunk with dims 16 chunk .. + 15.
  TQ4_HOST_DEVICE static constexpr int offset(int row, int chunk) {
    return D == 64 ? row * 64 + ((chunk ^ (row / 2 % 4)) << 4)
                   : chunk / 8 * kPanelBytes + row * 128 + ((chunk % 8 ^ row % 8) << 4);
  }
};

// One MN-major fp16 operand of `kRows` rows.
template <int D, int kRows>
struct ValueMajorImage {
  static constexpr int kPanels = (D + 63) / 64;
  static constexpr int kPanelBytes = kRows * 128;
  static constexpr int kBytes = kPanels * kPanelBytes;

  // Of the 16-byte chunk with dims 8 chunk .. + 7.
  TQ4_HOST_DEVICE static constexpr int offset(int row, int chunk) {
    return chunk / 8 * kPanelBytes + row * 128 + ((chunk % 8 ^ row % 8) << 4);
  }
};

// Consumer warpgroups of the attention kernel, 64 rows each, and tokens of a tile: what the
// registers allow.
constexpr int wgmma_consumers(int head_dim) { return head_dim == 256 ? 2 : 3; }
constexpr int kWgmmaTileTokens = 64;

template <int D>
struct WgmmaImage : TileImage<D, kWgmmaTileTokens> {
  static constexpr int kExpandThreads = 128;
  static constexpr int kTileTokens = kWgmmaTileTokens;
  using Key = KeyMajorImage<D, kTileTokens>;
  using Value = ValueMajorImage<D, kTileTokens>;
  static constexpr int kValues = Key::kBytes;
  static constexpr int kNorms = kValues + Value::kBytes;
  static constexpr int kNormBytes = 4 * kTileTokens;
  static constexpr int kBytes = kNorms + kNormBytes;

  TQ4_HOST_DEVICE static constexpr int key_offset(int token, int chunk) {
    return Key::offset(token, chunk);
  }
  TQ4_HOST_DEVICE static constexpr int value_offset(int token, int chunk) {
    return kValues + Value::offset(token, chunk);
  }
  TQ4_HOST_DEVICE static void write_scale(uint8_t* image, int token, float k_norm) {
    *reinterpret_cast<float*>(image + kNorms + 4 * token) = k_norm;
  }

  // The matrix of the output rotation: row = rotated dim, in tiles like those of V.
  static constexpr int kRotationTiles = (D + kTileTokens - 1) / kTileTokens;
  TQ4_HOST_DEVICE static constexpr int rotation_offset(int row, int chunk) {
    return row / kTileTokens * Value::kBytes + Value::offset(row % kTileTokens, chunk);
  }
};

// Rotated, quantised queries of one CTA.
template <int D>
struct QueryImage {
  static constexpr int kRows = 64 * wgmma_consumers(D);
  using Codes = KeyMajorImage<D, kRows>;
  static constexpr int kScales = Codes::kBytes;
  static constexpr int kBytes = kScales + 4 * kRows;
};

}  // namespace tq4
