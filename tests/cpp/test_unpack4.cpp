// csrc/device/unpack4.cuh: the permute-based unpacking equals sixteen-entry table lookups.
#include "device/unpack4.cuh"

#include "check.h"

namespace {

tq4::ByteTable make_table(const uint8_t (&entries)[16]) {
  uint32_t words[4] = {};
  for (int i = 0; i < 16; ++i) words[i / 4] |= static_cast<uint32_t>(entries[i]) << (8 * (i % 4));
  return {words[0], words[1], words[2], words[3]};
}

// Code of dimension `dim` of a packed word: even dimensions in the high nibble.
int code_of(uint32_t word, int dim) {
  const uint32_t byte = (word >> (8 * (dim / 2))) & 0xff;
  return dim % 2 == 0 ? byte >> 4 : byte & 15;
}

}  // namespace

int main() {
  tq4::test::Random random(1);
  constexpr int kOrder[8] = {1, 0, 3, 2, 5, 4, 7, 6};  // of unpack_int8's bytes
  for (int round = 0; round < 2000; ++round) {
    uint8_t high[16], low[16];
    for (int i = 0; i < 16; ++i) {
      high[i] = static_cast<uint8_t>(random.next());
      low[i] = static_cast<uint8_t>(random.next());
    }
    const uint32_t word = static_cast<uint32_t>(random.next());

    uint32_t x[2];
    tq4::unpack_int8(word, make_table(high), x[0], x[1]);
    for (int i = 0; i < 8; ++i) {
      CHECK(((x[i / 4] >> (8 * (i % 4))) & 0xff) == high[code_of(word, kOrder[i])]);
    }

    uint32_t halves[4];
    tq4::unpack_fp16(word, make_table(high), make_table(low), halves);
    for (int dim = 0; dim < 8; ++dim) {
      const uint32_t got = (halves[dim / 2] >> (16 * (dim % 2))) & 0xffff;
      const int code = code_of(word, dim);
      CHECK(got == (static_cast<uint32_t>(high[code]) << 8 | low[code]));
    }
  }
  return tq4::test::report("test_unpack4");
}
