// csrc/device/query_split.h: every sequence is exactly one kernel's, whatever the lengths on the
// device turn out to be, and decode is only asked for what it can plan.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "device/prefill_schedule.cuh"
#include "device/query_split.h"
#include "layout.h"

namespace {

using tq4::test::Random;

tq4::AttentionParams problem(int head_dim, int group, bool int8, int block_size = 16) {
  constexpr int kHeads = 2;
  const int64_t row = tq4::token_bytes(kHeads, head_dim);
  tq4::AttentionParams p{};
  p.cache = tq4::token_major_view(nullptr, 64, kHeads, block_size, head_dim, block_size * row, row);
  p.num_q_heads = kHeads * group;
  p.int8 = int8;
  p.num_sms = 132;
  p.arch = 90;
  return p;
}

void check_threshold() {
  for (int head_dim : {64, 96, 128, 256}) {
    for (const bool int8 : {true, false}) {
      for (int group = 1; group <= 200; ++group) {
        tq4::AttentionParams p = problem(head_dim, group, int8);
        const int most = tq4::short_query_len(p);
        CHECK(most <= 1 || most * group <= tq4::kShortRows);
        CHECK((most + 1) * group > tq4::kShortRows);
        CHECK((most == 0) == (group > tq4::decode_row_limit(head_dim, int8)));
        p.num_seqs = 3;
        p.num_tokens = 7;
        p.max_query_len = most + (most == 0);
        bool planned = true;
        try {
          tq4::make_decode_plan(p, true);
        } catch (const std::invalid_argument&) {
          planned = false;
        }
        CHECK(planned == (most > 0));
        const int few = tq4::few_query_len(p);
        CHECK(few >= most && (few == most || few * group <= tq4::kFewRows));
        if (few > 0) {
          p.max_query_len = few;
          CHECK(tq4::make_decode_plan(p, true).max_rows == few * group);
          CHECK(!tq4::split_queries(p).has_prefill);
          p.max_query_len = few + 1;
          CHECK(tq4::split_queries(p).has_prefill);
        }
        tq4::AttentionParams portable = p;
        portable.path = tq4::Path::kPortable;
        CHECK(tq4::few_query_len(portable) == (int8 && head_dim <= 128 ? few : most));
        p.short_queries = tq4::ShortQueries::kPrefill;
        CHECK(tq4::short_query_len(p) == 0 && tq4::few_query_len(p) == 0);
      }
    }
  }
  CHECK(tq4::short_query_len(problem(128, 4, true)) == 4);
  CHECK(tq4::few_query_len(problem(128, 8, true)) == 8);
  // What decode cannot do at all.
  CHECK(tq4::short_query_len(problem(128, 4, true, 24)) == 0);
  tq4::AttentionParams p = problem(128, 4, true);
  p.num_sms = 0;
  CHECK(tq4::short_query_len(p) == 0);
}

void check_split(Random* random) {
  tq4::AttentionParams p = problem(128, random->range(1, 9), true);
  std::vector<int32_t> starts{0};
  const int num_seqs = random->range(1, 6), kind = random->range(0, 3);
  int longest = 0;
  for (int seq = 0; seq < num_seqs; ++seq) {
    const int count = kind == 0 ? 3 : random->range(0, kind == 1 ? 2 : 40);
    longest = std::max(longest, count);
    starts.push_back(starts.back() + count);
  }
  p.num_seqs = num_seqs;
  p.num_tokens = starts.back() + random->range(0, 2);  // padding rows
  p.max_query_len = random->range(0, 1) == 0 ? longest : p.num_tokens;
  p.query_start_loc = starts.data();
  const tq4::QuerySplit split = tq4::split_queries(p);
  CHECK(split.has_decode || split.has_prefill);
  tq4::DecodeBatch batch{};
  if (split.has_decode) {
    batch = tq4::decode_batch(split.decode, tq4::make_decode_plan(split.decode, true));
  }
  for (int seq = 0; seq < num_seqs; ++seq) {
    const int count = starts[seq + 1] - starts[seq];
    int taken = 0;
    if (split.has_decode) {
      taken += batch.num_queries(seq);
      CHECK(taken <= split.decode.max_query_len);
    }
    if (split.has_prefill) {
      taken += tq4::prefill_queries(starts.data(), seq, split.prefill.short_query_len);
    }
    CHECK(taken == count);
  }
}

void check_choices() {
  tq4::AttentionParams p = problem(128, 4, true);
  const auto split = [&](int num_seqs, int num_tokens, int max_query_len) {
    p.num_seqs = num_seqs, p.num_tokens = num_tokens, p.max_query_len = max_query_len;
    return tq4::split_queries(p);
  };
  tq4::QuerySplit s = split(8, 20, 4);  // none longer than decode takes
  CHECK(s.has_decode && !s.has_prefill && s.decode.short_query_len == 0);
  CHECK(s.decode.max_query_len == 4);
  s = split(8, 20, 0);  // padding rows only
  CHECK(s.has_decode && s.decode.max_query_len == 1);
  s = split(8, 128, 16);  // a few rows more, but of all of them
  CHECK(s.has_decode && !s.has_prefill && s.decode.max_query_len == 16);
  s = split(8, 136, 17);  // all of one length
  CHECK(!s.has_decode && s.has_prefill && s.prefill.short_query_len == 0);
  s = split(1, 20, 30);  // one sequence
  CHECK(!s.has_decode && s.has_prefill);
  s = split(64, 2111, 2048);
  CHECK(s.has_decode && s.has_prefill);
  CHECK(s.decode.max_query_len == 4 && s.decode.short_query_len == 4);
  CHECK(s.prefill.max_query_len == 2048 && s.prefill.short_query_len == 4);
  // Room for the queries of short sequences only, not for all tokens.
  CHECK(tq4::make_decode_plan(s.decode, true).query_rows == int64_t{64} * 4 * 8);
  s = split(1 << 20, INT32_MAX, INT32_MAX);  // products beyond 32 bits
  CHECK(s.has_decode && s.has_prefill);
}

}  // namespace

int main() {
  check_threshold();
  check_choices();
  Random random(6);
  for (int round = 0; round < 2000; ++round) check_split(&random);
  return tq4::test::report("test_query_split");
}
