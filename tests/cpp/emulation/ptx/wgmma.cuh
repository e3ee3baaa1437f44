// CPU versions of csrc/ptx/wgmma.cuh: the same fragment maps, descriptors and swizzles.  A product
// runs as late as it may, when its warp waits for it: whoever does not wait, or gives its operands
// in shared memory away before, is found out.
#pragma once
#include <type_traits>

#include "../intrinsics.h"
#include "mma.cuh"
#include "smem.cuh"

namespace tq4::ptx {

enum class WgmmaSwizzle : uint64_t { k128B = 1, k64B = 2 };

inline uint64_t wgmma_descriptor(uint32_t address, uint32_t leading, uint32_t stride,
                                 WgmmaSwizzle swizzle) {
  if ((address | leading | stride) % 16 != 0) emulation::fail("misaligned wgmma operand");
  return static_cast<uint64_t>(address >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | static_cast<uint64_t>(swizzle) << 62;
}

inline uint64_t wgmma_advance(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

inline void fence_shared_async() {}
inline void wgmma_fence() {}

namespace detail {

// What a thread has issued: not yet committed, and committed groups.
struct WgmmaQueue {
  std::vector<std::function<void()>> open;
  std::deque<std::vector<std::function<void()>>> groups;
};

inline WgmmaQueue& wgmma_queue() {
  static std::map<int, WgmmaQueue> queues;
  return queues[emulation::machine().thread_index()];
}

struct WgmmaOperand {
  uint32_t address, leading, stride, row_bytes;

  explicit WgmmaOperand(uint64_t descriptor)
      : address(static_cast<uint32_t>(descriptor & 0x3fff) << 4),
        leading(static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4),
        row_bytes(descriptor >> 62 == static_cast<uint64_t>(WgmmaSwizzle::k64B) ? 64 : 128) {}

  // The swizzle exchanges 16-byte chunks by bits of the address itself.
  uint32_t place(uint32_t linear) const { return linear ^ (linear >> 7) % (row_bytes / 16) << 4; }
  // Byte `byte` of the k step of row `row`.
  uint32_t k_major(int row, int byte) const {
    return place(address + row / 8 * stride + row % 8 * row_bytes + byte);
  }
  // Byte of column `column` (fp16) of row k.
  uint32_t mn_major(int column, int k) const {
    return place(address + column / 64 * leading + k / 8 * stride + k % 8 * row_bytes +
                 column % 64 * 2);
  }
};

}  // namespace detail

inline void wgmma_commit() {
  auto& queue = detail::wgmma_queue();
  queue.groups.push_back(std::move(queue.open));
  queue.open.clear();
}

template <int kPending>
void wgmma_wait() {
  auto& queue = detail::wgmma_queue();
  if (!queue.open.empty()) emulation::fail("a wait for products that were not committed");
  while (static_cast<int>(queue.groups.size()) > kPending) {
    for (const auto& product : queue.groups.front()) product();
    queue.groups.pop_front();
  }
}

template <typename T, int kCount>
void wgmma_hold(T (&)[kCount]) {}

// d[4 j + i]: row 16 w + g + 8 (i / 2), column 8 j + 2 t + i % 2.
template <int kRegs>
void wgmma_s8(int32_t (&d)[kRegs], uint64_t a, uint64_t b, bool accumulate) {
  const int lane = emulation::lane(), warp = emulation::machine().thread_index() / 32 % 4;
  int32_t* const result = d;
  detail::wgmma_queue().open.push_back([=] {
    const detail::WgmmaOperand rows(a), columns(b);
    for (int i = 0; i < kRegs; ++i) {
      const int row = 16 * warp + lane / 4 + i % 4 / 2 * 8;
      const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      int32_t sum = accumulate ? result[i] : 0;
      for (int k = 0; k < 32; k += 16) {
        const uint4 x = load_shared<uint4>(rows.k_major(row, k));
        const uint4 y = load_shared<uint4>(columns.k_major(column, k));
        const auto *p = reinterpret_cast<const int8_t*>(&x),
                   *q = reinterpret_cast<const int8_t*>(&y);
        for (int e = 0; e < 16; ++e) sum += p[e] * q[e];
      }
      result[i] = sum;
    }
  });
}

namespace detail {

// A in registers, B in shared memory, both of 16-bit elements.
template <bool kTransposed, typename ToFloat, int kRegs>
void multiply_rows(float (&d)[kRegs], const uint32_t (&a)[4], uint64_t b, bool accumulate, int kind,
                   ToFloat to_float) {
  const auto as = emulation::exchange(kind, a[0], a[1], a[2], a[3]);
  const int lane = emulation::lane();
  struct Rows {
    float of[2][16];  // rows g and g + 8
  } rows;
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < 16; ++k) {
      const uint64_t pair = as[lane / 4 * 4 + k % 8 / 2][half + 2 * (k / 8)];
      rows.of[half][k] = to_float(static_cast<uint16_t>(pair >> 16 * (k % 2)));
    }
  }
  float* const result = d;
  wgmma_queue().open.push_back([=] {
    const WgmmaOperand columns(b);
    for (int i = 0; i < kRegs; ++i) {
      const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      double sum = accumulate ? result[i] : 0.f;
      for (int k = 0; k < 16; ++k) {
        const uint32_t from =
            kTransposed ? columns.mn_major(column, k) : columns.k_major(column, 2 * k);
        sum += static_cast<double>(rows.of[i % 4 / 2][k]) * to_float(load_shared<uint16_t>(from));
      }
      result[i] = static_cast<float>(sum);
    }
  });
}

}  // namespace detail

template <bool kTransposed, int kRegs>
void wgmma_f16(float (&d)[kRegs], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  detail::multiply_rows<kTransposed>(d, a, b, accumulate, emulation::kMmaHalf,
                                     [](uint16_t bits) { return emulation::half_to_float(bits); });
}

template <bool kTransposed, int kRegs>
void wgmma_bf16(float (&d)[kRegs], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  detail::multiply_rows<kTransposed>(d, a, b, accumulate, emulation::kMmaBfloat, [](uint16_t bits) {
    return emulation::from_bits<float>(static_cast<uint32_t>(bits) << 16);
  });
}

}  // namespace tq4::ptx
