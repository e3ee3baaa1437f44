// torch.ops.tq4_cuda.store and compress.  The schemas are defined in tq4/ops.py.
#include "../kernels/store.h"

#include "../layout.h"
#include "binding.h"

namespace tq4::ops {
namespace {

void store(const Tensor& key, const Tensor& value, const Tensor& cache, const Tensor& slot_mapping,
           const OptionalTensor& k_rotation, const OptionalTensor& v_rotation,
           const Tensor& k_centroids, const Tensor& k_boundaries, const Tensor& v_centroids,
           const Tensor& v_boundaries, bool norm_correction) {
  const DeviceScope scope(key, "key");
  StoreParams p = {};
  p.dtype = float_dtype(key, "key");
  check_vectors(scope, key, "key", key.scalar_type());
  check_vectors(scope, value, "value", key.scalar_type());
  const int64_t tokens = key.size(0), heads = key.size(1), head_dim = key.size(2);
  check_sizes(value, "value", {tokens, heads, head_dim});
  check_tensor(scope, slot_mapping, "slot_mapping", ScalarType::Long, 1);
  check_sizes(slot_mapping, "slot_mapping", {tokens});
  check_contiguous(slot_mapping, "slot_mapping");
  p.key = data(key);
  p.value = data(value);
  p.key_token_stride = key.stride(0);
  p.key_head_stride = key.stride(1);
  p.value_token_stride = value.stride(0);
  p.value_head_stride = value.stride(1);
  p.cache = page_view(scope, cache, heads, head_dim);
  p.slot_mapping = static_cast<const int64_t*>(data(slot_mapping));
  p.k_rotation = rotation(scope, k_rotation, "k_rotation", head_dim, p.k_signs);
  p.v_rotation = rotation(scope, v_rotation, "v_rotation", head_dim, p.v_signs);
  p.k_centroids = float_table(scope, k_centroids, "k_centroids", kNumCentroids);
  p.k_boundaries = float_table(scope, k_boundaries, "k_boundaries", kNumBoundaries);
  p.v_centroids = float_table(scope, v_centroids, "v_centroids", kNumCentroids);
  p.v_boundaries = float_table(scope, v_boundaries, "v_boundaries", kNumBoundaries);
  p.num_tokens = narrow(tokens, "key");
  p.norm_correction = norm_correction;
  launch_store(p, scope.stream());
}

void compress(const Tensor& x, const OptionalTensor& rotation_matrix, const Tensor& centroids,
              const Tensor& boundaries, const Tensor& packed, const Tensor& norms,
              bool norm_correction) {
  const DeviceScope scope(x, "x");
  CompressParams p = {};
  p.dtype = float_dtype(x, "x");
  check_vectors(scope, x, "x", x.scalar_type());
  const int64_t tokens = x.size(0), heads = x.size(1), head_dim = x.size(2);
  check_tensor(scope, packed, "packed", ScalarType::Byte, 3);
  check_sizes(packed, "packed", {tokens, heads, code_bytes(head_dim)});
  check_contiguous(packed, "packed");
  check_tensor(scope, norms, "norms", ScalarType::Float, 3);
  check_sizes(norms, "norms", {tokens, heads, 1});
  check_contiguous(norms, "norms");
  p.x = data(x);
  p.x_token_stride = x.stride(0);
  p.x_head_stride = x.stride(1);
  p.rotation = rotation(scope, rotation_matrix, "rotation", head_dim, p.signs);
  p.centroids = float_table(scope, centroids, "centroids", kNumCentroids);
  p.boundaries = float_table(scope, boundaries, "boundaries", kNumBoundaries);
  p.packed = static_cast<uint8_t*>(mutable_data(packed));
  p.norms = static_cast<float*>(mutable_data(norms));
  p.num_tokens = narrow(tokens, "x");
  p.num_heads = narrow(heads, "x");
  p.head_dim = static_cast<int32_t>(head_dim);
  p.norm_correction = norm_correction;
  launch_compress(p, scope.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tq4_cuda, CUDA, m) {
  m.impl("store", TORCH_BOX(&store));
  m.impl("compress", TORCH_BOX(&compress));
}

}  // namespace tq4::ops
