// Which sequences of a prefill go to the decode kernels: those of few query tokens.  A tile of
// prefill walks all keys of its sequence in one chain, whatever the number of its rows; decode
// splits the keys over the device.
//
// The host knows shapes and a bound of the lengths, not the lengths: where both kinds of sequence
// may occur both kinds of kernel are launched, and each leaves the other's sequences alone
// (AttentionParams::short_query_len).  So a captured graph stays right when lengths change.
//
// Host only; no CUDA here, tests/cpp checks it.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../params.h"
#include "decode_map.h"
#include "decode_plan.h"

namespace tq4 {

// Query rows of a KV head (query tokens times query heads of the group) up to which a sequence is
// decode's: those of one MMA tile, which share the unpacking of a key.  A sequence of one token
// always is, as far as decode takes its group.  With 8 rows single tokens would be faster (64 x 8K,
// 32/8 heads, H200: 0.18 ms where the plan is for 8 rows, 0.25 for 16, bench.py decode), and a few
// tokens a sequence, as in speculative decoding, would be left to prefill.
constexpr int kShortRows = 16;

// The same where all sequences of a call have so few, as when drafts are verified: nothing is
// planned for more rows than there are.  With 64 x 8K and 64/8 heads decode takes 0.28 ms for 32
// rows and 0.54 for 64, prefill 1.36; portable 0.42 and 1.35 (docs/tuning.md).
constexpr int kFewRows = 64;

// Most query tokens with which a sequence is decode's; 0: none is.
inline int short_query_len(const AttentionParams& p) {
  const PageView& view = p.cache;
  if (p.short_queries == ShortQueries::kPrefill) return 0;
  if (p.num_sms <= 0 || view.block_size % kTileTokens != 0) return 0;  // decode needs these
  const int group = p.num_q_heads / view.num_kv_heads;
  if (group < 1 || group > decode_row_limit(view.head_dim, p.int8)) return 0;
  return std::max(1, kShortRows / group);
}

// Most query tokens with which a call is decode's, if no sequence has more.
inline int few_query_len(const AttentionParams& p) {
  const int most = short_query_len(p);
  const bool portable = p.arch != 90 || p.path == Path::kPortable;
  // Portable fp16 keys, and D = 256, are no faster in decode.
  if (most == 0 || (portable && (!p.int8 || p.cache.head_dim == 256))) return most;
  const int group = p.num_q_heads / p.cache.num_kv_heads;
  return std::max(most, std::min(kFewRows, decode_row_limit(p.cache.head_dim, p.int8)) / group);
}

// The two parts of a prefill, with the division between them.
struct QuerySplit {
  bool has_decode, has_prefill;
  AttentionParams decode, prefill;
};

inline QuerySplit split_queries(const AttentionParams& p) {
  QuerySplit split{false, true, p, p};
  split.decode.short_query_len = split.prefill.short_query_len = 0;
  const int most = short_query_len(p);
  if (most == 0) return split;
  if (p.max_query_len <= few_query_len(p)) {  // all of them
    split.has_decode = true;
    split.has_prefill = false;
    split.decode.max_query_len = std::max(1, p.max_query_len);
  } else if (p.num_seqs > 1 && p.num_tokens < static_cast<int64_t>(p.num_seqs) * p.max_query_len &&
             static_cast<int64_t>(p.num_seqs) * most * p.num_q_heads < INT32_MAX) {
    // Not all of them have max_query_len query tokens.
    split.has_decode = true;
    split.decode.max_query_len = most;
    split.decode.short_query_len = split.prefill.short_query_len = most;
  }
  return split;
}

}  // namespace tq4
