// The main kernel of decode, once for all architectures; how tiles reach shared memory is apart, in
// decode_pipeline.cuh.
//
//   decode_prepare   q_rot = q R^T, row scales, q8 and residual               -> workspace
//   decode_kernel    partial softmax(S) V' over this CTA's share of the keys  -> workspace
//   decode_combine   sum of the partials, sink, LSE, out = O R
//
// Rotations by butterflies have a prepare kernel of their own (decode_prepare_light.cuh).
//
// One CTA an SM takes an equal share of the batch's keys (decode_schedule.h) and all KV heads of a
// tile of 16 tokens at once, so that a page is copied whole: one run of Hkv * 16 * (D + 8) bytes.
//
//   warp kWarps          producer: block table -> page -> stage ring; several with cp.async, which
//                        take the tiles in turn
//   warps 0 .. kWarps-1  consumers: warp = team * slots + slot; a slot is a (KV head, row group) of
//                        the chunk, and teams take the tiles in turn
//
//   tile      0   1   2   3   4   5 ...      8 KV heads, 16 warps: slots = 8, teams = 2
//   team      0   1   0   1   0   1
//   stage     0   1   2   3   0   1          num_stages = 4
//
// Barriers, per stage: full (producer -> consumers: the tile has landed) and empty (the slots of
// the one team that read it -> producer: it may be overwritten).  At the end of a segment the
// active consumers meet to merge their teams (decode_merge.cuh); the producer runs ahead into the
// next segment meanwhile.
//
// Shared memory: pair table (32 KB; fp16 mode two) | barriers, scratch | merge exchange | stages
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../params.h"
#include "../ptx/dynamic_smem.cuh"
#include "../ptx/grid_dependency.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ptx/register_pool.cuh"
#include "decode_key_codes.cuh"
#include "decode_merge.cuh"
#include "decode_pipeline.cuh"
#include "decode_plan.h"
#include "decode_share.cuh"
#include "decode_step.cuh"
#include "decode_table.cuh"
#include "decode_tile.cuh"
#include "parameter_lines.cuh"
#include "pinned.cuh"
#include "rotation_fragments.cuh"
#include "warp.cuh"

