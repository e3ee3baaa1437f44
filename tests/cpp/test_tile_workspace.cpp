// csrc/device/tile_workspace.h: the tiles of a unit cover the keys that its queries see, every unit
// lies whole and alone in its pass, and the passes planned from shapes suffice for any lengths.
#include <algorithm>
#include <vector>

#include "check.h"
#include "device/tile_workspace.h"

namespace {

using tq4::test::Random;

void check_unit(int num_keys, int q_len, int window_left, int tile) {
  const tq4::UnitKeys unit = tq4::unit_keys(num_keys, q_len, window_left, tile);
  if (num_keys <= 0 || q_len <= 0) {
    CHECK(unit.tiles == 0);
    return;
  }
  int first = -1, last = -1;  // visible to some query, whatever the right window
  for (int key = 0; key < num_keys; ++key) {
    for (int position = num_keys - q_len; position < num_keys; ++position) {
      if (window_left >= 0 && key < position - window_left) continue;
      if (first < 0) first = key;
      last = key;
    }
  }
  CHECK(unit.begin % tile == 0 && unit.begin >= 0);
  CHECK(unit.begin <= first && first < unit.begin + tile);
  const int end = unit.begin + unit.tiles * tile;
  CHECK(last < end && end - tile <= last);
}

void check_batch(Random* random) {
  constexpr int kTile = 16, kTileBytes = 256;
  const int num_seqs = random->range(1, 9), heads = random->range(1, 5);
  const int max_keys = random->range(1, 200), window = random->range(-1, 60);
  const int64_t limit = int64_t{random->range(1, 400)} * kTileBytes + random->range(0, 255);
  tq4::TileWorkspace w =
      tq4::make_tile_workspace(num_seqs, heads, max_keys, kTile, kTileBytes, limit);
  const int64_t unit_tiles = tq4::ceil_div(max_keys, kTile);
  if (unit_tiles * kTileBytes > limit) {
    CHECK(w.num_passes == 0);
    return;
  }
  CHECK(w.num_passes >= 1 && w.capacity * w.tile_bytes <= limit);
  if (unit_tiles * heads * num_seqs * kTileBytes <= limit) CHECK(w.num_passes == 1);

  std::vector<std::vector<bool>> taken(w.num_passes, std::vector<bool>(w.capacity));
  int64_t before = 0;
  int last_pass = 0;
  const bool full = random->range(0, 3) == 0;
  for (int seq = 0; seq < num_seqs; ++seq) {
    const int num_keys = full ? max_keys : random->range(0, max_keys);
    const int q_len = random->range(0, std::max(1, num_keys));
    const tq4::UnitKeys unit = tq4::unit_keys(num_keys, q_len, full ? -1 : window, kTile);
    for (int head = 0; head < heads; ++head) {
      const tq4::UnitPlace place = tq4::unit_place(w, before, unit.tiles, heads, head);
      CHECK(place.pass >= last_pass && place.pass < w.num_passes);
      if (place.pass < 0 || place.pass >= w.num_passes) return;
      last_pass = place.pass;
      for (int tile = 0; tile < unit.tiles; ++tile) {
        const int64_t index = place.first_tile + tile;
        CHECK(index >= 0 && index < w.capacity);
        if (index < 0 || index >= w.capacity) return;
        CHECK(!taken[place.pass][index]);
        taken[place.pass][index] = true;
      }
    }
    before += unit.tiles;
  }
}

}  // namespace

int main() {
  Random random(5);
  for (int round = 0; round < 3000; ++round) {
    const int num_keys = random.range(0, 70);
    check_unit(num_keys, random.range(0, 70), random.range(-1, 30), 1 << random.range(2, 5));
  }
  for (int round = 0; round < 5000; ++round) check_batch(&random);

  // Counts beyond 32 bits; a window near its limit.
  const tq4::TileWorkspace w =
      tq4::make_tile_workspace(1 << 20, 128, 1 << 30, 64, 25088, tq4::kTileWorkspaceLimit);
  CHECK(w.num_passes == 0);
  CHECK(tq4::unit_keys(1 << 30, 1, 0x7fffffff, 64).begin == 0);
  return tq4::test::report("test_tile_workspace");
}
