// torch.ops.tq4_cuda.prefill.  The schema is defined in tq4/ops.py.
#include "../kernels/prefill.h"

#include "attention.h"

namespace tq4::ops {
namespace {

void prefill(const Tensor& q, const Tensor& cache, const Tensor& block_table,
             const Tensor& seq_lens, const Tensor& query_start_loc,
             const OptionalTensor& q_rotation, const OptionalTensor& out_rotation,
             const Tensor& k_centroids, const Tensor& k_codes, double k_code_scale,
             const Tensor& v_centroids, const Tensor& out, const OptionalTensor& lse,
             const OptionalTensor& sinks, int64_t num_kv_heads, double sm_scale, bool causal,
             int64_t window_left, int64_t window_right, double softcap, int64_t max_query_len,
             bool int8, int64_t path) {
  const DeviceScope scope(q, "q");
  const OptionalTensor starts = query_start_loc;
  AttentionParams p = attention_params(scope, {q,
                                               cache,
                                               block_table,
                                               seq_lens,
                                               starts,
                                               q_rotation,
                                               out_rotation,
                                               k_centroids,
                                               k_codes,
                                               k_code_scale,
                                               v_centroids,
                                               out,
                                               lse,
                                               sinks,
                                               num_kv_heads,
                                               sm_scale,
                                               causal,
                                               window_left,
                                               window_right,
                                               softcap,
                                               max_query_len,
                                               int8,
                                               path});
  if (p.num_tokens == 0) return;
  // From torch's allocator: freed in stream order, and part of the graph's pool during a capture.
  OptionalTensor workspace;
  const int64_t bytes = prefill_workspace_bytes(p);
  if (bytes > 0) {
    workspace = torch::stable::new_empty(q, {bytes}, ScalarType::Byte);
    p.workspace = mutable_data(*workspace);
  }
  launch_prefill(p, scope.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tq4_cuda, CUDA, m) { m.impl("prefill", TORCH_BOX(&prefill)); }

}  // namespace tq4::ops
