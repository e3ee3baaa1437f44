// How decode splits the keys of a batch over a fixed grid.  Host-compilable; lengths are read on
// the device, so a captured graph may be replayed with other ones.
//
// Keys are counted in tiles of 16 tokens.  A work unit is one (sequence, chunk of KV heads); it has
// as many tiles as its sequence has visible ones, and costs `segment_cost` more: what a CTA spends
// on a unit besides its tiles.  All units laid end to end form one line of `total` positions,
//
//      | c c t t t t t t | c c t t | c c t t t t t t t t t t t |      c = overhead, t = tile
//      ^ unit 0          ^ unit 1  ^ unit 2
//   CTA     0      |      1      |      2      |      3      |        equal shares
//
// of which CTA k takes [total k / grid, total (k + 1) / grid).  The tiles a CTA has of one unit are
// a segment and yield one partial result.  Segments in order of (CTA, unit) raise CTA + unit by at
// least one each, so CTA + unit numbers the partial results: at most grid + units - 1 of them.
#pragma once
#include <cstdint>

#include "common.cuh"
#include "prefill_schedule.cuh"

namespace tq4 {

constexpr int kTileTokens = 16;

struct TileRange {
  int begin, end;
};

// Tiles that at least one of the sequence's query tokens can see.
TQ4_HOST_DEVICE TileRange visible_tiles(int num_keys, int num_queries, int window_left,
                                        int window_right) {
  if (num_keys <= 0 || num_queries <= 0) return {0, 0};
  const KeyRange keys =
      visible_keys(num_keys - num_queries, num_keys - 1, window_left, window_right, num_keys);
  if (keys.begin >= keys.end) return {0, 0};
  return {keys.begin / kTileTokens, ceil_div(keys.end, kTileTokens)};
}

// The batch as the scheduler sees it.
struct DecodeBatch {
  const int32_t* seq_lens;         // [B]
  const int32_t* query_start_loc;  // [B + 1], or null: one query token a sequence
  int32_t most_queries;            // sequences of more query tokens are left alone
  int32_t num_seqs;
  int32_t window_left, window_right;
  int32_t num_chunks;    // chunks of KV heads: units of a sequence
  int32_t segment_cost;  // in tiles

  TQ4_HOST_DEVICE int query_begin(int seq) const {
    return query_start_loc == nullptr ? seq : query_start_loc[seq];
  }
  TQ4_HOST_DEVICE int num_queries(int seq) const {
    if (query_start_loc == nullptr) return 1;
    const int count = query_start_loc[seq + 1] - query_start_loc[seq];
    return count > most_queries ? 0 : count;
  }
  TQ4_HOST_DEVICE TileRange tiles(int seq) const {
    return visible_tiles(seq_lens[seq], num_queries(seq), window_left, window_right);
  }
  // Positions of one unit of the sequence.
  TQ4_HOST_DEVICE int unit_cost(TileRange range) const {
    return range.end > range.begin ? range.end - range.begin + segment_cost : 0;
  }
};

// How the line is shared out.  CTAs from `first_late` on find their SM occupied at first, and have
// lost the time of `late_cost` positions when they start.
struct DecodeShares {
  Divider grid;  // by the number of CTAs
  int32_t first_late, late_cost;
};

// First position of a CTA.  With fewer positions than CTAs the first `total` CTAs take one each: a
// CTA without a position between two that share a unit would be a hole in the unit's partial
// results.
TQ4_HOST_DEVICE int64_t share_begin(int64_t total, int cta, const DecodeShares& shares) {
  const int grid = static_cast<int>(shares.grid.divisor);
  if (total < grid) return cta < total ? cta : total;
  if (total > INT32_MAX / 2) return total * cta / grid;  // late or not makes no difference
  const int most =
      static_cast<int>(shares.grid.quotient(static_cast<uint32_t>(total))) - 1;  // leaves one
  const int late = most < shares.late_cost ? most : shares.late_cost;
  const int late_before = cta > shares.first_late ? cta - shares.first_late : 0;
  // all = a grid + b: all * cta / grid without 64 bits.
  const uint32_t all = static_cast<uint32_t>(total) + late * (grid - shares.first_late);
  const uint32_t a = shares.grid.quotient(all), b = all - a * grid;
  return static_cast<int64_t>(a) * cta + shares.grid.quotient(b * cta) - late * late_before;
}

// The tiles [tile_begin, tile_end) of one unit that one CTA computes.
struct DecodeSegment {
  int seq, chunk;
  int num_keys, num_queries, query_begin;  // of the sequence
  int tile_begin, tile_end;
  int begins_unit, ends_unit;  // whether it has the unit's first tile, and its last
};

// Walks the segments of one CTA.  Positions count from the first of the share: 32 bits.
struct SegmentWalker {
  int32_t position;  // of the current unit; negative where it began before the share
  int32_t end;       // of the share
  int32_t seq, chunk;

  // `start_seq` is the sequence whose positions hold the first of the share, `start_prefix` the sum
  // of unit_cost over the sequences before it.
  TQ4_HOST_DEVICE static SegmentWalker make(const DecodeBatch& batch, int64_t total, int cta,
                                            const DecodeShares& shares, int start_seq,
                                            int start_prefix) {
    const int64_t begin = share_begin(total, cta, shares);
    int64_t position = static_cast<int64_t>(start_prefix) * batch.num_chunks - begin;
    // Whole units before the share are stepped over here: next() would see them as positions far
    // below zero.
    SegmentWalker walker;
    walker.end = static_cast<int32_t>(share_begin(total, cta + 1, shares) - begin);
    walker.seq = start_seq;
    walker.chunk = 0;
    if (start_seq < batch.num_seqs) {
      const int cost = batch.unit_cost(batch.tiles(start_seq));
      while (cost > 0 && position + cost <= 0 && walker.chunk + 1 < batch.num_chunks) {
        position += cost;
        ++walker.chunk;
      }
    }
    walker.position = static_cast<int32_t>(position);
    return walker;
  }

  // False when the share is done.
  TQ4_HOST_DEVICE bool next(const DecodeBatch& batch, DecodeSegment& segment) {
    while (position < end && seq < batch.num_seqs) {
      const TileRange range = batch.tiles(seq);
      const int tiles = range.end - range.begin;
      const int first = position + batch.segment_cost;  // of the unit's first tile
      const int lo = -first, hi = end - first;
      segment.tile_begin = range.begin + (lo < 0 ? 0 : lo < tiles ? lo : tiles);
      segment.tile_end = range.begin + (hi < 0 ? 0 : hi < tiles ? hi : tiles);
      segment.seq = seq;
      segment.chunk = chunk;
      position += batch.unit_cost(range);
      if (++chunk == batch.num_chunks) {
        chunk = 0;
        ++seq;
      }
      if (segment.tile_begin < segment.tile_end) {
        segment.begins_unit = segment.tile_begin == range.begin;
        segment.ends_unit = segment.tile_end == range.end;
        segment.num_keys = batch.seq_lens[segment.seq];
        segment.num_queries = batch.num_queries(segment.seq);
        segment.query_begin = batch.query_begin(segment.seq);
        return true;
      }
    }
    return false;
  }
};

// The CTAs [begin, end) that have a segment of a unit, and so a partial result; all between do.
struct CtaRange {
  int begin, end;
};

}  // namespace tq4
