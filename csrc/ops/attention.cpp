#include "attention.h"

#include <algorithm>
#include <string>

#include "../device/launch.h"
#include "../layout.h"

namespace tq4::ops {

AttentionParams attention_params(const DeviceScope& scope, const AttentionArguments& a) {
  AttentionParams p = {};
  p.dtype = float_dtype(a.q, "q");
  if (p.dtype == DType::kFloat32) fail("q", "dtype Half or BFloat16", "Float");
  check_vectors(scope, a.q, "q", a.q.scalar_type());
  check_vectors(scope, a.out, "out", a.q.scalar_type());
  const int64_t tokens = a.q.size(0), heads = a.q.size(1), head_dim = a.q.size(2);
  check_sizes(a.out, "out", {tokens, heads, head_dim});
  if (a.num_kv_heads < 1 || heads % a.num_kv_heads != 0) {
    fail("num_kv_heads", "a divisor of the " + std::to_string(heads) + " query heads",
         std::to_string(a.num_kv_heads));
  }
  p.q = data(a.q);
  p.out = mutable_data(a.out);
  p.q_token_stride = a.q.stride(0);
  p.q_head_stride = a.q.stride(1);
  p.out_token_stride = a.out.stride(0);
  p.out_head_stride = a.out.stride(1);
  p.num_tokens = narrow(tokens, "q");
  p.num_q_heads = narrow(heads, "q");

  p.cache = page_view(scope, a.cache, a.num_kv_heads, head_dim);
  const BlockTable table = block_table(scope, a.block_table);
  p.block_table = table.data;
  p.block_table_stride = table.stride;
  p.max_blocks = table.max_blocks;
  p.num_seqs = table.num_seqs;
  p.seq_lens = index_vector(scope, a.seq_lens, "seq_lens", p.num_seqs);
  if (a.query_start_loc.has_value()) {
    p.query_start_loc =
        index_vector(scope, *a.query_start_loc, "query_start_loc", int64_t{p.num_seqs} + 1);
    const bool known = a.max_query_len >= 0 && a.max_query_len < tokens;
    p.max_query_len = known ? static_cast<int32_t>(a.max_query_len) : p.num_tokens;
  } else {
    if (tokens != p.num_seqs) {
      fail("q", "one token for each of the " + std::to_string(p.num_seqs) + " sequences",
           std::to_string(tokens) + " tokens");
    }
    p.max_query_len = 1;
  }

  p.q_rotation = rotation(scope, a.q_rotation, "q_rotation", head_dim, p.q_signs);
  p.out_rotation = rotation(scope, a.out_rotation, "out_rotation", head_dim, p.out_signs);
  p.k_centroids = float_table(scope, a.k_centroids, "k_centroids", kNumCentroids);
  p.v_centroids = float_table(scope, a.v_centroids, "v_centroids", kNumCentroids);
  check_tensor(scope, a.k_codes, "k_codes", ScalarType::Char, 1);
  check_sizes(a.k_codes, "k_codes", {kNumCentroids});
  check_contiguous(a.k_codes, "k_codes");
  p.k_codes = static_cast<const int8_t*>(data(a.k_codes));
  p.k_code_scale = static_cast<float>(a.k_code_scale);
  if (a.lse.has_value()) {
    check_tensor(scope, *a.lse, "lse", ScalarType::Float, 2);
    check_sizes(*a.lse, "lse", {heads, tokens});
    check_contiguous(*a.lse, "lse");
    p.lse = static_cast<float*>(mutable_data(*a.lse));
  }
  if (a.sinks.has_value()) p.sinks = float_table(scope, *a.sinks, "sinks", heads);

  p.sm_scale = static_cast<float>(a.sm_scale);
  p.softcap = static_cast<float>(a.softcap);
  // Windows wider than any sequence are unlimited ones; causal is a right window of zero.
  const auto window = [](int64_t size) {
    return size < 0 || size > INT32_MAX ? -1 : static_cast<int32_t>(size);
  };
  p.window_left = window(a.window_left);
  p.window_right = a.causal ? 0 : window(a.window_right);
  p.int8 = a.int8;
  if (a.path < 0 || a.path > 13 || a.path % 8 > 5) {
    fail("path",
         "the sum of 0 or 1 (portable kernels), 0, 2 (unpack in the kernel) or 4 (unpack ahead), "
         "and 0 or 8 (no sequence of a prefill to the decode kernels)",
         std::to_string(a.path));
  }
  p.path = static_cast<Path>(a.path % 2);
  p.unpack = static_cast<Unpack>(a.path % 8 / 2);
  p.short_queries = static_cast<ShortQueries>(a.path / 8);
  const DeviceProperties device = device_properties();
  p.num_sms = device.num_sms;
  p.arch = device.arch;
  return p;
}

}  // namespace tq4::ops
