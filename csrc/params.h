// Argument structs of every kernel.  Plain data: no torch, no CUDA runtime types beyond
// the stream, so that the same launchers serve the PyTorch extension (csrc/ops) and the
// torch-free static library (CMakeLists.txt).
//
// Symbols: D head_dim, Hq query heads, Hkv KV heads, T query tokens, B sequences.
#pragma once
#include <cstdint>

struct CUstream_st;  // cudaStream_t is CUstream_st*; avoids including the runtime here

namespace tq4 {

using Stream = CUstream_st*;

enum class DType : int32_t { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2 };

// Which kernels an attention launcher may use.
enum class Path : int32_t {
  kAuto = 0,      // the best compiled-in kernel for the current device
  kPortable = 1,  // the sm_80 kernels whatever the device (tests and tuning on newer parts)
};

// Where prefill unpacks K and V.  Kernels that do it ahead write every tile once to the workspace.
enum class Unpack : int32_t {
  kAuto = 0,      // ahead where there are query rows enough to pay for it
  kInKernel = 1,  // in the attention kernel
  kAhead = 2,     // ahead wherever it is possible
};

// Which kernels take the sequences of a prefill that have few query tokens (device/query_split.h).
enum class ShortQueries : int32_t {
  kAuto = 0,     // those of decode, where they can
  kPrefill = 1,  // those of prefill, whatever the lengths
};

// Where the four fields of (block, token, kv head) lie.  All strides and offsets are bytes.
//   K codes  base + block*block_stride + k_codes + token*code_token_stride + head*code_head_stride
//   K norm   base + block*block_stride + k_norms + token*norm_token_stride + head*norm_head_stride
// and V alike.  Codes are D/2 contiguous bytes, 4-byte aligned; norms are fp32, 4-byte aligned.
// Offsets inside one block fit in 32 bits, block offsets need 64.
struct PageView {
  uint8_t* base;
  int64_t block_stride;
  int32_t k_codes, k_norms, v_codes, v_norms;
  int32_t code_token_stride, code_head_stride;
  int32_t norm_token_stride, norm_head_stride;
  int32_t num_blocks;
  int32_t block_size;  // tokens, a multiple of 16
  int32_t num_kv_heads;
  int32_t head_dim;
};

// rotate, quantise, pack new tokens and scatter them into pages.
//
// Rotations of store, compress and decode are matrices [D, D] or, where the flag beside them says
// so, [D]: the signs s of a randomised Hadamard matrix R = H diag(s) / sqrt(D), D a power of two.
struct StoreParams {
  const void* key;                                // [T, Hkv, D] dtype, last dim contiguous
  const void* value;                              // [T, Hkv, D] dtype
  int64_t key_token_stride, key_head_stride;      // elements
  int64_t value_token_stride, value_head_stride;  // elements
  DType dtype;
  PageView cache;
  const int64_t* slot_mapping;  // [T] block * block_size + offset; negative = skip
  const float* k_rotation;      // [D, D] row-major, or signs, or null (already rotated)
  const float* v_rotation;
  bool k_signs, v_signs;      // whether they are signs [D]
  const float* k_centroids;   // [16] ascending
  const float* k_boundaries;  // [15]
  const float* v_centroids;   // [16]
  const float* v_boundaries;  // [15]
  int32_t num_tokens;
  bool norm_correction;
};

// pages of given sequences back to dense, packed K and V.
struct GatherParams {
  PageView cache;
  const int32_t* block_table;    // [B, block_table_stride]
  int64_t block_table_stride;    // elements
  const int32_t* seq_lens;       // [B]
  const int32_t* out_start_loc;  // [B + 1] first output row of each sequence
  const float* k_rotation;       // [D, D] row-major: the output is row @ R; null = stay rotated
  const float* v_rotation;
  const float* k_centroids;  // [16]
  const float* v_centroids;  // [16]
  void* key;                 // [total, Hkv, D] dtype, last dim contiguous
  void* value;
  int64_t key_token_stride, key_head_stride;      // elements
  int64_t value_token_stride, value_head_stride;  // elements
  DType dtype;
  int32_t num_seqs;
  int32_t total;  // rows of key and value; rows past out_start_loc[B] are left alone
};

// The unpaged pair.  Rows are (n, h) flattened: num_rows = N * H.
struct CompressParams {
  const void* x;                          // [N, H, D] dtype, last dim contiguous
  int64_t x_token_stride, x_head_stride;  // elements
  DType dtype;
  const float* rotation;    // [D, D] row-major, or signs, or null
  bool signs;               // whether it is signs [D]
  const float* centroids;   // [16]
  const float* boundaries;  // [15]
  uint8_t* packed;          // [N, H, D/2] contiguous
  float* norms;             // [N, H, 1] contiguous
  int32_t num_tokens, num_heads, head_dim;
  bool norm_correction;
};

struct DecompressParams {
  const uint8_t* packed;   // [N, H, D/2] contiguous
  const float* norms;      // [N, H, 1] contiguous
  const float* rotation;   // [D, D] row-major: out = row @ R; null = stay rotated
  const float* centroids;  // [16]
  void* out;               // [N, H, D] dtype contiguous
  DType dtype;
  int32_t num_tokens, num_heads, head_dim;
};

// Attention over the cache, prefill and decode.
//   visible(key j, query at position p) = j < L
//       and (window_left  < 0 or j >= p - window_left)
//       and (window_right < 0 or j <= p + window_right)
// with p = L - T_seq + t (bottom-right).  Causal is window_right = 0: the caller folds it in.
struct AttentionParams {
  // [T, Hq, D] dtype (fp16 or bf16), last dim contiguous; prefill: rows 16-byte aligned
  const void* q;
  void* out;                                  // [T, Hq, D] dtype, last dim contiguous
  float* lse;                                 // [Hq, T] contiguous, natural log, or null
  int64_t q_token_stride, q_head_stride;      // elements
  int64_t out_token_stride, out_head_stride;  // elements
  DType dtype;
  PageView cache;
  const int32_t* block_table;      // [B, max_blocks]
  int64_t block_table_stride;      // elements
  int32_t max_blocks;              // columns of block_table: the most pages of a sequence
  const int32_t* seq_lens;         // [B] keys, including the tokens of this call
  const int32_t* query_start_loc;  // [B + 1]; null (decode only) = one token a sequence
  const float* q_rotation;         // [D, D] row-major: q_rot = q @ R^T; null = q is rotated already
  const float* out_rotation;       // [D, D] row-major: out = O @ R; null = O stays rotated
  bool q_signs, out_signs;         // whether they are signs [D]; decode only
  const float* k_centroids;        // [16] fp32 (exact mode)
  const int8_t* k_codes;           // [16] (INT8 mode), in [-126, 126]; decode gives NaN for others
  float k_code_scale;              // centroid ~= code * k_code_scale
  const float* v_centroids;        // [16] fp32
  const float* sinks;              // [Hq] fp32 logits added to the denominator, or null
  float sm_scale;
  float softcap;                      // 0 = none
  int32_t window_left, window_right;  // -1 = unlimited
  bool int8;  // q and K as INT8 codes; false = exact mode: two terms each, or fp16
  int32_t num_seqs, num_tokens, num_q_heads;
  int32_t max_query_len;  // upper bound of the query tokens of one sequence
  // Sequences of up to so many query tokens are decode's, the others prefill's: each leaves the
  // rest of the batch alone.  0: no such division.  launch_prefill sets it, callers leave it 0.
  int32_t short_query_len;
  int32_t num_sms;  // of the current device
  int32_t arch;     // major * 10 + minor of the current device
  Path path;
  Unpack unpack;               // prefill only
  ShortQueries short_queries;  // prefill only
  void* workspace;             // {decode,prefill}_workspace_bytes() bytes, 16-byte aligned
};

}  // namespace tq4
