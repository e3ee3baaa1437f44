// Decode of short contexts: one kernel, no workspace.
//
// With few keys decode is latency: launches, look-ups, one trip to memory after the other, code
// that is fetched for the first time, partial results of all SMs for every row.  Here a cluster of
// CTAs has one (sequence, KV head), each CTA an equal share of its tiles, each warp the CTA's tiles
// in turn:
//
//   every warp       page ids -> copy of its first tile to a ring of its own
//   meanwhile        warp r rotates and quantises query row r; the others write the tables
//   tiles            as in decode_tile.cuh, nobody waits for anybody; two copies ahead
//   in the CTA       warp r sums row r over the warps' results, in shared memory
//   in the cluster   and sends the sum to CTA r, which adds up those of all CTAs; sink, LSE,
//                    rotation, output
//
// Copies are made by the copy engine.  Of a token-major page a head's codes are pieces of 64 bytes
// (D = 128) in rows 1,088 bytes apart (8 heads): a box of a tensor map, K's and V's of the tile,
// where cp.async would take the L1 a tag for each piece.  Its norms are a box of 16 bytes a row,
// those of 4 heads.  In a head-major page all four are contiguous.  Pages of other alignments go by
// cp.async.  Boxes of short rows are slow all the same, 0.6 ns a row whatever its length, and the
// lane that asks for one waits for its turn: hence no more copies than needed before the first tile
// is in work.  Warps that do nothing else but ask are slower still (docs/tuning.md).
//
// All sums in a fixed order.  Up to 8 query rows a KV head; rotations are Hadamard signs or none.
//
// Shared memory: pair table | ClusterShared | rings; the warps' results in the place of the rings.
#pragma once
#include <cstdint>
#include <type_traits>

#include "../params.h"
#include "../ptx/bulk_copy.cuh"
#include "../ptx/cluster.cuh"
#include "../ptx/dynamic_smem.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ptx/prefetch.cuh"
#include "../ptx/smem.cuh"
#include "../ptx/tensor_copy.cuh"
#include "common.cuh"
#include "decode_merge.cuh"
#include "decode_output.cuh"
#include "decode_plan.h"
#include "decode_query.cuh"
#include "decode_table.cuh"
#include "decode_tile.cuh"
#include "page_boxes.cuh"
#include "parameter_lines.cuh"
#include "tensor_map.h"
#include "warp.cuh"

namespace tq4 {

// kBoxes: tiles are copied in boxes of rows, else as plan.cluster_copy says.  A parameter, so that
// the one way's code does not lie in the other's when it is run through for the first time.
template <int D_, bool kBoxes_>
struct ClusterConfig {
  static constexpr int D = D_;
  static constexpr bool kBoxes = kBoxes_;
  static constexpr int kWarps = kClusterWarps, kThreads = kWarps * kWarpSize;
  static constexpr int kStages = kClusterStages;
  // Its steps: up to 8 rows with residuals, 16-byte aligned stages.
  using Steps = DecodeConfig<D, DecodeMode::kInt8Rows8, false, true>;
  static constexpr int kRows = Steps::kRows;
  static constexpr int kRowPitch = D + 4;  // of results, floats: rows 4 banks apart
  static constexpr int kTileBytes = cluster_tile_bytes(D);
};

template <class C>
struct ClusterShared {
  PlainKeyCodes::Tables codes;
  float scale[C::kRows];                         // of the query rows
  float value_unit;                              // of the pair table
  alignas(16) uint8_t query[2][C::kRows][C::D];  // codes, residuals
  float2 stats[C::kWarps][C::kRows];             // (m, l) of the warps' results
  uint64_t arrived;                              // of what the CTAs send
  uint64_t landed[C::kWarps][C::kStages];        // tiles in the warps' rings
  // From each CTA its sums of this CTA's rows, which are as far apart as the cluster is large.
  float2 sum_stats[kLargestCluster];
  alignas(16) float sums[kLargestCluster][C::kRowPitch];
  ParameterLines lines[C::kWarps];
};

// The tiles of one warp on their way to shared memory: tile i of the warp is tile first + kWarps i
// of the sequence.
template <class C>
struct ClusterTiles {
  int head;
  const int32_t* table;  // of the sequence
  int first, count;
  uint32_t ring, landed;  // shared addresses of the warp's ring and of its barriers
  int pages;              // lane i: the page of tile i, of the 32 tiles being copied

