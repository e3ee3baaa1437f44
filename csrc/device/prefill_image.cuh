// The image of an unpacked tile (tile_expand.cuh) that the mma.sync prefill kernel reads: exactly
// one buffer of its shared memory, K tile | V tile | column scales.
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
  static constexpr int kScales = Config::kKeyBytes + Config::kValueBytes;

  TQ4_HOST_DEVICE static constexpr int key_dim(int chunk) {
    return chunk / Key::kChunks * (Config::D / 4) + chunk % Key::kChunks * 16;
  }
  TQ4_HOST_DEVICE static constexpr int key_dims(int chunk) {
    const int rest = Config::D / 4 - chunk % Key::kChunks * 16;
    return rest < 16 ? rest : 16;
  }
  TQ4_HOST_DEVICE static constexpr int key_offset(int token, int chunk) {
    return Key::offset(token, chunk / Key::kChunks, chunk % Key::kChunks);
  }
  TQ4_HOST_DEVICE static constexpr int value_offset(int token, int chunk) {
    return Config::kKeyBytes + Config::Value::offset(token, chunk);
  }
  // {norm, -magic * norm}, see unpack_tile for the mantissa bits.
  __device__ static __forceinline__ void write_scale(uint8_t* image, int token, float k_norm) {
    const float norm = __uint_as_float(__float_as_uint(k_norm) & ~3u);
    *reinterpret_cast<float2*>(image + kScales + 8 * token) = make_float2(norm, -kMagic * norm);
  }
};

}  // namespace tq4::sm80
