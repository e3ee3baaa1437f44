// csrc/device/prefill_schedule.cuh: the slots cover every query row exactly once, those of short
// sequences where they are prefill's, and the range of keys of
// a tile is exactly what its rows can see.
#include <map>
#include <utility>
#include <vector>

#include "check.h"
#include "device/prefill_schedule.cuh"

namespace {

void check_tiles(const std::vector<int32_t>& query_start_loc, int group, int rows,
                 int short_query_len) {
  const int num_seqs = static_cast<int>(query_start_loc.size()) - 1;
  const int64_t slots = tq4::prefill_slots(query_start_loc.back(), group, rows, num_seqs);
  std::map<std::pair<int, int>, int> taken;
  for (int64_t slot = 0; slot < slots; ++slot) {
    const tq4::PrefillTile tile = tq4::find_prefill_tile(query_start_loc.data(), num_seqs, group,
                                                         rows, short_query_len, slot);
    if (tile.seq < 0) continue;
    CHECK(tile.seq < num_seqs);
    CHECK(tile.q_begin == query_start_loc[tile.seq]);
    CHECK(tile.q_len == query_start_loc[tile.seq + 1] - query_start_loc[tile.seq]);
    CHECK(tile.first_row % rows == 0 && tile.first_row < tile.q_len * group);
    ++taken[{tile.seq, tile.first_row}];
  }
  size_t expected = 0;
  for (int seq = 0; seq < num_seqs; ++seq) {
    const int queries = query_start_loc[seq + 1] - query_start_loc[seq];
    const int length = queries > short_query_len ? queries * group : 0;
    CHECK(tq4::prefill_queries(query_start_loc.data(), seq, short_query_len) * group == length);
    for (int row = 0; row < length; row += rows, ++expected) CHECK((taken[{seq, row}] == 1));
  }
  CHECK(taken.size() == expected);
}

void check_keys(int first, int last, int left, int right, int num_keys) {
  const tq4::KeyRange range = tq4::visible_keys(first, last, left, right, num_keys);
  int begin = -1, end = -1;
  for (int key = 0; key < num_keys; ++key) {
    for (int position = first; position <= last; ++position) {
      if (left >= 0 && key < position - left) continue;
      if (right >= 0 && key > position + right) continue;
      if (begin < 0) begin = key;
      end = key + 1;
    }
  }
  if (begin < 0) {
    CHECK(range.begin >= range.end);
  } else {
    CHECK(range.begin == begin && range.end == end);
  }
}

}  // namespace

int main() {
  tq4::test::Random random(2);
  for (int round = 0; round < 500; ++round) {
    std::vector<int32_t> query_start_loc{0};
    const int num_seqs = random.range(1, 12);
    for (int seq = 0; seq < num_seqs; ++seq) {
      const int length = random.range(0, 3) == 0 ? 0 : random.range(1, 90);
      query_start_loc.push_back(query_start_loc.back() + length);
    }
    for (int group : {1, 3, 4, 8}) {
      for (int rows : {16, 64, 128}) {
        for (int most : {0, 1, 16}) check_tiles(query_start_loc, group, rows, most);
      }
    }
  }
  for (int round = 0; round < 2000; ++round) {
    const int first = random.range(-20, 60);
    check_keys(first, first + random.range(0, 15), random.range(-1, 20), random.range(-1, 20),
               random.range(0, 60));
  }
  // Windows near the limits of int32 do not overflow.
  const tq4::KeyRange range = tq4::visible_keys(5, 9, 0x7fffffff, 0x7fffffff, 100);
  CHECK(range.begin == 0 && range.end == 100);
  return tq4::test::report("test_prefill_schedule");
}