  // Entries past the last tile are garbage.
  __device__ __forceinline__ void find_pages(const DecodePlan& plan, int i) {
    const int own = i + static_cast<int>(threadIdx.x % kWarpSize);
    pages = own < count ? table[plan.block_divider.quotient(first + C::kWarps * own)] : 0;
  }

  // Starts the copies of tile i, if there is one, into a stage that all lanes have read.
  __device__ __forceinline__ void copy(const PageView& view, const PageMaps& maps,
                                       const DecodePlan& plan, int i) {
    if (i >= count) return;
    if (i > 0 && i % kWarpSize == 0) find_pages(plan, i);
    const int tile = first + C::kWarps * i;
    const int page = __shfl_sync(kFullWarp, pages, i % kWarpSize);
    const int token =
        (tile - static_cast<int>(plan.block_divider.quotient(tile)) * plan.tiles_per_block) *
        kTileTokens;
    const uint32_t dst = stage(i), barrier = landed + 8 * (i % C::kStages);
    if (!C::kBoxes && plan.cluster_copy == ClusterCopy::kPieces) {
      copy_pieces(view, plan, page, token, dst);
      ptx::mbarrier_arrive_on_cp_async(barrier);
    } else if (threadIdx.x % kWarpSize == 0) {
      ptx::mbarrier_arrive_expect_bytes(barrier, plan.copy.bytes);
      if constexpr (C::kBoxes) {
        copy_page_boxes(maps, plan.copy.stage, head * view.code_head_stride, cluster_norm_box(head),
                        page, token, dst, barrier);
      } else {
        copy_runs(view, plan.copy.stage, page, token, dst, barrier);
      }
    }
  }

  __device__ __forceinline__ uint32_t stage(int i) const {
    return ring + i % C::kStages * C::kTileBytes;
  }

  __device__ __forceinline__ void wait(int i) const {
    ptx::mbarrier_wait(landed + 8 * (i % C::kStages), i / C::kStages & 1);
  }

 private:
  // Of the tile's first token.
  __device__ __forceinline__ const uint8_t* find_codes(const PageView& view, int page,
                                                       int token) const {
    return view.base + page * view.block_stride +
           (token * view.code_token_stride + head * view.code_head_stride);
  }
  __device__ __forceinline__ const uint8_t* find_norms(const PageView& view, int page,
                                                       int token) const {
    return view.base + page * view.block_stride +
           (token * view.norm_token_stride + head * view.norm_head_stride);
  }

  __device__ __forceinline__ void copy_runs(const PageView& view, const StageView& place, int page,
                                            int token, uint32_t dst, uint32_t barrier) const {
    const uint8_t* codes = find_codes(view, page, token);
    const uint8_t* norms = find_norms(view, page, token);
    const auto run = [&](int to, const uint8_t* from, uint32_t bytes) {
      ptx::bulk_copy_once_to_shared(dst + to, from, bytes, barrier, ptx::read_once_policy());
    };
    run(place.k_codes, codes + view.k_codes, kTileTokens * C::D / 2);
    run(place.k_norms, norms + view.k_norms, kTileTokens * 4);
    run(place.v_codes, codes + view.v_codes, kTileTokens * C::D / 2);
    run(place.v_norms, norms + view.v_norms, kTileTokens * 4);
  }