namespace tq4 {

// Named barriers, besides kConsumerBarrier.
constexpr uint32_t kTableBarrier = 2;  // of all consumer warps: the tables are written
constexpr uint32_t kStartBarrier = 3;  // consumers -> producer: barriers (and pieces) are there

// [1/4] A producer warp: finds the CTA's share (decode_share.cuh), and for each of its tiles the
// page id (read 32 tiles at a time, one batch ahead), a free stage, the copy.  It shares its
// scheduler with consumers, so its instructions a tile bound the rate at which tiles arrive; and at
// the start nothing but the barriers' initialisation holds up the first copies.
//
// Where there are several, each walks the whole share for itself, and the first tells the
// consumers.
template <typename Pipeline>
__device__ __forceinline__ void produce(const AttentionParams& p, const DecodePlan& plan,
                                        const typename Pipeline::Maps& maps, DecodeShared& shared,
                                        ShareWalk& share, int producer, uint32_t stages) {
  const int lane = threadIdx.x % kWarpSize;
  const Pipeline pipeline{{p.cache, plan, shared, stages}};
  const DecodeBatch batch = decode_batch(p, plan);
  RingPosition ring{0, 0};
  ring.advance(producer, plan.num_stages);
  int skipped = producer;  // tiles until the next of this warp
  constexpr bool kAlone = Pipeline::kMostProducers == 1;
  const bool tells = kAlone || producer == 0;
  if (tells && lane == 0) shared.queue_end = {0, 0};  // read after next()'s barriers
  bool started = false;                               // a segment is under way
#pragma unroll 1
  while (true) {
    share.next(batch);
    // Read again where it is needed: registers are few.
    const DecodeSegment& segment = share.segment;
    const auto load_page = [&](int tile) {  // entries past the last tile are garbage
      if (tile >= reload(segment.tile_end)) return 0;
      return p.block_table[reload(segment.seq) * p.block_table_stride +
                           plan.block_divider.quotient(tile)];
    };
    int first = reload(segment.tile_begin);
    int next_page = load_page(first + lane);
    // The consumers are told of the segment, which takes its look-ups in memory, before its first
    // copy: they may have to free the stage for it.  But the CTA's first tiles go ahead of that.
    // Those are few, and the next wait until one has landed: with all stages of all SMs under way
    // at once, the look-ups and first tiles of every CTA queue behind them.
    bool told = !tells;
#pragma unroll 1
    while (true) {
      if (!told &&
          (started || first != reload(segment.tile_begin) || first == reload(segment.tile_end))) {
        shared.queue.push(batch, share.segment, shared.queue_end);
        told = true;
        if (kAlone && !started && first != reload(segment.tile_begin)) {  // first_tiles
          ptx::mbarrier_wait(pipeline.full(0), 0);
        }
      }
      if (first == reload(segment.tile_end)) break;
      const int most = told ? kWarpSize : min(kWarpSize, plan.first_tiles);
      const int count = min(most, reload(segment.tile_end) - first);
      const int page = next_page;
      next_page = load_page(first + count + lane);
      const int chunk = chunk_place(plan, reload(segment.chunk)).head_chunk;
      if (Pipeline::copies_tiles(plan)) {
        const int tile = first + lane;
        const int block = static_cast<int>(plan.block_divider.quotient(tile));
        pipeline.copy_tiles(maps, page, tile - block * plan.tiles_per_block, chunk, count, ring);
      } else if constexpr (!kAlone) {
#pragma unroll 1
        for (; skipped < count; skipped += plan.producers) {
          const int its_page = __shfl_sync(kFullWarp, page, skipped);
          const int tile = first + skipped;
          const int block = static_cast<int>(plan.block_divider.quotient(tile));
          pipeline.copy(true, its_page, tile - block * plan.tiles_per_block, chunk, ring);
          ring.advance(plan.producers, plan.num_stages);
        }
        skipped -= count;
      } else {
#pragma unroll 1
        for (int i = 0; i < count; i += pipeline.batch()) {
          const int mine = i + pipeline.lane_tile();  // the lane's tile of this step
          const int its_page = __shfl_sync(kFullWarp, page, mine % kWarpSize);
          const int block = static_cast<int>(plan.block_divider.quotient(first + mine));
          pipeline.copy(mine < min(count, i + pipeline.batch()), its_page,
                        first + mine - block * plan.tiles_per_block, chunk, ring);
          ring.advance(min(pipeline.batch(), count - i), plan.num_stages);
        }
      }
      first += count;
    }
    if (reload(segment.tile_begin) == reload(segment.tile_end)) break;  // no more
    started = true;
  }
}

// A Hadamard rotation of the output takes butterflies instead of a product.  All of R's entries say
// whether it is one: every CTA looks at its share of them when its last copy is under way.
template <int D>
__device__ __forceinline__ void check_output_rotation(const AttentionParams& p,
                                                      const DecodePlan& plan) {
  constexpr int kQuads = D / 4;  // float4 in a row
  if ((D & (D - 1)) != 0 || p.out_rotation == nullptr || p.out_signs) return;
  const auto* quads = reinterpret_cast<const uint4*>(p.out_rotation);
  const uint32_t corner = quads[0].x & kMagnitudeBits;
  uint32_t difference = 0;
#pragma unroll 1
  for (int i = blockIdx.x * kWarpSize + threadIdx.x % kWarpSize; i < D * kQuads;
       i += gridDim.x * kWarpSize) {
    const uint4 top = quads[i % kQuads];
    difference |= hadamard_difference(quads[i], top, i / kQuads, i % kQuads) |
                  magnitude_difference(top, corner);
  }
  ptx::wait_for_predecessor();  // decode_prepare has cleared the flag
  if (difference != 0) {
    *reinterpret_cast<int32_t*>(static_cast<uint8_t*>(p.workspace) + plan.dense_rotation) = 1;
  }
}

// [2/4] The lane's rows of one segment: quantised q and scales.  Rows past the last repeat it;
// nobody reads their results.
template <typename Config>
__device__ __forceinline__ void load_rows(const AttentionParams& p, const DecodePlan& plan,
                                          const DecodeSegment& segment, const ConsumerPlace& place,
                                          uint32_t fragments, DecodeRows<Config>& rows) {
  constexpr int kRowBytes = Config::kInt8 ? Config::D : 2 * Config::D;
  const int g = threadIdx.x % kWarpSize / 4;
  const auto* workspace = static_cast<const uint8_t*>(p.workspace);
  const auto* scales = reinterpret_cast<const float*>(workspace + plan.query_scale);
  const ChunkPlace unit = chunk_place(plan, segment.chunk);
  const int kv_head = unit.head_chunk * plan.heads_per_chunk + place.head;
  const int last = min(segment.num_queries * plan.group, plan.max_rows) - 1;
  const int first_query =  // in the workspace
      p.short_query_len > 0 ? segment.seq * p.short_query_len : segment.query_begin;
  constexpr int kSources = 2 * Config::kRowTiles;
  const uint8_t* source[kSources];
#pragma unroll
  for (int i = 0; i < kSources; ++i) {  // A rows g and g + 8
    const int octet = Config::kResidual ? 0 : i;
    const int row = min(unit.first_row + place.first_row + 8 * octet + g, last);
    const int query = static_cast<int>(plan.group_divider.quotient(row));
    const int64_t index = static_cast<int64_t>(first_query + query) * p.num_q_heads +
                          kv_head * plan.group + (row - query * plan.group);
    if (i < Config::kOctets) rows.scale[i] = score_scale<Config>(scales[index], place.key_unit);
    const int64_t codes = Config::kResidual && i == 1 ? plan.query_residual : plan.query_codes;
    source[i] = workspace + codes + index * kRowBytes;
  }
  rows.source = source[0];
  if constexpr (Config::kSharesQuery) {
    rows.fragments = fragments + threadIdx.x % kWarpSize * 16;
#pragma unroll
    for (int k = 0; k < Config::kKeySteps; ++k) {
#pragma unroll
      for (int tile = 0; tile < Config::kRowTiles; ++tile) {
        uint32_t a[1][4];
        load_query<Config>(source[2 * tile], source[2 * tile + 1], k, a);
        ptx::st_shared_v4(rows.fragments + 512 * (k * Config::kRowTiles + tile), a[0][0], a[0][1],
                          a[0][2], a[0][3]);
      }
    }
  }
  if constexpr (Config::kHoldsQuery) {
    constexpr int kStep = Config::kInt8 ? 1 : 2;
#pragma unroll
    for (int k = 0; k < Config::kKeySteps; k += kStep) {
#pragma unroll
      for (int tile = 0; tile < Config::kRowTiles; ++tile) {
        uint32_t a[kStep][4];
        load_query<Config>(source[2 * tile], source[2 * tile + 1], k, a);
#pragma unroll
        for (int i = 0; i < kStep * 4; ++i) {
          rows.q[k + i / 4][tile][i % 4] = pinned(a[i / 4][i % 4]);
        }
      }
    }
  }
}

// The stage of a team's tile: shared addresses of it and of its `full` barrier.
struct StageCursor {
  uint32_t full, stage;
  uint32_t parity;
  uint32_t full_end;

