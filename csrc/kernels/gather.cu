// Launchers of gather and decompress: both are expand_kernel (gather.cuh) with different sources.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "../device/launch.h"
#include "../device/page_copy.h"
#include "dense_rows.h"
#include "gather.cuh"
#include "gather.h"

namespace tq4 {
namespace {

template <class C>
void launch_config(const ExpandParams& p, Stream stream) {
  const int num_tiles = (p.num_rows - 1) / 16 + 1;
  // One persistent CTA an SM, half of them for each side.
  const int ctas = std::min(std::max(device_properties().num_sms / p.num_sides, 1), num_tiles);
  const bool rotated = p.sides[0].rotation != nullptr || p.sides[1].rotation != nullptr;
  launch_kernel(expand_kernel<C>, static_cast<unsigned>(ctas * p.num_sides), C::kThreads,
                rotated ? sizeof(typename C::Rotation) : 0, stream, p);
}

template <typename T>
void launch_element(const ExpandParams& p, int head_dim, Stream stream) {
  switch (head_dim) {
    case 64:
      return launch_config<ExpandConfig<T, 64>>(p, stream);
    case 96:
      return launch_config<ExpandConfig<T, 96>>(p, stream);
    case 128:
      return launch_config<ExpandConfig<T, 128>>(p, stream);
    case 256:
      return launch_config<ExpandConfig<T, 256>>(p, stream);
    default:
      throw std::invalid_argument("head_dim: expected 64, 96, 128 or 256, got " +
                                  std::to_string(head_dim));
  }
}

void launch_expand(const ExpandParams& p, int head_dim, DType dtype, Stream stream) {
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

void launch_gather(const GatherParams& s, Stream stream) {
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
  launch_expand(p, view.head_dim, s.dtype, stream);
}

void launch_decompress(const DecompressParams& d, Stream stream) {
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
  launch_expand(p, d.head_dim, d.dtype, stream);
}

}  // namespace tq4