  // By all lanes.
  __device__ __forceinline__ void copy_pieces(const PageView& view, const DecodePlan& plan,
                                              int page, int token, uint32_t dst) const {
    const StageView& place = plan.copy.stage;
    const uint8_t* codes = find_codes(view, page, token);
    const auto copy_codes = [&](auto bytes) {
      constexpr int kBytes = decltype(bytes)::value;
      constexpr int kPieces = C::D / 2 / kBytes, kCount = kTileTokens * kPieces;
#pragma unroll 1  // this function stands in the kernel three times
      for (int i = threadIdx.x % kWarpSize; i < 2 * kCount; i += kWarpSize) {
        const bool second = i >= kCount;  // V
        const int piece = second ? i - kCount : i;
        ptx::cp_async_once<kBytes>(dst + (second ? place.v_codes : place.k_codes) + piece * kBytes,
                                   codes + (second ? view.v_codes : view.k_codes) +
                                       piece / kPieces * view.code_token_stride +
                                       piece % kPieces * kBytes,
                                   ptx::read_once_policy());
      }
    };
    if (plan.copy.width == 16) {
      copy_codes(std::integral_constant<int, 16>{});
    } else if (plan.copy.width == 8) {
      copy_codes(std::integral_constant<int, 8>{});
    } else {
      copy_codes(std::integral_constant<int, 4>{});
    }
    const int own = threadIdx.x % kTileTokens;  // K norms by the first half of the warp
    const bool second = threadIdx.x % kWarpSize >= kTileTokens;
    ptx::cp_async<4>(dst + (second ? place.v_norms : place.k_norms) + 4 * own,
                     find_norms(view, page, token) + (second ? view.v_norms : view.k_norms) +
                         own * view.norm_token_stride);
  }
};

// The sum of row `row` to the CTA that writes it.
template <class C>
__device__ __forceinline__ void send_sum(ClusterShared<C>& shared, const RowSum<C::D>& sum,
                                         int rank, int size, int row) {
  using Sum = RowSum<C::D>;
  const int target = row % size, from = row / size * size + rank;
  const auto in_target = [&](const void* p) {
    return ptx::map_to_cta(ptx::smem_address(p), target);
  };
  const uint32_t arrived = in_target(&shared.arrived);
  const uint32_t sums = in_target(shared.sums[from]);
#pragma unroll
  for (int e = 0; e < Sum::kDims; e += Sum::kVector) {
    const uint32_t to = sums + 4 * Sum::dim(e);
    if constexpr (Sum::kVector == 4) {
      ptx::st_async_v4(to, arrived, sum.o[e], sum.o[e + 1], sum.o[e + 2], sum.o[e + 3]);
    } else {
      static_assert(Sum::kVector == 2, "head dimensions 64, 128 and 256");
      ptx::st_async_v2(to, arrived, sum.o[e], sum.o[e + 1]);
    }
  }
  if (threadIdx.x % kWarpSize == 0) {
    ptx::st_async_v2(in_target(&shared.sum_stats[from]), arrived, sum.m, sum.l);
  }
}

// A CTA's share of a sequence.
__device__ __forceinline__ TileRange cluster_share(TileRange tiles, int rank, int size) {
  const int count = tiles.end - tiles.begin;
  return {tiles.begin + count * rank / size, tiles.begin + count * (rank + 1) / size};
}

// The block table into L2 while the sequence's length is under way, which says what part of it is
// wanted: a line a lane of the last warp, which has no query row.
template <class C>
__device__ __forceinline__ void prefetch_table(const int32_t* table, int max_blocks, int rank,
                                               int size) {
  constexpr int kLine = 32;  // entries
  const int lane = static_cast<int>(threadIdx.x) - (C::kWarps - 1) * kWarpSize;
  const int entry = (lane * size + rank) * kLine;
  if (lane >= 0 && entry < max_blocks) ptx::prefetch_l2(table + entry);
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    decode_cluster_kernel(const __grid_constant__ AttentionParams p,
                          const __grid_constant__ DecodePlan plan,
                          const __grid_constant__ PageMaps maps) {
  using Steps = typename C::Steps;
  using Sum = RowSum<C::D>;
  uint8_t* bytes = ptx::dynamic_shared();
  auto& shared = *reinterpret_cast<ClusterShared<C>*>(bytes + kDecodeTableBytes);
  const uint32_t table = ptx::smem_address(bytes);
  const uint32_t rings =
      table + kDecodeTableBytes + round_up(static_cast<int>(sizeof(ClusterShared<C>)), 128);
  const int lane = threadIdx.x % kWarpSize, warp = warp_index();
  const int rank = static_cast<int>(ptx::cluster_rank()), size = plan.cluster;
  const ParameterLines lines = ParameterLines::touch(p, plan);
  const uint32_t arrived = ptx::smem_address(&shared.arrived);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(arrived, 1);
    ptx::mbarrier_fence_init();
    if constexpr (C::kBoxes) {
      ptx::prefetch_tensor_map(maps.codes);
      ptx::prefetch_tensor_map(maps.norms);
    }
  }
  ptx::cluster_arrive();
  const int unit = static_cast<int>(blockIdx.x) / size;
  const int seq = static_cast<int>(plan.chunk_divider.quotient(unit));
  const int32_t* block_table = p.block_table + seq * p.block_table_stride;
  prefetch_table<C>(block_table, p.max_blocks, rank, size);
  const float centroid = p.v_centroids[lane % 16];
  const auto key_entries = PlainKeyCodes::Tables::fetch(p);

  const int head = unit - seq * plan.heads_per_chunk;
  const DecodeBatch batch = decode_batch(p, plan);
  DecodeSegment segment{};
  segment.seq = seq;
  segment.describe(batch);
  const int num_rows = min(segment.num_queries * plan.group, plan.max_rows);

  // [1/5] The query row of this warp and what goes with it: loads first, all at once.
  const bool has_row = warp < num_rows;
  const int query = static_cast<int>(plan.group_divider.quotient(warp));
  QueryRow<C::D> row;
  float signs[QueryRow<C::D>::kDims];
  if (has_row) {
    row.load(static_cast<const uint16_t*>(p.q) + (segment.query_begin + query) * p.q_token_stride +
                 (head * plan.group + warp - query * plan.group) * p.q_head_stride,
             QueryRow<C::D>::is_aligned(p));
    QueryRow<C::D>::load_signs(p.q_rotation, signs);
  }

  // [2/5] Copy of the first tile.
  const TileRange range = visible_tiles(segment.num_keys, segment.num_queries, batch.window_left);
  const TileRange share = cluster_share(range, rank, size);
  ClusterTiles<C> tiles;
  tiles.head = head;
  tiles.table = block_table;
  tiles.first = share.begin + warp;
  tiles.count = (share.end - share.begin - warp + C::kWarps - 1) / C::kWarps;
  tiles.ring = rings + warp * C::kStages * C::kTileBytes;
  tiles.landed = ptx::smem_address(shared.landed[warp]);
  tiles.find_pages(plan, 0);
  if (lane == 0) {
    const int arrivals = !C::kBoxes && plan.cluster_copy == ClusterCopy::kPieces ? kWarpSize : 1;
#pragma unroll
    for (int i = 0; i < C::kStages; ++i) ptx::mbarrier_init(tiles.landed + 8 * i, arrivals);
    ptx::mbarrier_fence_init();
  }
  __syncwarp();  // the barriers are there
  tiles.copy(p.cache, maps, plan, 0);
  LaneOffsets at = make_lane_offsets<Steps>(plan.copy.stage, plan.token_map, 0);
  if constexpr (C::kBoxes) {
#pragma unroll
    for (uint32_t& norm : at.norm) norm += 4 * head - cluster_norm_box(head);
  }
  const auto unmasked = UnmaskedTiles::make(p, segment);

  // [3/5] Tables, by the warps without a query row, of which there are at least 8, and queries.
  const float key_unit = shared.codes.write(key_entries);
  if (has_row) {
    row.unpack(p.dtype);
    if (p.q_rotation != nullptr) row.rotate(signs);
    const float unit =
        row.write(DecodeMode::kInt8Rows8, &shared.query[0][0][0], &shared.query[1][0][0], warp);
    if (lane == 0) {
      shared.scale[warp] = score_scale<Steps>(unit * unit_scale(p, plan), key_unit);
    }
  } else {
    const float unit = write_pair_table(table, centroid, warp - num_rows, C::kWarps - num_rows);
    if (warp == num_rows && lane == 0) shared.value_unit = unit;
  }
  lines.keep(shared.lines);
  __syncthreads();  // tables and queries are there

  KeyCodes<Steps> key_codes{};
  key_codes.load(shared.codes);
  DecodeRows<Steps> rows;
  {
    const int own = max(0, min(lane / 4, num_rows - 1));  // rows past the last repeat it
    rows.scale[0] = shared.scale[own];
    rows.source = nullptr;
#pragma unroll
    for (int k = 0; k < Steps::kKeySteps; ++k) {
      uint32_t a[1][4];
      load_query<Steps>(shared.query[0][own], shared.query[1][own], k, a);
#pragma unroll
      for (int i = 0; i < 4; ++i) rows.q[k][0][i] = pinned(a[0][i]);
    }
  }
  DecodeState<Steps> state;
  state.clear();
  int copied = 1;
#pragma unroll 1
  for (int i = 0; i < tiles.count; ++i) {
    // One tile ahead and then two, the second to the stage of tile i - 1: the first tile is not to
    // wait for more copies to be asked for than the next one needs.
#pragma unroll 1
    for (; copied < min(i + C::kStages, 2 * i + 2); ++copied) {
      tiles.copy(p.cache, maps, plan, copied);
    }
    tiles.wait(i);
    consume_tile<Steps>(
        plan, tiles.stage(i), [] {}, table + 4 * lane, at, key_codes, rows, p.softcap,
        !unmasked.has(tiles.first + C::kWarps * i),
        [&] { return hidden_columns<Steps>(p, plan, segment, 0, tiles.first + C::kWarps * i); },
        state);
    __syncwarp();  // all lanes have read the tile
  }

  // [4/5] The sums of the CTA.
  const int own = rank + size * warp;  // the row that this warp writes
  const bool writes = own < num_rows;
  CombineRow out{};
  typename Sum::Vector row0[Sum::kDims / Sum::kVector] = {};
  if (writes) {
    const int query = static_cast<int>(plan.group_divider.quotient(own));
    const int q_head = head * plan.group + own - query * plan.group;
    out = find_row(
        p, plan, batch,
        static_cast<int64_t>(seq) * plan.seq_divider.divisor + query * p.num_q_heads + q_head);
    if (p.out_rotation != nullptr) Sum::load_signs(p.out_rotation, row0);
  }
  __syncthreads();  // all warps are done with their rings
  auto* results = reinterpret_cast<float*>(bytes + (rings - table));
  write_partial<Steps>(shared.stats[warp], results + warp * C::kRows * C::kRowPitch, C::kRowPitch,
                       0, num_rows, shared.value_unit, state);
  __syncthreads();  // all results are there
  Sum sum;
  if (has_row) {
    sum.sum_terms(
        C::kWarps, [&](int i) { return shared.stats[i][warp]; },
        [&](int i, int v) { return Sum::load(results + (i * C::kRows + warp) * C::kRowPitch, v); });
    ptx::cluster_wait();  // the barriers of all CTAs are there
    send_sum<C>(shared, sum, rank, size, warp);
  }

  // [5/5] The sums of the cluster.
  if (threadIdx.x == 0) {
    const int rows_here = num_rows > rank ? (num_rows - rank - 1) / size + 1 : 0;
    ptx::mbarrier_arrive_expect_bytes(arrived, rows_here * size * (C::D * 4 + 8));
  }
  if (!writes) return;
  ptx::mbarrier_wait(arrived, 0);  // all CTAs' sums are there
  sum.sum_terms(
      size, [&](int i) { return shared.sum_stats[warp * size + i]; },
      [&](int i, int v) { return Sum::load(shared.sums[warp * size + i], v); });
  sum.finish(p, out);
  if (out.surplus > 0) write_surplus<C::D>(p, out);
  if (p.out_rotation != nullptr) sum.transform(row0);
  sum.store(p, out.token * p.out_token_stride + out.head * p.out_head_stride, Sum::is_aligned(p));
}

}  // namespace tq4
