// Launchers of gather and decompress: both are expand_kernel (device/expand_kernel.cuh) with
// different sources.
#include <algorithm>
#include <stdexcept>

#include "../device/expand_kernel.cuh"
#include "../device/launch.h"
#include "gather.h"
#include "head_dim.h"

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
  dispatch_head_dim(head_dim, [&](auto d) { launch_config<ExpandConfig<T, d>>(p, stream); });
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

void launch_gather(const GatherParams& p, Stream stream) {
  launch_expand(expand_params(p), p.cache.head_dim, p.dtype, stream);
}

void launch_decompress(const DecompressParams& p, Stream stream) {
  launch_expand(expand_params(p), p.head_dim, p.dtype, stream);
}

}  // namespace tq4
