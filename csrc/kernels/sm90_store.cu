// The launcher of encode_wgmma_kernel.
#include <algorithm>
#include <stdexcept>

#include "../device/encode_wgmma.cuh"
#include "../device/launch.h"
#include "sm90_store.h"

namespace tq4::sm90 {
namespace {

template <typename T, int D>
void launch(const EncodeParams& p, Stream stream) {
  using Config = EncodeWgmmaConfig<T, D>;
  // One persistent CTA an SM, half of them for each side.
  const int num_tiles = (p.num_rows - 1) / Config::kTileRows + 1;
  const int ctas = std::min(std::max(device_properties().num_sms / p.num_sides, 1), num_tiles);
  launch_kernel(encode_wgmma_kernel<Config>, static_cast<unsigned>(ctas * p.num_sides),
                Config::kThreads, Config::kSmemBytes, stream, p);
}

template <typename T>
void launch_element(const EncodeParams& p, int head_dim, Stream stream) {
  return head_dim == 64 ? launch<T, 64>(p, stream) : launch<T, 128>(p, stream);
}

}  // namespace

bool encodes(const EncodeParams& p, int head_dim, DType dtype) {
  return dtype != DType::kFloat32 && encode_wgmma_takes(p, head_dim);
}

void launch_encode(const EncodeParams& p, int head_dim, DType dtype, Stream stream) {
  if (!encodes(p, head_dim, dtype)) throw std::invalid_argument("store: no kernel for this");
  return dtype == DType::kFloat16 ? launch_element<__half>(p, head_dim, stream)
                                  : launch_element<__nv_bfloat16>(p, head_dim, stream);
}

}  // namespace tq4::sm90
