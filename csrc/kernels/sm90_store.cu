// The launcher of encode_wgmma_kernel.
#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "../device/encode_wgmma.cuh"
#include "../device/launch.h"
#include "sm90_store.h"

namespace tq4::sm90 {
namespace {

template <typename T, int D, int Variant>
void launch(const EncodeParams& p, Stream stream) {
  using Config = EncodeWgmmaConfig<T, D, Variant>;
  // One persistent CTA an SM, half of them for each side.
  const int num_tiles = (p.num_rows - 1) / Config::kTileRows + 1;
  const int ctas = std::min(std::max(device_properties().num_sms / p.num_sides, 1), num_tiles);
  launch_kernel(encode_wgmma_kernel<Config>, static_cast<unsigned>(ctas * p.num_sides),
                Config::kThreads, Config::kSmemBytes, stream, p);
}

// Experiment.  TQ4_STORE_X: the variant, see EncodeWgmmaConfig.
template <typename T, int D>
void launch(const EncodeParams& p, Stream stream) {
  const char* const choice = std::getenv("TQ4_STORE_X");
  switch (choice == nullptr ? '2' : *choice) {
    case '0':
      return launch<T, D, 0>(p, stream);
    case '3':
      return launch<T, D, 3>(p, stream);
    case '4':
      return launch<T, D, 4>(p, stream);
    case '5':
      return launch<T, D, 5>(p, stream);
    case '6':
      return launch<T, D, 6>(p, stream);
    case '7':
      return launch<T, D, 7>(p, stream);
    case '8':
      return launch<T, D, 8>(p, stream);
    case '9':
      return launch<T, D, 9>(p, stream);
    default:
      return launch<T, D, 2>(p, stream);
  }
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
