// csrc/device/swizzle.cuh: every map is a bijection into its tile, and the access patterns of the kernels
// touch eight different 16-byte banks per quarter-warp.
#include "device/swizzle.cuh"

#include <set>

#include "check.h"

namespace {

constexpr int kRows = 64;

int bank(int offset) { return offset / 16 % 8; }

template <int D>
void check_half_tile() {
  using Tile = tq4::HalfTile<D>;
  std::set<int> seen;
  for (int row = 0; row < kRows; ++row) {
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
      const int offset = Tile::offset(row, chunk);
      CHECK(offset % 16 == 0 && offset >= 0 && offset < kRows * Tile::kRowBytes);
      CHECK(seen.insert(offset).second);
    }
  }
  // ldmatrix: one chunk column of eight consecutive rows.
  for (int row = 0; row < kRows; row += 8) {
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
      std::set<int> banks;
      for (int i = 0; i < 8; ++i) banks.insert(bank(Tile::offset(row + i, chunk)));
      CHECK(banks.size() == 8);
    }
  }
  // Unpacking stores: rows 2i and 2i + 1, four neighbouring chunks.
  for (int row = 0; row < kRows; row += 2) {
    for (int chunk = 0; chunk + 4 <= Tile::kChunks; chunk += 4) {
      std::set<int> banks;
      for (int i = 0; i < 8; ++i) banks.insert(bank(Tile::offset(row + i / 4, chunk + i % 4)));
      CHECK(banks.size() == 8);
    }
  }
}

template <int D, int kElementBytes>
void check_key_tile() {
  using Tile = tq4::KeyTile<D, kElementBytes>;
  std::set<int> seen;
  for (int row = 0; row < kRows; ++row) {
    for (int quarter = 0; quarter < 4; ++quarter) {
      for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
        const int offset = Tile::offset(row, quarter, chunk);
        CHECK(offset % 16 == 0 && offset >= 0 && offset < kRows * Tile::kRowBytes);
        CHECK(seen.insert(offset).second);
      }
    }
  }
  // Fragment loads: two neighbouring rows, the four quarters, one chunk.
  for (int row = 0; row < kRows; row += 2) {
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
      std::set<int> banks;
      for (int i = 0; i < 8; ++i) banks.insert(bank(Tile::offset(row + i / 4, i % 4, chunk)));
      CHECK(banks.size() == 8);
    }
  }
}

template <int D>
void check_all() {
  check_half_tile<D>();
  check_key_tile<D, 1>();
  check_key_tile<D, 2>();
}

}  // namespace

int main() {
  check_all<64>();
  check_all<96>();
  check_all<128>();
  check_all<256>();
  return tq4::test::report("test_swizzle");
}
