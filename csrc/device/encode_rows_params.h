// Arguments of encode_rows_kernel, made from those of encode_kernel: few, as the first touch of
// each 64 bytes of parameters costs a short kernel half a microsecond.
#pragma once
#include <cstddef>
#include <cstdint>

#include "encode_params.h"

namespace tq4 {

inline constexpr int kEncodeRowsThreads = 128;
inline constexpr int kEncodeRowsCtas = 8;  // an SM

// K or V.
struct EncodeRowsSide {
  const uint8_t* x;    // row (token, head) at token_stride, head_stride bytes
  const float* signs;  // [D] or null: no rotation
  const float* boundaries;
  const float* centroids;
  uint8_t* codes;  // of slot 0, head 0
  uint8_t* norms;
  uint32_t token_stride, head_stride;
  float negative_gain;  // -1 / sqrt(D), or -1 without rotation
};

// As EncodeParams, but in 32 bits.
struct EncodeRowsParams {
  EncodeRowsSide sides[2];
  const int64_t* slot_mapping;
  uint32_t code_block_stride, norm_block_stride;
  uint32_t code_token_stride, norm_token_stride;
  uint32_t code_head_stride, norm_head_stride;
  Divider heads, block;
  uint32_t log_row_lanes;  // log2(D / 8)
  uint32_t num_rows;
  bool norm_correction;
};

// Words 16 i + kNeverAllOnes are upper halves of pointers or a count, one in each 64 bytes.
inline constexpr int kNeverAllOnes = 1;
static_assert(sizeof(EncodeRowsSide) == 64 && offsetof(EncodeRowsParams, num_rows) == 196 &&
                  sizeof(EncodeRowsParams) <= 256,
              "four lines");

// Whether encode_rows_kernel can do it.
inline bool make_encode_rows_params(EncodeRowsParams& rows, const EncodeParams& p, int head_dim) {
  const auto fits = [](int64_t x) { return x >= 0 && x <= INT32_MAX; };
  rows = {};
  for (int log = 3; log <= 5; ++log) {
    if (head_dim == 8 << log) rows.log_row_lanes = log;
  }
  bool able = p.aligned_input && rows.log_row_lanes > 0 && fits(int64_t{p.num_rows} * head_dim) &&
              fits(p.code_block_stride) && fits(p.norm_block_stride);
  const int64_t heads = p.heads.divisor, tokens = p.num_rows / heads;
  for (int i = 0; i < p.num_sides; ++i) {
    const EncodeSide& side = p.sides[i];
    able = able && (side.rotation == nullptr || side.signs) && fits(side.token_stride) &&
           fits(side.head_stride) &&
           fits((tokens - 1) * side.token_stride + heads * side.head_stride);
    rows.sides[i] = {side.x,
                     side.rotation,
                     side.boundaries,
                     side.centroids,
                     side.codes,
                     side.norms,
                     static_cast<uint32_t>(side.token_stride),
                     static_cast<uint32_t>(side.head_stride),
                     side.signs ? -side.entry : -1.f};
  }
  rows.slot_mapping = p.slot_mapping;
  rows.code_block_stride = static_cast<uint32_t>(p.code_block_stride);
  rows.norm_block_stride = static_cast<uint32_t>(p.norm_block_stride);
  rows.code_token_stride = p.code_token_stride;
  rows.norm_token_stride = p.norm_token_stride;
  rows.code_head_stride = p.code_head_stride;
  rows.norm_head_stride = p.norm_head_stride;
  rows.heads = p.heads;
  rows.block = p.block;
  rows.num_rows = static_cast<uint32_t>(p.num_rows);
  rows.norm_correction = p.norm_correction;
  return able;
}

inline unsigned encode_rows_ctas(const EncodeRowsParams& rows) {
  return ((rows.num_rows << rows.log_row_lanes) - 1) / kEncodeRowsThreads + 1;
}

}  // namespace tq4
