// How decode splits the keys of a batch over a fixed grid.  Host-compilable; lengths are read on
// the device, so a captured graph may be replayed with other ones.
//
// Keys are counted in tiles of 16 tokens.  A work unit is one (sequence, chunk of KV heads, chunk
// of query rows); it has as many tiles as its sequence has visible ones, and costs `segment_cost`
// more: what a CTA spends on a unit besides its tiles.  All units laid end to end form one line of
// `total` positions,
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

// Tiles that at least one of the sequence's query tokens can see.  The last of them sees the last
// key whatever the window to the right.
TQ4_HOST_DEVICE TileRange visible_tiles(int num_keys, int num_queries, int window_left) {
  if (num_keys <= 0 || num_queries <= 0) return {0, 0};
  const int first_key = num_keys - num_queries - window_or_max(window_left);
  return {(first_key > 0 ? first_key : 0) / kTileTokens,
          static_cast<int>((static_cast<uint32_t>(num_keys) + kTileTokens - 1) / kTileTokens)};
}

// The batch as the scheduler sees it.
struct DecodeBatch {
  const int32_t* seq_lens;         // [B]
  const int32_t* query_start_loc;  // [B + 1], or null: one query token a sequence
  int32_t most_queries;            // sequences of more query tokens are left alone
  int32_t num_seqs;
  int32_t window_left;
  int32_t num_chunks;    // units of a sequence
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
    return visible_tiles(seq_lens[seq], num_queries(seq), window_left);
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

// Positions [begin, begin + length) of the line.
struct DecodeShare {
  int64_t begin;
  int32_t length;
};

// What a CTA takes.  With fewer positions than CTAs the first `total` CTAs take one each: a CTA
// without a position between two that share a unit would be a hole in the unit's partial results.
TQ4_HOST_DEVICE DecodeShare share_of(int64_t total, int cta, const DecodeShares& shares) {
  const int grid = static_cast<int>(shares.grid.divisor);
  int shift = 0;  // a very long line is dealt out in larger pieces, so that 32 bits suffice
  while (total >> shift > INT32_MAX / 2) ++shift;
  const int count = static_cast<int>(total >> shift);
  const int most = static_cast<int>(shares.grid.quotient(count)) - 1;  // leaves one
  const int late = most < shares.late_cost ? most : shares.late_cost;
  // all = a grid + b: all * cta / grid without 64 bits.
  const uint32_t all = count + late * (grid - shares.first_late);
  const uint32_t a = shares.grid.quotient(all), b = all - a * grid;
  const int early = cta - shares.first_late;  // late CTAs before this one, where not negative
  const uint32_t first = a * cta + shares.grid.quotient(b * cta);
  const uint32_t next = a * (cta + 1) + shares.grid.quotient(b * (cta + 1));
  int begin = static_cast<int>(first) - late * (early > 0 ? early : 0);
  int length = static_cast<int>(next - first) - (early >= 0 ? late : 0);
  if (count < grid) begin = cta < count ? cta : count, length = cta < count;
  DecodeShare share = {static_cast<int64_t>(begin) << shift, length << shift};
  if (cta + 1 == grid) share.length = static_cast<int32_t>(total - share.begin);
  return share;
}

// The tiles [tile_begin, tile_end) of one unit that one CTA computes.
struct DecodeSegment {
  int seq, chunk;
  int num_keys, num_queries, query_begin;  // of the sequence
  int tile_begin, tile_end;
  int begins_unit, ends_unit;  // whether it has the unit's first tile, and its last

  TQ4_HOST_DEVICE void describe(const DecodeBatch& batch) {
    num_keys = batch.seq_lens[seq];
    num_queries = batch.num_queries(seq);
    query_begin = batch.query_begin(seq);
  }
};

// Walks the segments of one CTA.  Positions count from the first of the share: 32 bits.
struct SegmentWalker {
  int32_t position;  // of the current unit; negative where it began before the share
  int32_t end;       // of the share
  int32_t seq, chunk;

  // Stands the walker before the first unit of the share: its sequence costs `cost`, and with all
  // before it `sum`, for each chunk.
  TQ4_HOST_DEVICE void enter(int cost, int sum, int64_t begin, int num_chunks) {
    int64_t at = static_cast<int64_t>(sum - cost) * num_chunks - begin;
    chunk = 0;
    // Whole units before the share are stepped over here: take() would see them as positions far
    // below zero.
    while (cost > 0 && at + cost <= 0 && chunk + 1 < num_chunks) {
      at += cost;
      ++chunk;
    }
    position = static_cast<int32_t>(at);
  }

  TQ4_HOST_DEVICE bool is_done(const DecodeBatch& batch) const {
    return position >= end || seq >= batch.num_seqs;
  }

  // Steps over the unit it stands at, whose tiles are `range`.  False when none of them is in the
  // share; else `segment` has what is known so far.
  TQ4_HOST_DEVICE bool take(const DecodeBatch& batch, TileRange range, DecodeSegment& segment) {
    const int tiles = range.end - range.begin;
    const int first = position + batch.segment_cost;  // of the unit's first tile
    const int lo = -first, hi = end - first;
    segment.tile_begin = range.begin + (lo < 0 ? 0 : lo < tiles ? lo : tiles);
    segment.tile_end = range.begin + (hi < 0 ? 0 : hi < tiles ? hi : tiles);
    segment.seq = seq;
    segment.chunk = chunk;
    segment.begins_unit = segment.tile_begin == range.begin;
    segment.ends_unit = segment.tile_end == range.end;
    position += batch.unit_cost(range);
    if (++chunk == batch.num_chunks) {
      chunk = 0;
      ++seq;
    }
    return segment.tile_begin < segment.tile_end;
  }
};

// The CTAs [begin, end) that have a segment of a unit, and so a partial result; all between do.
struct CtaRange {
  int begin, end;
};

}  // namespace tq4
