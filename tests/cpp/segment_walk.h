// A CTA's segments in plain steps; the device walks them in decode_share.cuh.
#pragma once
#include <cstdint>

#include "device/decode_schedule.h"

namespace tq4::test {

// `start_seq` is the sequence whose positions hold the first of the share, `start_prefix` the sum
// of unit_cost over the sequences before it.
inline SegmentWalker start_walk(const DecodeBatch& batch, int64_t total, int cta,
                                const DecodeShares& shares, int start_seq, int start_prefix) {
  const DecodeShare share = share_of(total, cta, shares);
  SegmentWalker walker;
  walker.end = share.length;
  walker.seq = start_seq;
  const int cost = start_seq < batch.num_seqs ? batch.unit_cost(batch.tiles(start_seq)) : 0;
  walker.enter(cost, start_prefix + cost, share.begin, batch.num_chunks);
  return walker;
}

// False when the share is done.
inline bool next_segment(SegmentWalker& walker, const DecodeBatch& batch, DecodeSegment& segment) {
  while (!walker.is_done(batch)) {
    if (walker.take(batch, batch.tiles(walker.seq), segment)) {
      segment.describe(batch);
      return true;
    }
  }
  return false;
}

}  // namespace tq4::test
