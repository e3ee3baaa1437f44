// The part that the prefill and decode bindings share: tensors to AttentionParams.
#pragma once
#include "../params.h"
#include "binding.h"

namespace tq4::ops {

// Arguments of both ops, in the order of their schemas (tq4/ops.py).
struct AttentionArguments {
  const Tensor& q;  // [T, Hq, D]
  const Tensor& cache;
  const Tensor& block_table;              // int32 [B, max_blocks]
  const Tensor& seq_lens;                 // int32 [B]
  const OptionalTensor& query_start_loc;  // int32 [B + 1]; none = one token a sequence
  const OptionalTensor& q_rotation;       // fp32 [D, D]
  const OptionalTensor& out_rotation;
  const Tensor& k_centroids;  // fp32 [16]
  const Tensor& k_codes;      // int8 [16]
  double k_code_scale;
  const Tensor& v_centroids;    // fp32 [16]
  const Tensor& out;            // [T, Hq, D]
  const OptionalTensor& lse;    // fp32 [Hq, T]
  const OptionalTensor& sinks;  // fp32 [Hq]
  int64_t num_kv_heads;
  double sm_scale;
  bool causal;
  int64_t window_left, window_right;
  double softcap;
  int64_t max_query_len;  // -1: not known
  bool int8;
  int64_t path;
};

// Everything but the workspace.  Throws std::invalid_argument.
AttentionParams attention_params(const DeviceScope& scope, const AttentionArguments& a);

}  // namespace tq4::ops
