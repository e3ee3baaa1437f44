// Launchers of store and compress: both are encode_kernel (device/encode_kernel.cuh) with different
// row targets or, for few rows and no matrix, encode_rows_kernel (device/encode_rows.cuh) or, for
// many rows on Hopper, encode_wgmma_kernel (sm90_store.cu).
#include <algorithm>
#include <stdexcept>

#include "../device/encode_kernel.cuh"
#include "../device/encode_rows.cuh"
#include "../device/launch.h"
#include "head_dim.h"
#include "sm90_store.h"
#include "store.h"

namespace tq4 {
namespace {

template <class C>
void launch_config(const EncodeParams& p, Stream stream) {
  const DeviceProperties device = device_properties();
  const int rotation_bytes = p.has_matrix ? static_cast<int>(sizeof(typename C::Rotation)) : 0;
  constexpr int kStaticBytes = round_up(static_cast<int>(sizeof(EncodeTables)), 128);
  const int room = (device.max_smem_bytes - kStaticBytes - rotation_bytes) / C::kTileBytes;
  // An even number, so that the threads are a multiple of D / 4 (scan_rotation).
  const int warps = std::min(C::kMaxWarps, room / 2 * 2);
  if (warps < 2) throw std::runtime_error("store: this device has too little shared memory a CTA");
  const int num_tiles = (p.num_rows - 1) / 16 + 1;
  // One persistent CTA an SM, half of them for each side.
  const int ctas = std::min(std::max(device.num_sms / p.num_sides, 1), num_tiles);
  EncodeParams params = p;
  params.tile_buffers = num_tiles > ctas * warps && room >= 2 * warps ? 2 : 1;
  launch_kernel(encode_kernel<C>, static_cast<unsigned>(ctas * p.num_sides), warps * kWarpSize,
                rotation_bytes + warps * params.tile_buffers * C::kTileBytes, stream, params);
}

// Rows few enough to be in flight all at once.
bool few_rows(const EncodeRowsParams& rows, int num_sides) {
  const int64_t ctas = int64_t{encode_rows_ctas(rows)} * num_sides;
  return ctas <= int64_t{kEncodeRowsCtas} * device_properties().num_sms;
}

template <typename T>
void launch_element(const EncodeParams& p, int head_dim, [[maybe_unused]] DType dtype,
                    Stream stream) {
  EncodeRowsParams rows;
  if (make_encode_rows_params(rows, p, head_dim) && few_rows(rows, p.num_sides)) {
    const dim3 grid(encode_rows_ctas(rows), p.num_sides);
    return launch_kernel(encode_rows_kernel<T>, grid, kEncodeRowsThreads, 0, stream, rows);
  }
#ifdef TQ4_HAS_SM90A
  if (device_properties().arch == 90 && sm90::encodes(p, head_dim, dtype)) {
    return sm90::launch_encode(p, head_dim, dtype, stream);
  }
#endif
  dispatch_head_dim(head_dim, [&](auto d) { launch_config<EncodeConfig<T, d>>(p, stream); });
}

void launch_encode(const EncodeParams& p, int head_dim, DType dtype, Stream stream) {
  if (p.num_rows == 0) return;
  switch (dtype) {
    case DType::kFloat16:
      return launch_element<__half>(p, head_dim, dtype, stream);
    case DType::kBFloat16:
      return launch_element<__nv_bfloat16>(p, head_dim, dtype, stream);
    case DType::kFloat32:
      return launch_element<float>(p, head_dim, dtype, stream);
  }
  throw std::invalid_argument("dtype: expected float16, bfloat16 or float32");
}

}  // namespace

void launch_store(const StoreParams& p, Stream stream) {
  launch_encode(encode_params(p), p.cache.head_dim, p.dtype, stream);
}

void launch_compress(const CompressParams& p, Stream stream) {
  launch_encode(encode_params(p), p.head_dim, p.dtype, stream);
}

}  // namespace tq4
