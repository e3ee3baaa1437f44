// The image of an unpacked tile (tile_expand.cuh) that the mma.sync prefill kernel reads: exactly
// one buffer of its shared memory, kParts times K tile | V tile | norms.
#pragma once
#include <cstdint>

#include "prefill_config.cuh"
#include "tile_expand.cuh"

namespace tq4::sm80 {

template <typename Config>
struct PrefillImage : TileImage<Config::D, Config::kTile> {
  using Key = typename Config::Key;
  static constexpr int kBytes = Config::kBufferBytes;
  static constexpr int kKeyChunks = 4 * Key::kChunks;  // of D = 96, half of every other is padding

  TQ4_HOST_DEVICE static constexpr int key_dim(int chunk) {
    return chunk / Key::kChunks * (Config::D / 4) + chunk % Key::kChunks * 16;
  }
  TQ4_HOST_DEVICE static constexpr int key_dims(int chunk) {
    const int rest = Config::D / 4 - chunk % Key::kChunks * 16;
    return rest < 16 ? rest : 16;
  }
  TQ4_HOST_DEVICE static constexpr int part(int token) {
    return token / Config::kPartTokens * Config::kPartBytes;
  }
  TQ4_HOST_DEVICE static constexpr int key_offset(int token, int chunk) {
    return part(token) +
           Key::offset(token % Config::kPartTokens, chunk / Key::kChunks, chunk % Key::kChunks);
  }
  TQ4_HOST_DEVICE static constexpr int value_offset(int token, int chunk) {
    return part(token) + Config::kValuePart +
           Config::Value::offset(token % Config::kPartTokens, chunk);
  }
  TQ4_HOST_DEVICE static constexpr int scale_offset(int token) {
    return part(token) + Config::kScalePart + token % Config::kPartTokens * Config::kScaleBytes;
  }
  // See unpack_tile for the mantissa bits.
  __device__ static __forceinline__ void write_scale(uint8_t* image, int token, float k_norm) {
    *reinterpret_cast<uint32_t*>(image + scale_offset(token)) = __float_as_uint(k_norm) & ~3u;
  }
};

}  // namespace tq4::sm80
