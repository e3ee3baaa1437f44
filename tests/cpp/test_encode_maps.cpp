// csrc/device/fragment_map.cuh, cell_table.cuh and common.cuh: what store and gather rest on.
#include <cmath>
#include <limits>
#include <set>

#include "cell_quantiser.h"
#include "check.h"
#include "device/common.cuh"
#include "device/fragment_map.cuh"

namespace {

using tq4::test::CellQuantiser;

template <int D>
void check_fragment_map() {
  using Map = tq4::FragmentMap<D>;
  std::set<int> inputs, codes, outputs;
  for (int step = 0; step < Map::kSteps; ++step) {
    for (int high = 0; high < 2; ++high) {
      for (int t = 0; t < 4; ++t) {
        for (int odd = 0; odd < 2; ++odd)
          CHECK(inputs.insert(Map::input_dim(step, high, t, odd)).second);
      }
    }
  }
  for (int tile = 0; tile < Map::kTiles; ++tile) {
    for (int t = 0; t < 4; ++t) {
      for (int odd = 0; odd < 2; ++odd) {
        const int code = Map::code_dim(tile, t, odd), output = Map::output_dim(tile, t, odd);
        CHECK(codes.insert(code).second && outputs.insert(output).second);
        CHECK(code / Map::kQuarter == t &&
              code % 2 == odd);                            // a lane owns its quarter's code bytes
        CHECK(output % 2 == odd && output % 32 / 8 == t);  // and chunk t of each 64 bytes
      }
    }
  }
  for (const std::set<int>& dims : {inputs, codes, outputs}) {
    CHECK(dims.size() == D && *dims.begin() == 0 && *dims.rbegin() == D - 1);
  }
  // A group of 32 dims is the same set on both sides of store: both of its shortcuts rest on this.
  for (int group = 0; group < Map::kGroups; ++group) {
    std::set<int> input_group, code_group;
    for (int i = 0; i < 16; ++i) {
      const int high = i >> 3, t = i >> 1 & 3, odd = i & 1;
      for (int s = 0; s < 2; ++s) input_group.insert(Map::input_dim(2 * group + s, high, t, odd));
    }
    for (int tile = 4 * group; tile < 4 * group + 4; ++tile) {
      for (int i = 0; i < 8; ++i) code_group.insert(Map::code_dim(tile, i >> 1, i & 1));
    }
    CHECK(input_group.size() == 32 && input_group == code_group);
  }
}

int count_below(const float* boundaries, float y) {
  int count = 0;
  for (int i = 0; i < 15; ++i) count += boundaries[i] < y ? 1 : 0;
  return count;
}

void check_cells() {
  // Midpoints of the 16-level Lloyd-Max quantiser of N(0, 1) (Max, 1960).
  const double normal[8] = {0.0, 0.2582, 0.5224, 0.7996, 1.0993, 1.4371, 1.8435, 2.4008};
  for (int head_dim : {64, 96, 128, 256}) {
    float boundaries[15];
    for (int i = 0; i < 8; ++i) {
      boundaries[7 + i] = static_cast<float>(normal[i] / std::sqrt(head_dim));
      boundaries[7 - i] = -boundaries[7 + i];
    }
    const CellQuantiser quantiser(boundaries);
    CHECK(quantiser.usable());
    const auto check = [&](float y) {
      const int low = count_below(boundaries, y - 1e-6f), high = count_below(boundaries, y + 1e-6f);
      CHECK(low <= quantiser.even(y) && quantiser.even(y) <= high);
      CHECK(low <= quantiser.odd(y) && quantiser.odd(y) <= high);
    };
    for (int i = -20000; i <= 20000; ++i) check(static_cast<float>(i) / 20000.f);
    for (float boundary : boundaries) {
      float y = boundary - 3e-6f;
      for (int i = 0; i < 200; ++i, y = std::nextafter(y, 1.f) + 1.5e-8f) check(y);
    }
    for (float y : {1e30f, -1e30f, std::numeric_limits<float>::infinity()}) check(y);
  }
  // Boundaries no table of cells can serve.
  float equal[15] = {}, backward[15], nan[15], close[15];
  for (int i = 0; i < 15; ++i) {
    backward[i] = -0.01f * i;
    nan[i] = i == 4 ? std::numeric_limits<float>::quiet_NaN() : 0.01f * i;
    close[i] = i < 14 ? 1e-4f * i : 0.5f;
  }
  for (const float* boundaries : {equal, backward, nan, close}) {
    CHECK(!CellQuantiser(boundaries).usable());
  }
}

void check_merges() {
  tq4::test::Random random(7);
  for (int round = 0; round < 5000; ++round) {
    uint32_t bytes[4], merged[4];
    for (int i = 0; i < 4; ++i) {
      const uint32_t even = static_cast<uint32_t>(random.next());
      const uint32_t odd = static_cast<uint32_t>(random.next());
      bytes[i] = (even >> 19 & 15) << 4 | (odd >> 15 & 15);
      merged[i] = tq4::merge_nibbles(even, odd);
      CHECK((merged[i] >> 15 & 0xff) == bytes[i]);
    }
    CHECK(tq4::merge_bytes(merged[0], merged[1], merged[2], merged[3]) ==
          (bytes[0] | bytes[1] << 8 | bytes[2] << 16 | bytes[3] << 24));
  }
}

void check_divider() {
  tq4::test::Random random(8);
  for (int round = 0; round < 20000; ++round) {
    const uint32_t wide = static_cast<uint32_t>(random.next() >> random.range(32, 63));
    const uint32_t divisor = round < 300 ? round + 1 : wide == 0 ? 0xffffffffu : wide;
    const tq4::Divider divider = tq4::Divider::make(divisor);
    const uint32_t near = static_cast<uint32_t>(random.next()) / divisor * divisor;
    for (const uint32_t n : {near, near + divisor - 1, near - 1, 0u, 0xffffffffu}) {
      CHECK(divider.quotient(n) == n / divisor);
    }
  }
  for (int i = 0; i < 8; ++i) {
    const uint32_t word = 0x76543210u;
    CHECK(tq4::nibble(word, i) == static_cast<uint32_t>(i ^ 1));  // even dims in the high nibbles
  }
}

}  // namespace

int main() {
  check_fragment_map<64>();
  check_fragment_map<96>();
  check_fragment_map<128>();
  check_fragment_map<256>();
  check_cells();
  check_merges();
  check_divider();
  return tq4::test::report("test_encode_maps");
}
