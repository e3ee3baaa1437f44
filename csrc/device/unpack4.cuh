// TQ4 codes to tensor-core operands by byte permutes: 16-entry lookups held in registers.
//
// A packed word holds 8 codes: byte i = dim 2i in the HIGH nibble, dim 2i+1 in the LOW one.
// PRMT looks up 4 selectors in 8 bytes; a 16-entry table is two lookups over its halves and a
// third PRMT that picks per byte by bit 3 of the code.  Any codebook works: symmetry is not used.
//
//   int8  44 instructions per 32 codes.  Each 4-byte result holds dims in the order 1,0,3,2 (the
//         selector order of the nibbles); INT8 QK permutes q alike, so it costs nothing.
//   fp16  high and low bytes are looked up apart and interleaved: exact for any fp16 centroid,
//         natural order.
//
// Host-compilable: tests/cpp holds these against the plain table lookup.
#pragma once
#include <cstdint>

#include "common.cuh"

namespace tq4 {

// Byte permute with 3-bit selectors (PTX ISA: prmt.b32, default mode, msb of a selector clear).
TQ4_HOST_DEVICE uint32_t byte_select(uint32_t lo, uint32_t hi, uint32_t selector) {
#ifdef __CUDA_ARCH__
  uint32_t y;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(lo), "r"(hi), "r"(selector));
  return y;
#else
  const uint64_t bytes = (static_cast<uint64_t>(hi) << 32) | lo;
  uint32_t y = 0;
  for (int i = 0; i < 4; ++i) {
    const int which = (selector >> (4 * i)) & 7;
    y |= static_cast<uint32_t>((bytes >> (8 * which)) & 0xff) << (8 * i);
  }
  return y;
#endif
}

// 16 one-byte entries, entry i in byte i % 4 of word i / 4.
struct ByteTable {
  uint32_t w0, w1, w2, w3;
};

// Selectors of the 8 codes of a word; the low half serves codes of bytes 0-1, the high half 2-3.
struct NibbleSelectors {
  uint32_t entry;  // 3 low bits of each code
  uint32_t half;   // byte position, plus 4 where bit 3 of the code is set
};

TQ4_HOST_DEVICE NibbleSelectors nibble_selectors(uint32_t word) {
  return {word & 0x77777777u, ((word >> 1) & 0x44444444u) | 0x32103210u};
}

TQ4_HOST_DEVICE uint32_t lookup4(const ByteTable& table, uint32_t entry, uint32_t half) {
  const uint32_t lower = byte_select(table.w0, table.w1, entry);
  const uint32_t upper = byte_select(table.w2, table.w3, entry);
  return byte_select(lower, upper, half);
}

// 8 codes -> 8 int8: x0 holds dims 1,0,3,2 (byte 0 first), x1 dims 5,4,7,6.
TQ4_HOST_DEVICE void unpack_int8(uint32_t word, const ByteTable& table, uint32_t& x0,
                                        uint32_t& x1) {
  const NibbleSelectors s = nibble_selectors(word);
  x0 = lookup4(table, s.entry, s.half);
  x1 = lookup4(table, s.entry >> 16, s.half >> 16);
}

// 8 codes -> 8 fp16 in natural order, two to a word.
TQ4_HOST_DEVICE void unpack_fp16(uint32_t word, const ByteTable& high, const ByteTable& low,
                                        uint32_t (&out)[4]) {
  const NibbleSelectors s = nibble_selectors(word);
  const uint32_t h0 = lookup4(high, s.entry, s.half);
  const uint32_t l0 = lookup4(low, s.entry, s.half);
  const uint32_t h1 = lookup4(high, s.entry >> 16, s.half >> 16);
  const uint32_t l1 = lookup4(low, s.entry >> 16, s.half >> 16);
  // Looked-up bytes stand in the order dims 1,0,3,2: undone here by the choice of bytes.
  out[0] = byte_select(l0, h0, 0x4051);
  out[1] = byte_select(l0, h0, 0x6273);
  out[2] = byte_select(l1, h1, 0x4051);
  out[3] = byte_select(l1, h1, 0x6273);
}

}  // namespace tq4
