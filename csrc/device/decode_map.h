// Index maps of the decode kernels: which dimension, token and byte each lane holds, and how a tile
// of 16 tokens is copied from a page into a stage of shared memory.  Host-compilable.
//
// Lane = 4 g + t throughout (g = 0..7, t = 0..3), as in ptx/mma.cuh.
#pragma once
#include <cstdint>

#include "common.cuh"

namespace tq4 {

// Which bytes of a token's codes a lane reads, and the dimensions behind them.  Both products leave
// the order of the head dimension open, so each lane takes what one wide load gives it.
template <int D>
struct DecodeMap {
  static_assert(D == 64 || D == 96 || D == 128 || D == 256, "supported head dimensions");
  static constexpr int kCodeBytes = D / 2;

  // K, B fragment of S = Q K^T: column g is a token, whose codes are shared by the four lanes t.
  // Word j (8 codes) of a lane is k-step j of m16n8k32.
  static constexpr int kKeyWords = D / 32;
  // Byte offset of word j; words of one vector load are neighbours.
  TQ4_HOST_DEVICE static constexpr int key_byte(int t, int j) {
    if (D == 64) return 8 * t + 4 * j;
    if (D == 96) return j < 2 ? 8 * t + 4 * j : 32 + 4 * t;
    return j / 4 * 64 + 16 * t + j % 4 * 4;
  }
  // First of the word's 8 dimensions.
  TQ4_HOST_DEVICE static constexpr int key_dim(int t, int j) { return 2 * key_byte(t, j); }

  // V, A fragment of O^T = V^T P^T: rows g and g + 8 of m-tile m are the even and the odd dimension
  // of one code byte, byte m of the lane's D / 16.
  static constexpr int kValueTiles = D / 16;
  static constexpr int kValueWords = (D / 16 + 3) / 4;
  TQ4_HOST_DEVICE static constexpr int value_byte(int g, int m) {
    if (D == 64) return 4 * g + m;
    if (D == 96) return m < 4 ? 4 * g + m : 32 + 2 * g + (m - 4);
    return m / 8 * 64 + 8 * g + m % 8;
  }
  // Even dimension of the byte; the odd one follows.  Bytes m, m + 1 (m even) are neighbours.
  TQ4_HOST_DEVICE static constexpr int value_dim(int g, int m) { return 2 * value_byte(g, m); }

  // Alignment of the vector loads of K and of V; without it words are read one by one.
  static constexpr int kKeyAlign = D >= 128 ? 16 : 8;
  static constexpr int kValueAlign = D >= 128 ? 8 : 4;
};

// Byte of the nibble-swapped q row that multiplies code i (0..7) of a word: unpack_int8 delivers
// each pair of dimensions swapped, so q8 is stored that way.
TQ4_HOST_DEVICE constexpr int swapped_dim(int dim) { return dim ^ 1; }

// Which token of the tile is column n (0..7) of n-tile i (0, 1) of S, and so, since the C fragment
// of S is the B fragment of P^T, token k = 8 i + n of the second product.  The order is free: it is
// chosen for the banks that a stage's token stride leads to.  16 nibbles, entry 8 i + n; the tokens
// of n-tile 1 are those of n-tile 0 plus a constant.
struct TokenMap {
  uint64_t nibbles;

  TQ4_HOST_DEVICE int step() const { return token(1, 0) - token(0, 0); }

  TQ4_HOST_DEVICE int token(int i, int n) const {
    return static_cast<int>(nibbles >> (4 * (8 * i + n)) & 15);
  }
};

// Where the fields of (token, head of the chunk) lie in a stage, in bytes.
struct StageView {
  int32_t k_codes, v_codes, k_norms, v_norms;
  int32_t code_token_stride, code_head_stride;
  int32_t norm_token_stride, norm_head_stride;
};

// A run of contiguous bytes of a tile, at `src` in the page and `dst` in the stage.
struct CopyRun {
  int32_t src, dst, bytes;
  int32_t tile_stride;   // src of the next 16 tokens of the page
  int32_t chunk_stride;  // src of the next chunk of KV heads
  int32_t width;         // 16, 8 or 4: every address and size of it is a multiple
  Divider row;           // by bytes / width, the elements of a repetition
};

// One repetition of a run: what a single bulk copy moves.
struct CopyPiece {
  int32_t src, dst, bytes, tile_stride, chunk_stride;
};
constexpr int kMaxCopyPieces = 64;  // 4 runs of 16 tokens or heads

// How one tile, one chunk of KV heads, gets from a page into a stage: `reps` repetitions of each
// run.
struct TileCopy {
  CopyRun run[4];
  int32_t num_runs;
  int32_t reps;                    // tokens (token-major) or heads (head-major); 1 once merged
  int32_t src_stride, dst_stride;  // of a repetition
  int32_t bytes;                   // of all runs and repetitions
  int32_t stage_bytes;             // span in the stage, a multiple of 128
  int32_t width;                   // of the narrowest run
  StageView stage;

  TQ4_HOST_DEVICE int num_pieces() const { return num_runs * reps; }
  TQ4_HOST_DEVICE CopyPiece piece(int index) const {
    const CopyRun& r = run[index / reps];
    const int rep = index % reps;
    return {r.src + rep * src_stride, r.dst + rep * dst_stride, r.bytes, r.tile_stride,
            r.chunk_stride};
  }
};

}  // namespace tq4
