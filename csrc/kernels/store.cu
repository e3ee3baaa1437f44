// Launchers of store and compress: both are encode_kernel (store.cuh) with different row targets.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "../device/launch.h"
#include "../device/page_copy.h"
#include "dense_rows.h"
#include "store.cuh"
#include "store.h"

namespace tq4 {
namespace {

template <class C>
void launch_config(const EncodeParams& p, Stream stream) {
  const DeviceProperties device = device_properties();
  const bool rotated = p.sides[0].rotation != nullptr || p.sides[1].rotation != nullptr;
  const int rotation_bytes = rotated ? static_cast<int>(sizeof(typename C::Rotation)) : 0;
  constexpr int kStaticBytes = sizeof(GroupTables) + 128;
  const int room = (device.max_smem_bytes - kStaticBytes - rotation_bytes) / C::kTileBytes;
  // An even number, so that the threads are a multiple of D / 4 (scan_rotation).
  const int warps = std::min(C::kMaxWarps, room / 2 * 2);
  if (warps < 2) throw std::runtime_error("store: this device has too little shared memory a CTA");
  const int num_tiles = (p.num_rows - 1) / 16 + 1;
  // One persistent CTA an SM, half of them for each side.
  const int ctas = std::min(std::max(device.num_sms / p.num_sides, 1), num_tiles);
  launch_kernel(encode_kernel<C>, static_cast<unsigned>(ctas * p.num_sides), warps * kWarpSize,
                rotation_bytes + warps * C::kTileBytes, stream, p);
}

template <typename T>
void launch_element(const EncodeParams& p, int head_dim, Stream stream) {
  switch (head_dim) {
    case 64:
      return launch_config<EncodeConfig<T, 64>>(p, stream);
    case 96:
      return launch_config<EncodeConfig<T, 96>>(p, stream);
    case 128:
      return launch_config<EncodeConfig<T, 128>>(p, stream);
    case 256:
      return launch_config<EncodeConfig<T, 256>>(p, stream);
    default:
      throw std::invalid_argument("head_dim: expected 64, 96, 128 or 256, got " +
                                  std::to_string(head_dim));
  }
}

void launch_encode(const EncodeParams& p, int head_dim, DType dtype, Stream stream) {
  if (p.num_rows == 0) return;
  switch (dtype) {
    case DType::kFloat16:
      return launch_element<__half>(p, head_dim, stream);
    case DType::kBFloat16:
      return launch_element<__nv_bfloat16>(p, head_dim, stream);
    case DType::kFloat32:
      return launch_element<float>(p, head_dim, stream);
  }
  throw std::invalid_argument("dtype: expected float16, bfloat16 or float32");
}

}  // namespace

void launch_store(const StoreParams& s, Stream stream) {
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
                s.k_centroids,
                s.k_boundaries,
                view.base + view.k_codes,
                view.base + view.k_norms};
  p.sides[1] = {static_cast<const uint8_t*>(s.value),
                s.value_token_stride * bytes,
                s.value_head_stride * bytes,
                s.v_rotation,
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
  p.norm_correction = s.norm_correction;
  launch_encode(p, view.head_dim, s.dtype, stream);
}

void launch_compress(const CompressParams& c, Stream stream) {
  check_alignment(c.rotation, 16, "rotation");
  check_alignment(c.packed, 4, "packed");
  const int64_t bytes = element_bytes(c.dtype), codes = c.head_dim / 2;
  EncodeParams p = {};
  p.sides[0] = {static_cast<const uint8_t*>(c.x),
                c.x_token_stride * bytes,
                c.x_head_stride * bytes,
                c.rotation,
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
  p.norm_correction = c.norm_correction;
  launch_encode(p, c.head_dim, c.dtype, stream);
}

}  // namespace tq4
