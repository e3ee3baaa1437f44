// Which query tile a CTA of the prefill kernels works on.  Host-compilable.
//
// Sequence s owns rows [qsl[s] * G, qsl[s + 1] * G) of packed (token, head of the group) rows.  It
// is given the slots
//     first(s) = floor(qsl[s] * G / M) + s   ..   first(s + 1) - 1
// at least ceil(rows / M) of them (one more at most: those CTAs leave at once).  first() is
// strictly increasing and needs only qsl[s], so a CTA finds its sequence by binary search, and the
// number of slots, floor(T * G / M) + B, is known to the host from shapes alone.  Slots are handed
// out from the last to the first: under a causal mask the tiles with most keys start first.
// Sequences that decode takes keep their slots; nobody works on them.
#pragma once
#include <cstdint>

#include "common.cuh"

namespace tq4 {

TQ4_HOST_DEVICE int64_t prefill_slots(int64_t num_tokens, int group, int rows, int num_seqs) {
  return num_tokens * group / rows + num_seqs;
}

// Query tokens of a sequence as the prefill kernels see it: none where they are so few that decode
// takes them (AttentionParams::short_query_len).
TQ4_HOST_DEVICE int prefill_queries(const int32_t* query_start_loc, int seq, int short_query_len) {
  const int count = query_start_loc[seq + 1] - query_start_loc[seq];
  return count > short_query_len ? count : 0;
}

struct PrefillTile {
  int seq;        // -1: nothing to do
  int q_begin;    // first query token of the sequence
  int q_len;      // its query tokens
  int first_row;  // first packed row of the tile, counted from the sequence's own row 0
};

// First slot of a sequence.
TQ4_HOST_DEVICE int64_t first_slot(int query_begin, int seq, int group, int rows) {
  return divide(static_cast<int64_t>(query_begin) * group, rows) + seq;
}

// The largest sequence with first_slot <= slot.
TQ4_HOST_DEVICE int find_slot_sequence(const int32_t* query_start_loc, int num_seqs, int group,
                                       int rows, int64_t slot) {
  int lo = 0, hi = num_seqs - 1;
  while (lo < hi) {
    const int mid = (lo + hi + 1) / 2;
    if (first_slot(query_start_loc[mid], mid, group, rows) <= slot) {
      lo = mid;
    } else {
      hi = mid - 1;
    }
  }
  return lo;
}

// What there is to do in a slot of that sequence.
TQ4_HOST_DEVICE PrefillTile slot_tile(const int32_t* query_start_loc, int seq, int group, int rows,
                                      int short_query_len, int64_t slot) {
  const int begin = query_start_loc[seq];
  const int len = prefill_queries(query_start_loc, seq, short_query_len);
  const int64_t row = (slot - first_slot(begin, seq, group, rows)) * rows;
  if (row >= static_cast<int64_t>(len) * group) return {-1, 0, 0, 0};
  return {seq, begin, len, static_cast<int>(row)};
}

TQ4_HOST_DEVICE PrefillTile find_prefill_tile(const int32_t* query_start_loc, int num_seqs,
                                              int group, int rows, int short_query_len,
                                              int64_t slot) {
  return slot_tile(query_start_loc,
                   find_slot_sequence(query_start_loc, num_seqs, group, rows, slot), group, rows,
                   short_query_len, slot);
}

// Keys [begin, end) that at least one of the query positions [first_pos, last_pos] may see.
// Windows of -1 are unlimited; both are clamped so that sums stay within int32.
struct KeyRange {
  int begin, end;
};

constexpr int kMaxWindow = 1 << 30;

TQ4_HOST_DEVICE int window_or_max(int window) {
  return window < 0 || window > kMaxWindow ? kMaxWindow : window;
}

TQ4_HOST_DEVICE KeyRange visible_keys(int first_pos, int last_pos, int window_left,
                                      int window_right, int num_keys) {
  const int64_t begin = static_cast<int64_t>(first_pos) - window_or_max(window_left);
  const int64_t end = static_cast<int64_t>(last_pos) + window_or_max(window_right) + 1;
  KeyRange range;
  range.begin = begin < 0 ? 0 : static_cast<int>(begin);
  range.end = end > num_keys ? num_keys : static_cast<int>(end);
  return range;
}

}  // namespace tq4
