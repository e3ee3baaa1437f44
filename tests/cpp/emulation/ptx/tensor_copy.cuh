// CPU versions of csrc/ptx/tensor_copy.cuh.  A map is made by emulated_tensor_map().
#pragma once
#include <array>

#include "../device/tensor_map.h"
#include "bulk_copy.cuh"

namespace tq4::ptx {

// Bytes [sizes[2], sizes[1], sizes[0]], in elements of kMapElementBytes, with rows strides[0] and
// planes strides[1] apart; a box has box[1] rows of box[0] bytes.
inline TensorMap emulated_tensor_map(const void* base, const std::array<uint64_t, 3>& sizes,
                                     const std::array<uint64_t, 2>& strides,
                                     const std::array<uint64_t, 2>& box) {
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0 || strides[0] % 16 != 0 || strides[1] % 16 != 0 ||
      box[0] % 16 != 0 || box[0] / kMapElementBytes > 256 || box[1] > 256)
    emulation::fail("misaligned tensor map");
  return {{reinterpret_cast<uint64_t>(base), sizes[0], sizes[1], sizes[2], strides[0], strides[1],
           box[0], box[1]}};
}

inline void prefetch_tensor_map(const TensorMap&) {}

inline void tensor_copy_once_to_shared(uint32_t dst, const TensorMap& map, int x, int y, int z,
                                       uint32_t barrier, uint64_t) {
  const auto& w = map.words;
  if (dst % 128 != 0 || x * kMapElementBytes % 16 != 0) emulation::fail("misaligned tensor copy");
  auto& machine = emulation::machine();
  static int queue = 0;
  const uint32_t bytes = static_cast<uint32_t>(w[6] * w[7]);
  uint8_t* to = shared_pointer(dst, 16);
  shared_pointer(dst + bytes - 16, 16);
  machine.flying[200000 + queue++ % 100000].push_back([=] {
    for (uint64_t i = 0; i < bytes; ++i) {
      const uint64_t column = x * kMapElementBytes + i % w[6], row = y + i / w[6];
      const bool inside = column < w[1] && row < w[2] && static_cast<uint64_t>(z) < w[3];
      to[i] = inside ? reinterpret_cast<const uint8_t*>(w[0])[column + row * w[4] + z * w[5]] : 0;
    }
    auto& m = emulation::machine();
    emulation::Mbarrier& target = m.mbarrier(barrier);
    target.bytes -= bytes;
    m.finish_phase(target);
  });
}

}  // namespace tq4::ptx
