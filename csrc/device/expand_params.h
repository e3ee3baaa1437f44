// Arguments of expand_kernel, made from those of gather or of decompress.
#pragma once
#include <cstdint>

#include "../layout.h"
#include "../params.h"
#include "common.cuh"
#include "dense_rows.h"
#include "page_copy.h"

namespace tq4 {

// K or V.
struct ExpandSide {
  const uint8_t* codes;  // of slot 0, head 0
  const uint8_t* norms;
  const float* rotation;   // [D, D] or null
  const float* centroids;  // [16]
  uint8_t* out;            // row (token, head) at token_stride, head_stride bytes
  int64_t token_stride, head_stride;
};

// Output token i of sequence s, the one with out_start_loc[s] <= i < out_start_loc[s + 1], is token
// i - out_start_loc[s] of its pages.  Dense arrays are blocks of one token and no block_table.
struct ExpandParams {
  ExpandSide sides[2];
  const int32_t* block_table;  // [num_seqs, block_table_stride]; null: block = output token
  int64_t block_table_stride;
  const int32_t* seq_lens;                       // [num_seqs]
  const int32_t* out_start_loc;                  // [num_seqs + 1]
  int64_t code_block_stride, norm_block_stride;  // bytes
  int32_t code_token_stride, norm_token_stride;  // bytes; offsets inside a block fit in 32 bits
  int32_t code_head_stride, norm_head_stride;
  Divider heads;  // by the number of heads
  Divider block;  // by block_size
  int32_t num_seqs;
  int32_t num_rows;     // output tokens * heads
  int32_t num_sides;    // 2: even CTAs expand K, odd ones V
  int32_t code_width;   // 16, 8 or 4: alignment of a row's codes
  bool aligned_output;  // rows of out are 16-byte aligned
};

inline ExpandParams expand_params(const GatherParams& s) {
  check_alignment(s.k_rotation, 16, "k_rotation");
  check_alignment(s.v_rotation, 16, "v_rotation");
  const PageView& view = s.cache;
  check_block_size(view.block_size);
  const int64_t bytes = element_bytes(s.dtype);
  ExpandParams p = {};
  p.sides[0] = {view.base + view.k_codes,
                view.base + view.k_norms,
                s.k_rotation,
                s.k_centroids,
                static_cast<uint8_t*>(s.key),
                s.key_token_stride * bytes,
                s.key_head_stride * bytes};
  p.sides[1] = {view.base + view.v_codes,
                view.base + view.v_norms,
                s.v_rotation,
                s.v_centroids,
                static_cast<uint8_t*>(s.value),
                s.value_token_stride * bytes,
                s.value_head_stride * bytes};
  p.num_sides = 2;
  p.block_table = s.block_table;
  p.block_table_stride = s.block_table_stride;
  p.seq_lens = s.seq_lens;
  p.out_start_loc = s.out_start_loc;
  p.num_seqs = s.num_seqs;
  p.code_block_stride = p.norm_block_stride = view.block_stride;
  p.code_token_stride = view.code_token_stride;
  p.norm_token_stride = view.norm_token_stride;
  p.code_head_stride = view.code_head_stride;
  p.norm_head_stride = view.norm_head_stride;
  p.num_rows = count_rows("key", s.total, view.num_kv_heads);
  p.heads = Divider::make(view.num_kv_heads);
  p.block = Divider::make(view.block_size);
  p.code_width = copy_width(view);
  p.aligned_output = is_aligned(s.key, p.sides[0].token_stride, p.sides[0].head_stride, 16) &&
                     is_aligned(s.value, p.sides[1].token_stride, p.sides[1].head_stride, 16);
  return p;
}

inline ExpandParams expand_params(const DecompressParams& d) {
  check_alignment(d.rotation, 16, "rotation");
  check_alignment(d.packed, 4, "packed");
  const int64_t codes = d.head_dim / 2;
  const int64_t row_bytes = int64_t{d.head_dim} * element_bytes(d.dtype);
  ExpandParams p = {};
  p.sides[0] = {d.packed,
                reinterpret_cast<const uint8_t*>(d.norms),
                d.rotation,
                d.centroids,
                static_cast<uint8_t*>(d.out),
                d.num_heads * row_bytes,
                row_bytes};
  p.num_sides = 1;
  p.code_block_stride = d.num_heads * codes;
  p.norm_block_stride = int64_t{d.num_heads} * kNormBytes;
  p.code_head_stride = static_cast<int32_t>(codes);
  p.norm_head_stride = kNormBytes;
  p.num_rows = count_rows("out", d.num_tokens, d.num_heads);
  p.heads = Divider::make(d.num_heads);
  p.block = Divider::make(1);
  p.code_width = packed_width(d.packed, codes);
  p.aligned_output = is_aligned(d.out, row_bytes, 0, 16);
  return p;
}

}  // namespace tq4