  template <typename Config>
  __device__ __forceinline__ static StageCursor make(const DecodePlan& plan, RingPosition ring,
                                                     int team, uint32_t smem) {
    const uint32_t full = smem + decode_shared_offset(Config::kMode) +
                          static_cast<uint32_t>(offsetof(DecodeShared, full));
    ring.advance(team, plan.num_stages);
    return {full + 8 * ring.stage, smem + plan.stage_offset + ring.stage * plan.copy.stage_bytes,
            ring.parity, full + 8 * plan.num_stages};
  }

  // To the team's next tile.  All stages of a team are multiples of the number of teams apart.
  __device__ __forceinline__ void advance(const DecodePlan& plan) {
    full += 8 * plan.teams;
    stage += plan.team_bytes;
    if (full >= full_end) {
      full -= 8 * plan.num_stages;
      stage -= plan.ring_bytes;
      parity ^= 1;
    }
  }
};

// [3/4] One segment: its tiles, team by team.
template <typename Config>
__device__ __forceinline__ void consume_segment(const AttentionParams& p, const DecodePlan& plan,
                                                const WarpScratch& scratch, uint32_t smem,
                                                uint32_t lane_table, const LaneOffsets& at,
                                                const KeyCodes<Config>& key_codes,
                                                DecodeState<Config>& state) {
  const DecodeSegment segment = reload(scratch.segment);
  const ConsumerPlace place = reload(scratch.place);
  StageCursor at_stage = StageCursor::make<Config>(plan, reload(scratch.ring), place.team, smem);
  int tile = segment.tile_begin + place.team;
  const int tile_end = segment.tile_end;
  constexpr uint32_t kEmpty = offsetof(DecodeShared, empty) - offsetof(DecodeShared, full);
  state.clear();
  if (chunk_place(plan, segment.chunk).first_row + place.first_row >=
      segment.num_queries * plan.group) {  // no rows: only keep the ring turning
    for (; tile < tile_end; tile += plan.teams) {
      ptx::mbarrier_wait(at_stage.full, at_stage.parity);
      if (threadIdx.x % kWarpSize == 0) ptx::mbarrier_arrive(at_stage.full + kEmpty);
      at_stage.advance(plan);
    }
    return;
  }

  DecodeRows<Config> rows;
  const uint32_t fragments = smem + decode_query_offset(Config::kMode) +
                             warp_index() * warp_query_bytes(Config::kMode, Config::D);
  load_rows<Config>(p, plan, segment, place, fragments, rows);
  const auto unmasked = UnmaskedTiles::make(p, segment);
  const int last = tile_end - unmasked.begin;  // the loop counts from the first unmasked tile
#pragma unroll 1
  for (tile -= unmasked.begin; tile < last; tile += plan.teams) {
    ptx::mbarrier_wait(at_stage.full, at_stage.parity);  // the tile has landed
    const uint32_t its_empty = at_stage.full + kEmpty;
    consume_tile<Config>(
        plan, at_stage.stage,
        [its_empty] {
          __syncwarp();  // all lanes have read the stage
          if (threadIdx.x % kWarpSize == 0) ptx::mbarrier_arrive(its_empty);
        },
        lane_table, at, key_codes, rows, p.softcap, static_cast<uint32_t>(tile) >= unmasked.count,
        [&] {
          const DecodeSegment its = reload(scratch.segment);
          const int first_row =
              chunk_place(plan, its.chunk).first_row + reload(scratch.place.first_row);
          return hidden_columns<Config>(p, plan, its, first_row,
                                        UnmaskedTiles::make(p, its).begin + tile);
        },
        state);
    at_stage.advance(plan);
  }
}

// [4/4] The teams' results become one, which goes to the workspace.
template <typename Config>
__device__ __forceinline__ void finish_segment(const AttentionParams& p, const DecodePlan& plan,
                                               WarpScratch& scratch, uint32_t exchange,
                                               DecodeState<Config>& state) {
  const ConsumerPlace place = reload(scratch.place);
  merge_teams<Config>({place.team, place.slot, plan.teams, plan.slots, exchange}, state);
  const DecodeSegment segment = reload(scratch.segment);
  const int count = min(segment.num_queries * plan.group, plan.max_rows) -
                    chunk_place(plan, segment.chunk).first_row - place.first_row;
  if (place.team == 0 && count > 0) {
    const int64_t unit = static_cast<int64_t>(segment.seq) * plan.num_chunks + segment.chunk;
    const int64_t first =
        ((blockIdx.x + unit) * plan.heads_per_chunk + place.head) * plan.rows_per_chunk +
        place.first_row;
    auto* workspace = static_cast<uint8_t*>(p.workspace);
    write_partial<Config>(reinterpret_cast<float2*>(workspace + plan.partial_stats),
                          reinterpret_cast<float*>(workspace + plan.partial_out), Config::D, first,
                          count, place.value_unit, state);
  }
  RingPosition ring = reload(scratch.ring);
  ring.advance((segment.tile_end - segment.tile_begin) % (2 * plan.num_stages), plan.num_stages);
  __syncwarp();  // all lanes have read the old position
  if (threadIdx.x % kWarpSize == 0) scratch.ring = ring;
}

// Which CTAs have a part of the segment's unit: for decode_combine, which may guess from it while
// this kernel still runs.
__device__ __forceinline__ void write_unit_range(const AttentionParams& p, const DecodePlan& plan,
                                                 const WarpScratch& scratch) {
  if (threadIdx.x % kWarpSize != 0) return;
  const ConsumerPlace place = reload(scratch.place);
  if (place.team != 0 || place.slot != 0) return;
  const DecodeSegment segment = reload(scratch.segment);
  auto* range = reinterpret_cast<CtaRange*>(static_cast<uint8_t*>(p.workspace) + plan.unit_ctas) +
                (static_cast<int64_t>(segment.seq) * plan.num_chunks + segment.chunk);
  if (segment.begins_unit) range->begin = blockIdx.x;
  if (segment.ends_unit) range->end = blockIdx.x + 1;
}

// What a consumer warp does before the consumers' barrier: its rows of the tables, its place.
template <typename Config>
__device__ __forceinline__ void write_tables(const AttentionParams& p, const DecodePlan& plan,
                                             DecodeShared& shared, uint32_t smem) {
  const int warp = warp_index();
  const int slot = warp % plan.slots;
  ConsumerPlace place{warp / plan.slots,
                      slot,
                      slot / plan.row_groups,
                      slot % plan.row_groups * Config::kRows,
                      1.f,
                      1.f};
  place.value_unit = write_pair_table(smem, p.v_centroids[threadIdx.x % 16], warp, Config::kWarps);
  if constexpr (Config::kSplitKeys) {
    place.key_unit = shared.split_codes.write(p);
  } else if constexpr (Config::kInt8) {
    place.key_unit = shared.plain_codes.write(p);
  } else {
    place.key_unit = write_pair_table(smem + kPairTableBytes, p.k_centroids[threadIdx.x % 16], warp,
                                      Config::kWarps);
  }
  if (threadIdx.x % kWarpSize == 0) shared.warps[warp].place = place;
}

template <typename Config>
__device__ __forceinline__ void consume(const AttentionParams& p, const DecodePlan& plan,
                                        DecodeShared& shared, uint32_t smem) {
  const uint32_t exchange = smem + decode_merge_offset(Config::kMode, Config::D);
  const uint32_t lane_table = smem + 4 * (threadIdx.x % kWarpSize);
  WarpScratch& scratch = shared.warps[threadIdx.x / kWarpSize];
  const ConsumerPlace place = reload(scratch.place);
  if (place.team >= plan.teams) return ptx::wait_for_predecessor();
  if (threadIdx.x % kWarpSize == 0) {  // read after pop()'s first barrier
    scratch.ring = {0, 0};
    scratch.queue = {0, 0};
  }

  KeyCodes<Config> key_codes{};
  if constexpr (Config::kSplitKeys) {
    key_codes.load(shared.split_codes);
  } else if constexpr (Config::kInt8) {
    key_codes.load(shared.plain_codes);
  }
  const LaneOffsets at = make_lane_offsets<Config>(plan.copy.stage, plan.token_map, place.head);
  bool found = shared.queue.pop(scratch.segment, scratch.queue);
  ptx::wait_for_predecessor();  // decode_prepare has written q
  for (; found; found = shared.queue.pop(scratch.segment, scratch.queue)) {
    write_unit_range(p, plan, scratch);
    DecodeState<Config> state;
    consume_segment<Config>(p, plan, scratch, smem, lane_table, at, key_codes, state);
    finish_segment<Config>(p, plan, scratch, exchange, state);
  }
}

// What the producer waits for before its first copy, by the first lane of each consumer warp.
template <typename Pipeline>
__device__ __forceinline__ void init_barriers(const DecodePlan& plan, DecodeShared& shared,
                                              int warps) {
  const int warp = warp_index();
  if (threadIdx.x % kWarpSize == 0) {
#pragma unroll 1
    for (int stage = warp; stage < plan.num_stages; stage += warps) {
      ptx::mbarrier_init(ptx::smem_address(&shared.full[stage]), Pipeline::kFullArrivals);
      ptx::mbarrier_init(ptx::smem_address(&shared.empty[stage]), plan.slots);
    }
    if (warp < SegmentQueue::kLength) shared.queue.init(warp, plan.slots * plan.teams);
    ptx::mbarrier_fence_init();
  }
  if (Pipeline::copies_pieces(plan)) {
#pragma unroll 1
    for (int piece = threadIdx.x; piece < plan.copy.num_pieces(); piece += warps * kWarpSize) {
      shared.pieces[piece] = plan.copy.piece(piece);
    }
  }
}

template <typename Config>
using DecodePipeline = std::conditional_t<Config::kBulk, BulkPipeline, CpAsyncPipeline>;

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    decode_kernel(const __grid_constant__ AttentionParams p,
                  const __grid_constant__ DecodePlan plan,
                  const __grid_constant__ typename DecodePipeline<Config>::Maps maps) {
  using Pipeline = DecodePipeline<Config>;
  constexpr int kConsumers = Config::kWarps * kWarpSize;
  static_assert(Config::kWarps >= SegmentQueue::kLength, "a warp for each barrier of the queue");
  uint8_t* bytes = ptx::dynamic_shared();
  auto& shared = *reinterpret_cast<DecodeShared*>(bytes + decode_shared_offset(Config::kMode));
  const uint32_t smem = ptx::smem_address(bytes);
  const int warp = warp_index();
  const int producers = Pipeline::kMostProducers == 1 ? 1 : plan.producers;
  const uint32_t starters = kConsumers + producers * kWarpSize;
  ptx::allow_dependent_launch();

  if (warp >= Config::kWarps) {
    if constexpr (Config::kMovesRegisters) ptx::give_registers<Config::kProducerRegisters>();
    const int producer = warp - Config::kWarps;
    if (producer < producers) {
      ShareWalk& share = shared.share[producer];
      share.begin(decode_batch(p, plan), plan.shares);
      ptx::named_barrier_sync(kStartBarrier, starters);  // the barriers are there
      produce<Pipeline>(p, plan, maps, shared, share, producer, smem + plan.stage_offset);
      if (producer == 0) check_output_rotation<Config::D>(p, plan);
    }
  } else {
    const ParameterLines lines = ParameterLines::touch(p, plan);
    init_barriers<Pipeline>(plan, shared, Config::kWarps);
    ptx::named_barrier_arrive(kStartBarrier, starters);
    write_tables<Config>(p, plan, shared, smem);
    lines.keep(shared.lines);
    if constexpr (Config::kMovesRegisters) ptx::take_registers<Config::kConsumerRegisters>();
    ptx::named_barrier_sync(kTableBarrier, kConsumers);
    consume<Config>(p, plan, shared, smem);
  }
}

}  // namespace tq4
