// CPU versions of csrc/ptx/smem.cuh (what the emulated kernels use).
#pragma once
#include "../cuda_cpu.h"

namespace tq4::ptx {

inline uint8_t* shared_pointer(uint32_t address, int bytes) {
  const uint32_t offset = address - emulation::kSharedBase;
  if (address < emulation::kSharedBase || offset + bytes > emulation::kSharedBytes) {
    emulation::fail("shared memory access out of bounds");
  }
  if (offset % bytes != 0) emulation::fail("misaligned shared memory access");
  return emulation::machine().shared + offset;
}

template <typename T>
T load_shared(uint32_t address) {
  T value;
  std::memcpy(&value, shared_pointer(address, sizeof(T)), sizeof(T));
  return value;
}
template <typename T>
void store_shared(uint32_t address, const T& value) {
  std::memcpy(shared_pointer(address, sizeof(T)), &value, sizeof(T));
}

inline uint8_t* dynamic_shared() { return emulation::machine().shared; }
inline uint32_t smem_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - emulation::machine().shared) +
         emulation::kSharedBase;
}

inline uint4 ld_shared_v4(uint32_t address) { return load_shared<uint4>(address); }
inline uint2 ld_shared_v2(uint32_t address) { return load_shared<uint2>(address); }
inline uint32_t ld_shared_u32(uint32_t address) { return load_shared<uint32_t>(address); }
inline uint32_t ld_shared_u16(uint32_t address) { return load_shared<uint16_t>(address); }
inline float ld_shared_f32(uint32_t address) { return load_shared<float>(address); }
inline float4 ld_shared_v4f(uint32_t address) { return load_shared<float4>(address); }
inline void st_shared_v4(uint32_t address, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  store_shared(address, uint4{x, y, z, w});
}
inline void st_shared_v2(uint32_t address, uint32_t x, uint32_t y) {
  store_shared(address, uint2{x, y});
}
inline void st_shared_u32(uint32_t address, uint32_t x) { store_shared(address, x); }

inline uint32_t ld_shared_volatile(uint32_t address) { return load_shared<uint32_t>(address); }

// Lane l names row l % 8 of matrix l / 8 and receives column l / 4 of each, rows 2 (l % 4) and + 1.
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  uint64_t rows[32][4];
  std::memcpy(rows, emulation::exchange(emulation::kLdmatrixTrans, address), sizeof rows);
  const int column = emulation::lane() / 4, first = emulation::lane() % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    r[i] = 0;
    for (int e = 0; e < 2; ++e) {
      const uint32_t row = static_cast<uint32_t>(rows[8 * i + first + e][0]);
      if (row % 16 != 0) emulation::fail("misaligned ldmatrix row");
      r[i] |= static_cast<uint32_t>(load_shared<uint16_t>(row + 2 * column)) << (16 * e);
    }
  }
}

// Lands later, in the order of the thread's own copies.
template <int kBytes>
void cp_async(uint32_t dst, const void* src) {
  if (reinterpret_cast<uintptr_t>(src) % kBytes != 0) emulation::fail("misaligned cp.async");
  auto& machine = emulation::machine();
  uint8_t* to = shared_pointer(dst, kBytes);
  machine.flying[machine.thread_index()].push_back([=] { std::memcpy(to, src, kBytes); });
}

inline uint64_t read_once_policy() { return 0; }

template <int kBytes>
void cp_async_once(uint32_t dst, const void* src, uint64_t) {
  cp_async<kBytes>(dst, src);
}

inline void cp_async_once_line(uint32_t dst, const void* src, uint64_t) { cp_async<16>(dst, src); }

inline void cp_async_commit() {}

// Waits for all of the thread's copies, whatever the number allowed to be pending.
template <int kPending>
void cp_async_wait() {
  auto& machine = emulation::machine();
  machine.wait([&] { return machine.flying.count(machine.thread_index()) == 0; });
}

}  // namespace tq4::ptx
