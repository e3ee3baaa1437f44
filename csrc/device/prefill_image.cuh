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
  // Of D = 96, half of every other chunk of keys and the last four of values are padding.
  static constexpr int kKeyChunks = 4 * Key::kChunks;
  static constexpr int kValueChunks = Config::Value::kRowBytes / 16;

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
  // See unpack_tile for the mantissa bits.  Zeros up to the end of the part: it is copied whole.
  __device__ static __forceinline__ void write_scale(uint8_t* image, int token, float k_norm) {
    auto* const scale = reinterpret_cast<uint32_t*>(image + scale_offset(token));
    *scale = __float_as_uint(k_norm) & ~3u;
    constexpr int kWords = (Config::kPartBytes - Config::kScalePart) / 4;
    static_assert(kWords % Config::kPartTokens == 0, "a part's tokens share in its padding");
#pragma unroll
    for (int i = Config::kPartTokens; i < kWords; i += Config::kPartTokens) scale[i] = 0;
  }
};

// The matrix that rotates the output, as rows of V (row = rotated dim): copied in parts, each to
// the place of an image.
template <typename Config>
struct RotationImage {
  static constexpr int kParts = ceil_div(Config::D, Config::kTile);
  static constexpr int kPartRows = Config::D / kParts;
  static constexpr int kPartBytes = kPartRows * Config::Value::kRowBytes;
  static constexpr int kBytes = kParts * kPartBytes;
  static_assert(kPartRows % 16 == 0 && kPartBytes <= Config::kBufferBytes, "parts fit the ring");

  // Writes chunks `first`, first + step, ... of all.
  __device__ static __forceinline__ void write(const float* rotation, uint8_t* image, int first,
                                               int step) {
    using Image = PrefillImage<Config>;
    constexpr int kChunks = Image::kValueChunks;
    for (int i = first; i < Config::D * kChunks; i += step) {
      const int row = i / kChunks, chunk = i % kChunks;
      uint32_t words[4] = {};
      if (chunk < Config::D / 8) {
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          const float2 v = __ldg(reinterpret_cast<const float2*>(rotation + row * Config::D +
                                                                 Image::rotation_dim(chunk, pair)));
          words[pair] = ptx::pack_f16x2(v.x, v.y);
        }
      }
      *reinterpret_cast<uint4*>(image + Config::Value::offset(row, chunk)) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
};

}  // namespace tq4::sm80
