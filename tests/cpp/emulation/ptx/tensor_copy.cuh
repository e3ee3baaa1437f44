// CPU versions of csrc/ptx/tensor_copy.cuh.  A map is made by emulated_tensor_map().
#pragma once
#include <array>

#include "../device/tensor_map.h"
#include "bulk_copy.cuh"

namespace tq4::ptx {

// Bytes [sizes[3], sizes[2], sizes[1], sizes[0]], in elements of kMapElementBytes, with strides of
// the outer three; a box has box[2] x box[1] rows of box[0] bytes.
inline TensorMap emulated_tensor_map(const void* base, const std::array<uint64_t, 4>& sizes,
                                     const std::array<uint64_t, 3>& strides,
                                     const std::array<uint64_t, 3>& box) {
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0 || strides[0] % 16 != 0 || strides[1] % 16 != 0 ||
      strides[2] % 16 != 0 || sizes[0] % kMapElementBytes != 0 || box[0] % 16 != 0 ||
      box[0] / kMapElementBytes > 256 || box[1] > 256 || box[2] > 256)
    emulation::fail("misaligned tensor map");
  return {{reinterpret_cast<uint64_t>(base), sizes[0], sizes[1], sizes[2], sizes[3], strides[0],
           strides[1], strides[2], box[0], box[1], box[2]}};
}

inline void prefetch_tensor_map(const TensorMap&) {}

inline void tensor_copy_once_to_shared(uint32_t dst, const TensorMap& map, int x, int y, int z,
                                       int w, uint32_t barrier, uint64_t) {
  const auto& words = map.words;
  if (dst % 128 != 0 || x * kMapElementBytes % 16 != 0) emulation::fail("misaligned tensor copy");
  auto& machine = emulation::machine();
  static int queue = 0;
  const uint32_t bytes = static_cast<uint32_t>(words[8] * words[9] * words[10]);
  uint8_t* to = shared_pointer(dst, 16);
  shared_pointer(dst + bytes - 16, 16);
  machine.flying[200000 + queue++ % 100000].push_back([=] {
    for (uint64_t i = 0; i < bytes; ++i) {
      const uint64_t row = i / map.words[8];
      const uint64_t at[] = {x * kMapElementBytes + i % map.words[8], y + row % map.words[9],
                             z + row / map.words[9], static_cast<uint64_t>(w)};
      bool inside = true;
      uint64_t from = at[0];
      for (int d = 0; d < 4; ++d) {
        inside = inside && at[d] < map.words[1 + d];
        if (d > 0) from += at[d] * map.words[4 + d];
      }
      to[i] = inside ? reinterpret_cast<const uint8_t*>(map.words[0])[from] : 0;
    }
    auto& m = emulation::machine();
    emulation::Mbarrier& target = m.mbarrier(barrier);
    target.bytes -= bytes;
    m.finish_phase(target);
  });
}

}  // namespace tq4::ptx
