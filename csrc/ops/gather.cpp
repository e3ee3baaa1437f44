// torch.ops.tq4_cuda.gather and decompress.  The schemas are defined in tq4/ops.py.
#include "../kernels/gather.h"

#include "../layout.h"
#include "binding.h"

namespace tq4::ops {
namespace {

void gather(const Tensor& cache, const Tensor& block_table_tensor, const Tensor& seq_lens,
            const Tensor& out_start_loc, const OptionalTensor& k_rotation,
            const OptionalTensor& v_rotation, const Tensor& k_centroids, const Tensor& v_centroids,
            const Tensor& key, const Tensor& value) {
  const DeviceScope scope(cache, "cache");
  GatherParams p = {};
  p.dtype = float_dtype(key, "key");
  check_vectors(scope, key, "key", key.scalar_type());
  check_vectors(scope, value, "value", key.scalar_type());
  const int64_t total = key.size(0), heads = key.size(1), head_dim = key.size(2);
  check_sizes(value, "value", {total, heads, head_dim});
  p.cache = page_view(scope, cache, heads, head_dim);
  const BlockTable table = block_table(scope, block_table_tensor);
  p.block_table = table.data;
  p.block_table_stride = table.stride;
  p.num_seqs = table.num_seqs;
  p.seq_lens = index_vector(scope, seq_lens, "seq_lens", table.num_seqs);
  p.out_start_loc =
      index_vector(scope, out_start_loc, "out_start_loc", int64_t{table.num_seqs} + 1);
  p.k_rotation = rotation(scope, k_rotation, "k_rotation", head_dim);
  p.v_rotation = rotation(scope, v_rotation, "v_rotation", head_dim);
  p.k_centroids = float_table(scope, k_centroids, "k_centroids", kNumCentroids);
  p.v_centroids = float_table(scope, v_centroids, "v_centroids", kNumCentroids);
  p.key = mutable_data(key);
  p.value = mutable_data(value);
  p.key_token_stride = key.stride(0);
  p.key_head_stride = key.stride(1);
  p.value_token_stride = value.stride(0);
  p.value_head_stride = value.stride(1);
  p.total = narrow(total, "key");
  launch_gather(p, scope.stream());
}

void decompress(const Tensor& packed, const Tensor& norms, const OptionalTensor& rotation_matrix,
                const Tensor& centroids, const Tensor& out) {
  const DeviceScope scope(packed, "packed");
  DecompressParams p = {};
  p.dtype = float_dtype(out, "out");
  check_vectors(scope, out, "out", out.scalar_type());
  check_contiguous(out, "out");
  const int64_t tokens = out.size(0), heads = out.size(1), head_dim = out.size(2);
  check_tensor(scope, packed, "packed", ScalarType::Byte, 3);
  check_sizes(packed, "packed", {tokens, heads, code_bytes(head_dim)});
  check_contiguous(packed, "packed");
  check_tensor(scope, norms, "norms", ScalarType::Float, 3);
  check_sizes(norms, "norms", {tokens, heads, 1});
  check_contiguous(norms, "norms");
  p.packed = static_cast<const uint8_t*>(data(packed));
  p.norms = static_cast<const float*>(data(norms));
  p.rotation = rotation(scope, rotation_matrix, "rotation", head_dim);
  p.centroids = float_table(scope, centroids, "centroids", kNumCentroids);
  p.out = mutable_data(out);
  p.num_tokens = narrow(tokens, "out");
  p.num_heads = narrow(heads, "out");
  p.head_dim = static_cast<int32_t>(head_dim);
  launch_decompress(p, scope.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tq4_cuda, CUDA, m) {
  m.impl("gather", TORCH_BOX(&gather));
  m.impl("decompress", TORCH_BOX(&decompress));
}

}  // namespace tq4::ops
