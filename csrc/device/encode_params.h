// Arguments of encode_kernel, made from those of store or of compress.
#pragma once
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../layout.h"
#include "../params.h"
#include "common.cuh"
#include "dense_rows.h"
#include "page_copy.h"

namespace tq4 {

// Magnitude of the entries of a rotation that is given by its signs.
inline float check_signs(bool signs, int head_dim) {
  if (signs && (head_dim & (head_dim - 1)) != 0) {
    throw std::invalid_argument("rotation: there are no signs for head_dim " +
                                std::to_string(head_dim));
  }
  return static_cast<float>(1 / std::sqrt(static_cast<double>(head_dim)));
}

// K or V.
struct EncodeSide {
  const uint8_t* x;  // row (token, head) at token_stride, head_stride bytes
  int64_t token_stride, head_stride;
  const float* rotation;    // [D, D], or signs [D], or null
  bool signs;               // whether it is signs,
  float entry;              // then the magnitude of R's entries
  const float* centroids;   // [16]
  const float* boundaries;  // [15]
  uint8_t* codes;           // of slot 0, head 0
  uint8_t* norms;
};

inline bool is_matrix(const EncodeSide& side) { return side.rotation != nullptr && !side.signs; }

// Row (token, head) goes to slot = slot_mapping[token], that is block slot / block_size:
//   codes  side.codes + block * code_block_stride + slot % block_size * code_token_stride + head *
//   ...
// Dense arrays are blocks of one token and no slot_mapping.
struct EncodeParams {
  EncodeSide sides[2];
  const int64_t* slot_mapping;                   // [tokens], negative = skip; null: slot = token
  int64_t code_block_stride, norm_block_stride;  // bytes
  int32_t code_token_stride, norm_token_stride;  // bytes; offsets inside a block fit in 32 bits
  int32_t code_head_stride, norm_head_stride;
  Divider heads;             // by the number of heads
  Divider block;             // by block_size
  int32_t num_rows;          // tokens * heads
  int32_t num_sides;         // 2: even CTAs encode K, odd ones V
  int32_t code_width;        // 16, 8 or 4: alignment of a row's codes
  int32_t tile_buffers = 1;  // tiles of x in shared memory, a warp: 1 or 2
  bool has_matrix;           // a rotation is given as a matrix
  bool aligned_input;        // rows of x are 16-byte aligned
  bool norm_correction;
};

inline EncodeParams encode_params(const StoreParams& s) {
  check_alignment(s.k_rotation, 16, "k_rotation");
  check_alignment(s.v_rotation, 16, "v_rotation");
  const PageView& view = s.cache;
  check_block_size(view.block_size);
  // 2^32 slots would be 300 GB even for one KV head of dimension 64.
  if (int64_t{view.num_blocks} * view.block_size > UINT32_MAX) {
    throw std::invalid_argument("cache: expected fewer than 2^32 slots, got " +
                                std::to_string(view.num_blocks) + " blocks of " +
                                std::to_string(view.block_size));
  }
  const int64_t bytes = element_bytes(s.dtype);
  EncodeParams p = {};
  p.sides[0] = {static_cast<const uint8_t*>(s.key),
                s.key_token_stride * bytes,
                s.key_head_stride * bytes,
                s.k_rotation,
                s.k_rotation != nullptr && s.k_signs,
                check_signs(s.k_signs, view.head_dim),
                s.k_centroids,
                s.k_boundaries,
                view.base + view.k_codes,
                view.base + view.k_norms};
  p.sides[1] = {static_cast<const uint8_t*>(s.value),
                s.value_token_stride * bytes,
                s.value_head_stride * bytes,
                s.v_rotation,
                s.v_rotation != nullptr && s.v_signs,
                check_signs(s.v_signs, view.head_dim),
                s.v_centroids,
                s.v_boundaries,
                view.base + view.v_codes,
                view.base + view.v_norms};
  p.num_sides = 2;
  p.slot_mapping = s.slot_mapping;
  p.code_block_stride = p.norm_block_stride = view.block_stride;
  p.code_token_stride = view.code_token_stride;
  p.norm_token_stride = view.norm_token_stride;
  p.code_head_stride = view.code_head_stride;
  p.norm_head_stride = view.norm_head_stride;
  p.num_rows = count_rows("key", s.num_tokens, view.num_kv_heads);
  p.heads = Divider::make(view.num_kv_heads);
  p.block = Divider::make(view.block_size);
  p.code_width = copy_width(view);
  p.aligned_input = is_aligned(s.key, p.sides[0].token_stride, p.sides[0].head_stride, 16) &&
                    is_aligned(s.value, p.sides[1].token_stride, p.sides[1].head_stride, 16);
  p.has_matrix = is_matrix(p.sides[0]) || is_matrix(p.sides[1]);
  p.norm_correction = s.norm_correction;
  return p;
}

inline EncodeParams encode_params(const CompressParams& c) {
  check_alignment(c.rotation, 16, "rotation");
  check_alignment(c.packed, 4, "packed");
  const int64_t bytes = element_bytes(c.dtype), codes = c.head_dim / 2;
  EncodeParams p = {};
  p.sides[0] = {static_cast<const uint8_t*>(c.x),
                c.x_token_stride * bytes,
                c.x_head_stride * bytes,
                c.rotation,
                c.rotation != nullptr && c.signs,
                check_signs(c.signs, c.head_dim),
                c.centroids,
                c.boundaries,
                c.packed,
                reinterpret_cast<uint8_t*>(c.norms)};
  p.num_sides = 1;
  p.code_block_stride = c.num_heads * codes;
  p.norm_block_stride = int64_t{c.num_heads} * kNormBytes;
  p.code_head_stride = static_cast<int32_t>(codes);
  p.norm_head_stride = kNormBytes;
  p.num_rows = count_rows("x", c.num_tokens, c.num_heads);
  p.heads = Divider::make(c.num_heads);
  p.block = Divider::make(1);
  p.code_width = packed_width(c.packed, codes);
  p.aligned_input = is_aligned(c.x, p.sides[0].token_stride, p.sides[0].head_stride, 16);
  p.has_matrix = is_matrix(p.sides[0]);
  p.norm_correction = c.norm_correction;
  return p;
}

}  // namespace tq4
