// Host side of decode: everything about a launch that follows from shapes, strides and the device.
// No CUDA here; tests/cpp checks it.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../params.h"
#include "decode_map.h"
#include "decode_schedule.h"
#include "page_copy.h"

namespace tq4 {

// Kinds of decode kernel.
//   kInt8Rows8    up to 8 query rows a warp; the other half of the A operand holds what rounding
//                 left of q, so that quantising q costs no accuracy
//   kInt8Rows16   16 rows share the unpacking of K and V; no residual.  Not at D = 256, where the
//                 accumulators would not fit in registers
//   kInt8Rows32   likewise 32, by warps of 232 registers (bulk pipeline)
//   kFp16Rows8    the exact mode (int8 = false): q as two fp16 terms, K in fp16
//   kInt8x2Rows8  the exact mode of the bulk pipeline: q and K as two INT8 terms each, no less
//                 exact than fp16, and little slower than kInt8Rows8
// More rows are further warps over the same keys.
enum class DecodeMode : int32_t {
  kInt8Rows8 = 0,
  kInt8Rows16 = 1,
  kFp16Rows8 = 2,
  kInt8x2Rows8 = 3,
  kInt8Rows32 = 4
};

constexpr DecodeMode decode_mode(int head_dim, int max_rows, bool int8, bool bulk) {
  if (!int8) return bulk ? DecodeMode::kInt8x2Rows8 : DecodeMode::kFp16Rows8;
  if (max_rows <= 8 || head_dim == 256) return DecodeMode::kInt8Rows8;
  return max_rows <= 16 || !bulk ? DecodeMode::kInt8Rows16 : DecodeMode::kInt8Rows32;
}

// Whether q is INT8 codes (and, with one octet, their residuals), else two fp16 terms.
TQ4_HOST_DEVICE constexpr bool has_int8_query(DecodeMode mode) {
  return mode != DecodeMode::kFp16Rows8;
}

// Whether keys are the INT8 codes of AttentionParams, with their scale; else the kernel makes what
// it needs from the centroids.
TQ4_HOST_DEVICE constexpr bool has_given_codes(DecodeMode mode) {
  return mode == DecodeMode::kInt8Rows8 || mode == DecodeMode::kInt8Rows16 ||
         mode == DecodeMode::kInt8Rows32;
}

TQ4_HOST_DEVICE constexpr int decode_octets(DecodeMode mode) {
  return mode == DecodeMode::kInt8Rows32 ? 4 : mode == DecodeMode::kInt8Rows16 ? 2 : 1;
}

constexpr int kRows32Warps = 8;
// Consumer warps of a CTA.  16 hide latency best, and need registers moved from the producer to the
// consumers (sm_90a): 112 a thread.  8 have 168.
constexpr int decode_warps(int head_dim, DecodeMode mode, bool bulk) {
  const bool fits = mode == DecodeMode::kInt8Rows8 || mode == DecodeMode::kInt8x2Rows8;
  return bulk && fits && head_dim <= 128 ? 16 : kRows32Warps;
}

// Query rows of a KV head that decode takes at most: beyond, prefill is faster.
constexpr int decode_row_limit(int head_dim, bool int8) {
  const DecodeMode mode = decode_mode(head_dim, 16, int8, false);
  return 8 * decode_octets(mode) * decode_warps(head_dim, mode, false);
}

// Decode of short contexts by clusters (decode_cluster.cuh).  How a head's tile is copied: as boxes
// of rows (token-major pages), as contiguous runs (head-major ones), or by cp.async in pieces of
// what alignment allows.
enum class ClusterCopy : int32_t { kBoxes = 0, kRuns = 1, kPieces = 2 };
constexpr int kSmallestCluster = 4, kLargestCluster = 16;  // CTAs
constexpr int kClusterWarps = 16, kClusterStages = 3;
// Beyond so many keys of a sequence, and of a CTA where clusters are small and many, what they save
// in latency is less than what the three kernels gain by equal shares for all SMs.
constexpr int64_t kClusterMostKeys = 16384, kClusterKeysPerCta = 1536;
constexpr int64_t cluster_key_limit(int size) {
  return size > 8 ? kClusterMostKeys : std::min(kClusterMostKeys, size * kClusterKeysPerCta);
}

// How many clusters of n CTAs, each of which fills an SM, run at the same time.  How many SMs a
// cluster can be spread over differs from part to part: of 132, 7 x 16, 9 x 9, 15 x 8, 17 x 6.
struct ClusterRoom {
  int clusters[kLargestCluster + 1];

  // The largest size of which so many run at the same time; 0: none.
  int largest_size(int64_t wanted) const {
    for (int size = kLargestCluster; size >= kSmallestCluster; --size) {
      if (clusters[size] >= wanted) return size;
    }
    return 0;
  }
};

// A stage, of one tile and KV head: K codes, V codes, K norms, V norms.  The copy engine takes
// norms from rows in boxes of 16 bytes, those of 4 heads.
constexpr int kNormBoxBytes = 16;
constexpr int kBoxesOfTile = 2;
constexpr int cluster_tile_bytes(int head_dim) {
  return kTileTokens * (head_dim + 2 * kNormBoxBytes);
}
// Bytes from the norm of head 0 to the box with that of `head`.
TQ4_HOST_DEVICE constexpr int cluster_norm_box(int head) {
  return head * 4 / kNormBoxBytes * kNormBoxBytes;
}

constexpr int kPrepareRows = 16;  // rows of q that a CTA of the prepare kernel takes at once

constexpr int kDecodeTableBytes = 256 * 128;  // pair table of one codebook (decode_table.cuh)
constexpr int kDecodeMaxStages = 64;
// Stages of the bulk pipeline take no more than this: six tiles of 8 KV heads and D = 128.  That is
// enough to hide the latency, and at the start, when all SMs fill their stages at once, the first
// look-ups of every CTA wait behind those copies: more bytes cost 1 to 6 % of a call.
constexpr int kDecodeBytesAhead = 6 * 17408;
constexpr int kFewestStages = 3;     // with fewer, rather fewer heads a CTA
constexpr int kBatchStages = 20;     // with so many stages, tiles are handled in batches
constexpr int kDecodeProducers = 4;  // warps with cp.async: 12 in all have 168 registers a thread
constexpr int kDecodeSharedBytes = 2 * 8 * kDecodeMaxStages + 4736;  // barriers and scratch
// Accumulator quads a lane exchanges at once (decode_merge.cuh): two barriers each time.  Bulk
// copies leave shared memory for more.
constexpr int merge_quads(bool bulk) { return bulk ? 8 : 4; }
// One sender's: its quads, then m and l of its rows, a word a lane.
TQ4_HOST_DEVICE constexpr int merge_area_bytes(bool bulk, int octets) {
  return (merge_quads(bulk) * 16 + 2 * octets * 4) * kWarpSize;
}

// Where the shared memory of the main kernel goes: tables, barriers and scratch, queries, merge
// exchange, stages.
TQ4_HOST_DEVICE constexpr int decode_shared_offset(DecodeMode mode) {
  return (has_int8_query(mode) ? 1 : 2) * kDecodeTableBytes;
}
// A fragments of q that do not fit in registers, of all warps.
TQ4_HOST_DEVICE constexpr int decode_query_offset(DecodeMode mode) {
  return decode_shared_offset(mode) + kDecodeSharedBytes;
}
TQ4_HOST_DEVICE constexpr int warp_query_bytes(DecodeMode mode, int head_dim) {
  return mode == DecodeMode::kInt8Rows32 ? 32 * head_dim : 0;
}
TQ4_HOST_DEVICE constexpr int decode_merge_offset(DecodeMode mode, int head_dim) {
  return decode_query_offset(mode) + kRows32Warps * warp_query_bytes(mode, head_dim);
}

// Shared memory of a CTA by compute capability, after opt-in.
inline int decode_smem_limit(int arch) {
  if (arch == 80 || arch == 87) return 163 * 1024;
  if (arch >= 90 && arch < 120) return 227 * 1024;
  return 99 * 1024;
}

// What the kernels get besides AttentionParams.
struct DecodePlan {
  TileCopy copy;
  TokenMap token_map;
  int32_t code_step, norm_step;  // bytes in a stage from a token of n-tile 0 to that of n-tile 1
  // From a token's K norm to its V norm, and to that of the token of n-tile 1.
  int32_t value_norms, value_norms_step;
  int32_t group;     // query heads of a KV head
  int32_t max_rows;  // query rows of a KV head: group * max_query_len
  DecodeMode mode;
  int32_t cluster;  // CTAs that share a (sequence, KV head); 0: the three kernels
  ClusterCopy cluster_copy;
  bool bulk;           // bulk copies; else cp.async
  bool wide;           // stage rows are aligned for vector loads
  bool overlapped;     // launches may overlap; set by launch_decode
  bool light_prepare;  // rows of q are rotated by butterflies, or not at all
  int32_t row_groups;  // warps that share a (KV head, tile)
  // Units of a sequence: KV heads and their rows in chunks, rows the inner of the two.
  int32_t heads_per_chunk, rows_per_chunk, row_chunks, num_chunks;
  int32_t slots;      // warps of a team: heads_per_chunk * row_groups
  int32_t teams;      // teams take the tiles in turn
  int32_t warps;      // consumer warps, slots * teams of them active
  int32_t producers;  // producer warps, which take the tiles in turn
  int32_t num_stages;
  int32_t team_bytes, ring_bytes;  // of a stage of each team, of all stages
  int32_t bulk_batch;   // tiles that the producer handles at once, a lane each; 1: a lane a run
  int32_t whole_tiles;  // a tile is one bulk copy, and they are handled one by one
  int32_t boxes;        // a tile is boxes of a tensor map: K codes, K norms, V codes, V norms
  int32_t first_tiles;  // that a CTA copies before it has seen the first of them land
  int32_t tiles_per_block;
  Divider block_divider;  // by tiles_per_block
  int32_t segment_cost;
  int32_t prepare_grid;
  int32_t grid;
  DecodeShares shares;
  // For the combine kernel: by max_query_len * num_q_heads, num_q_heads, group, heads_per_chunk.
  Divider seq_divider, query_divider, group_divider, chunk_divider;
  Divider row_divider, row_chunk_divider;  // by rows_per_chunk, row_chunks
  int32_t stage_offset, smem_bytes;        // shared memory
  // Rows of q in the workspace, Hq a token: T tokens or, where only sequences of up to
  // short_query_len tokens count, so many for each of B sequences, used or not.
  int64_t query_rows;
  // Workspace, byte offsets.
  int64_t query_codes;     // INT8: int8 [query_rows, D]; fp16: fp16 [query_rows, D]
  int64_t query_residual;  // the same of what rounding left; one octet only
  int64_t query_scale;     // fp32 [query_rows]: log2 units of one unit of norm * (q . k)
  int64_t dense_rotation;  // int32: not 0 if out_rotation is no Hadamard matrix
  int64_t unit_ctas;       // CtaRange [B, num_chunks]
  int64_t partial_stats;   // float2 {m, l} [partials, heads_per_chunk, rows_per_chunk]
  int64_t partial_out;     // fp32 [partials, heads_per_chunk, rows_per_chunk, D]
  int64_t workspace_bytes;
};

// Where the heads and rows of a unit begin.
struct ChunkPlace {
  int head_chunk, first_row;
};

TQ4_HOST_DEVICE ChunkPlace chunk_place(const DecodePlan& plan, int chunk) {
  const int head_chunk = static_cast<int>(plan.row_chunk_divider.quotient(chunk));
  return {head_chunk, (chunk - head_chunk * plan.row_chunks) * plan.rows_per_chunk};
}

TQ4_HOST_DEVICE DecodeBatch decode_batch(const AttentionParams& p, const DecodePlan& plan) {
  const int most_queries = p.short_query_len > 0 ? p.short_query_len : INT32_MAX;
  return {p.seq_lens,    p.query_start_loc, most_queries,     p.num_seqs,
          p.window_left, plan.num_chunks,   plan.segment_cost};
}

// Whether a lane's codes can be read by vector loads of DecodeMap's alignment.
inline bool is_wide(const StageView& stage, int head_dim) {
  const int key_align = head_dim >= 128 ? 16 : 8, value_align = head_dim >= 128 ? 8 : 4;
  return (stage.k_codes | stage.code_token_stride | stage.code_head_stride) % key_align == 0 &&
         stage.v_codes % value_align == 0;
}

// Whether there are kernels for rows of other alignments.  The smaller head dimensions need none:
// rows as they lie in a page are always aligned enough.
constexpr bool reads_unaligned(int head_dim) { return head_dim >= 128; }

// Lowers a page view to runs of bytes.  With `merge`, neighbouring fields and rows become one run:
// a page whose 16 tokens lie back to back is a single run, whatever the layout.  Without, each
// field is placed on its own, aligned for vector loads.
inline TileCopy make_tile_copy(const PageView& view, int heads_per_chunk, bool merge) {
  const int codes = view.head_dim / 2;
  const int num_chunks = view.num_kv_heads / heads_per_chunk;
  const int tiles_per_block = view.block_size / kTileTokens;
  const bool token_major = is_token_major(view);
  const bool head_major = view.code_token_stride == codes && view.norm_token_stride == 4;
  if (token_major ? view.code_head_stride != codes || view.norm_head_stride != 4
                  : !head_major || view.code_head_stride != view.norm_head_stride) {
    throw std::invalid_argument("cache: a page view is token-major or head-major");
  }

  TileCopy copy{};
  CopyRun fields[4];  // K codes, V codes, K norms, V norms
  const int starts[4] = {view.k_codes, view.v_codes, view.k_norms, view.v_norms};
  for (int i = 0; i < 4; ++i) {
    const int element = i < 2 ? codes : 4;  // bytes of a token and head
    CopyRun& field = fields[i];
    field.src = starts[i];
    if (token_major) {
      field.bytes = heads_per_chunk * element;
      field.tile_stride = kTileTokens * view.code_token_stride;
      field.chunk_stride = field.bytes;
    } else {
      field.bytes = kTileTokens * element;
      field.tile_stride = field.bytes;
      field.chunk_stride = heads_per_chunk * view.code_head_stride;
    }
  }
  copy.reps = token_major ? kTileTokens : heads_per_chunk;
  copy.src_stride = token_major ? view.code_token_stride : view.code_head_stride;

  // Runs in order of address; a field that starts where the one before ends joins its run, unless
  // later tiles or chunks would tear them apart.
  int order[4] = {0, 1, 2, 3};
  std::sort(order, order + 4, [&](int a, int b) { return fields[a].src < fields[b].src; });
  int run_of[4];
  const bool one_chunk = num_chunks == 1, one_tile = tiles_per_block == 1;
  for (int i : order) {
    const CopyRun& field = fields[i];
    if (copy.num_runs > 0) {
      CopyRun& last = copy.run[copy.num_runs - 1];
      const bool same_tiles = one_tile || last.tile_stride == field.tile_stride;
      // Token-major chunks move codes and norms by different amounts.
      const bool same_chunks = one_chunk || !token_major;
      if (merge && last.src + last.bytes == field.src && same_tiles && same_chunks) {
        last.bytes += field.bytes;
        run_of[i] = copy.num_runs - 1;
        continue;
      }
    }
    run_of[i] = copy.num_runs;
    copy.run[copy.num_runs++] = field;
  }
  int span = 0;
  for (int i = 0; i < copy.num_runs; ++i) {
    copy.run[i].dst = span;
    // A whole merged row keeps its own length, so that it may merge with the next row.
    span += copy.num_runs == 1 && copy.src_stride == copy.run[i].bytes
                ? copy.run[i].bytes
                : round_up(copy.run[i].bytes, 16);
  }
  copy.dst_stride = span;
  copy.bytes = 0;
  for (int i = 0; i < copy.num_runs; ++i) copy.bytes += copy.reps * copy.run[i].bytes;
  copy.stage_bytes = round_up(copy.reps * span, 128);

  int at[4];
  for (int i = 0; i < 4; ++i) {
    at[i] = copy.run[run_of[i]].dst + (fields[i].src - copy.run[run_of[i]].src);
  }
  StageView& stage = copy.stage;
  stage.k_codes = at[0];
  stage.v_codes = at[1];
  stage.k_norms = at[2];
  stage.v_norms = at[3];
  stage.code_token_stride = token_major ? copy.dst_stride : codes;
  stage.code_head_stride = token_major ? codes : copy.dst_stride;
  stage.norm_token_stride = token_major ? copy.dst_stride : 4;
  stage.norm_head_stride = token_major ? 4 : copy.dst_stride;

  if (copy.num_runs == 1 && copy.src_stride == copy.run[0].bytes) {
    copy.run[0].bytes *= copy.reps;
    copy.reps = 1;
  }

  uint64_t all = reinterpret_cast<uintptr_t>(view.base) | static_cast<uint64_t>(view.block_stride);
  if (copy.reps > 1) all |= static_cast<uint64_t>(copy.src_stride | copy.dst_stride);
  copy.width = 16;
  for (int i = 0; i < copy.num_runs; ++i) {
    CopyRun& run = copy.run[i];
    uint64_t bits = all | static_cast<uint64_t>(run.src | run.dst | run.bytes);
    if (!one_tile) bits |= static_cast<uint64_t>(run.tile_stride);
    if (!one_chunk) bits |= static_cast<uint64_t>(run.chunk_stride);
    run.width = bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : 4;
    run.row = Divider::make(static_cast<uint32_t>(run.bytes / run.width));
    copy.width = std::min(copy.width, run.width);
  }
  return copy;
}

// Shared-memory wavefronts of one warp load of `width` bytes a lane: 128 bytes at a time, lanes in
// groups of 128 / width, one more for every further word on the same bank.
inline int shared_wavefronts(const std::array<int, 32>& address, int width) {
  const int lanes = std::min(32, 128 / width);
  int total = 0;
  for (int begin = 0; begin < 32; begin += lanes) {
    int words[32][32], count[32] = {}, worst = 1;  // distinct words of each bank
    for (int lane = begin; lane < begin + lanes; ++lane) {
      for (int byte = 0; byte < width; byte += 4) {
        const int word = (address[lane] + byte) / 4, bank = word % 32;
        int* end = words[bank] + count[bank];
        if (std::find(words[bank], end, word) != end) continue;
        *end = word;
        worst = std::max(worst, ++count[bank]);
      }
    }
    total += worst;
  }
  return total;
}

// Wavefronts of the loads of K, V and norms of one tile and head.
template <int D>
inline int tile_wavefronts(const StageView& stage, const TokenMap& map) {
  using Map = DecodeMap<D>;
  std::array<int, 32> address;
  int total = 0;
  const auto add = [&](int width, auto&& offset) {
    for (int lane = 0; lane < 32; ++lane) address[lane] = offset(lane / 4, lane % 4);
    total += shared_wavefronts(address, width);
  };
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < Map::kKeyWords; j += D >= 128 ? 4 : D == 64 || j < 2 ? 2 : 1) {
      add(D >= 128           ? 16
          : D == 64 || j < 2 ? 8
                             : 4,
          [&](int g, int t) {
            return stage.k_codes + map.token(i, g) * stage.code_token_stride + Map::key_byte(t, j);
          });
    }
    for (int b = 0; b < 2; ++b) {
      for (int m = 0; m < Map::kValueTiles; m += D >= 128 ? 8 : 4) {
        add(D >= 128 ? 8 : 4, [&](int g, int t) {
          return (stage.v_codes + map.token(i, 2 * t + b) * stage.code_token_stride +
                  Map::value_byte(g, m)) &
                 ~3;
        });
      }
      for (const int norms : {stage.k_norms, stage.v_norms}) {
        add(4,
            [&](int, int t) { return norms + map.token(i, 2 * t + b) * stage.norm_token_stride; });
      }
    }
  }
  return total;
}

// Whether bulk copies of some KV heads' rows can be boxes of a tensor map.
inline bool takes_boxes(const PageView& view) {
  return is_token_major(view) && takes_bulk_fields(view) && view.v_codes > view.k_codes &&
         view.v_norms > view.k_norms;
}

// The boxes of one tile of a chunk of heads, all of them or a multiple of 4: K's and V's fields one
// behind the other.  Where rows would all begin on the same bank, boxes of codes are 64 bytes
// wider: with codes of the next heads, or zeros.
inline TileCopy make_box_copy(const PageView& view, int heads_per_chunk) {
  const int codes = heads_per_chunk * view.head_dim / 2;
  const int pitch = codes + (codes % 128 == 0 ? 64 : 0);
  const int norms = round_up(heads_per_chunk * 4, kNormBoxBytes);
  TileCopy copy{};
  copy.num_runs = kBoxesOfTile;
  copy.reps = 1;
  copy.width = 16;
  StageView& stage = copy.stage;
  stage.v_codes = kTileTokens * pitch;
  stage.k_norms = 2 * stage.v_codes;
  stage.v_norms = stage.k_norms + kTileTokens * norms;
  stage.code_token_stride = pitch;
  stage.code_head_stride = view.head_dim / 2;
  stage.norm_token_stride = norms;
  stage.norm_head_stride = 4;
  copy.bytes = copy.stage_bytes = 2 * kTileTokens * (pitch + norms);
  return copy;
}

// The best of a few maps for the stage's strides.  K wants columns 2q, 2q + 1 on different halves
// of the banks; V wants columns b, 2 + b, 4 + b, 6 + b on different quarters.
template <int D>
inline TokenMap choose_token_map(const StageView& stage) {
  const auto make = [](auto&& token) {
    TokenMap map{0};
    for (int i = 0; i < 2; ++i) {
      for (int n = 0; n < 8; ++n) {
        map.nibbles |= static_cast<uint64_t>(token(i, n / 2, n % 2)) << (4 * (8 * i + n));
      }
    }
    return map;
  };
  const TokenMap candidates[] = {
      make([](int i, int t, int b) { return 8 * i + 4 * b + (t ^ b); }),        // stride 64 mod 128
      make([](int i, int t, int b) { return 8 * i + 4 * b + (t ^ (2 * b)); }),  // 32, 96
      make([](int i, int t, int b) { return i + (b ? 8 + ((2 * t + 4) & 7) : 2 * t); }),  // 16 odd
      make([](int i, int t, int b) { return 4 * t + 2 * i + b; }),
      make([](int i, int t, int b) { return 8 * i + 2 * t + b; }),
  };
  TokenMap best{};
  int fewest = INT32_MAX;
  for (const TokenMap& map : candidates) {
    const int wavefronts = tile_wavefronts<D>(stage, map);
    if (wavefronts < fewest) best = map, fewest = wavefronts;
  }
  return best;
}

inline TokenMap search_token_map(int head_dim, const StageView& stage) {
  switch (head_dim) {
    case 64:
      return choose_token_map<64>(stage);
    case 96:
      return choose_token_map<96>(stage);
    case 128:
      return choose_token_map<128>(stage);
    default:
      return choose_token_map<256>(stage);
  }
}

// The search costs the host half a millisecond: a thread keeps its last answer, for the layers of a
// model share one geometry.
inline TokenMap choose_token_map(int head_dim, const StageView& stage) {
  struct Known {
    int head_dim = 0;
    StageView stage{};
    TokenMap map{};
  };
  static_assert(std::is_trivially_copyable_v<StageView>, "compared as bytes");
  static thread_local Known known;
  if (known.head_dim != head_dim || std::memcmp(&known.stage, &stage, sizeof(stage)) != 0) {
    known = {head_dim, stage, search_token_map(head_dim, stage)};
  }
  return known.map;
}

namespace detail {

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace detail

namespace detail {

// Whether a row is rotated by butterflies, or not at all.
inline bool is_light(int head_dim, const float* rotation, bool signs) {
  return is_power_of_two(head_dim) && (rotation == nullptr || signs);
}

// Fills in what depends on the pipeline; false when the cache cannot be read that way.
inline bool plan_tiles(const AttentionParams& p, bool bulk, DecodePlan& plan) {
  const PageView& view = p.cache;
  plan.mode = decode_mode(view.head_dim, plan.max_rows, p.int8, bulk);
  const int octets = decode_octets(plan.mode);
  const int limit = decode_smem_limit(p.arch);
  plan.bulk = bulk;
  plan.warps = decode_warps(view.head_dim, plan.mode, bulk);
  const int row_groups = ceil_div(plan.max_rows, 8 * octets);
  // Where there are more rows than warps, a tile is read once for each chunk of rows, or for each
  // chunk of heads only those.  The latter are pieces of rows in token-major pages, for which bulk
  // copies are too small: 32 rows of 8 heads took 3.6 times as long (docs/tuning.md).
  const bool whole_rows = bulk && is_token_major(view);
  const bool may_box = bulk && takes_boxes(view);
  const int first_groups = whole_rows ? 1 : row_groups;
  plan.num_stages = 0;
  // As many KV heads a CTA as there are warps for: the fewer chunks, the longer the runs that are
  // copied, and the fewer partial results.
  for (int heads = std::min(view.num_kv_heads, plan.warps / first_groups); heads > 0; --heads) {
    if (view.num_kv_heads % heads != 0) continue;
    if (may_box && heads < view.num_kv_heads && heads % 4 != 0) continue;
    plan.row_groups = std::min(row_groups, plan.warps / heads);
    plan.row_chunks = ceil_div(row_groups, plan.row_groups);
    plan.row_groups = ceil_div(row_groups, plan.row_chunks);
    plan.rows_per_chunk = plan.row_chunks == 1 ? plan.max_rows : 8 * octets * plan.row_groups;
    plan.heads_per_chunk = heads;
    plan.num_chunks = view.num_kv_heads / heads * plan.row_chunks;
    plan.slots = heads * plan.row_groups;
    plan.teams = plan.warps / plan.slots;
    plan.copy = make_tile_copy(view, heads, true);
    plan.wide = is_wide(plan.copy.stage, view.head_dim);
    plan.boxes = may_box && plan.copy.num_pieces() > kBoxesOfTile;
    if (plan.boxes) plan.copy = make_box_copy(view, heads);
    if (bulk && plan.copy.width != 16) return false;
    // cp.async can align what it copies, but rows of one head are not worth an instruction for
    // every few bytes of them.
    if (!bulk && !plan.wide && !(plan.copy.num_pieces() == 1 && reads_unaligned(view.head_dim))) {
      plan.copy = make_tile_copy(view, heads, false);
      plan.wide = true;
    }
    // Teams half .. teams - 1 send in the first round of the merge, half / 2 of them in the next.
    int half = 1;
    while (2 * half < plan.teams) half *= 2;
    const int senders = plan.teams > 1 ? std::max(plan.teams - half, half / 2) * plan.slots : 0;
    plan.stage_offset = decode_merge_offset(plan.mode, view.head_dim) +
                        round_up(senders * merge_area_bytes(bulk, octets), 128);
    plan.num_stages =
        std::min(kDecodeMaxStages, (limit - plan.stage_offset) / plan.copy.stage_bytes);
    if (plan.num_stages >= kFewestStages) break;
  }
  plan.teams = std::min(plan.teams, plan.num_stages);
  if (bulk) {  // but one stage a team to work on, and one to come
    plan.num_stages = std::min(plan.num_stages, std::max({kDecodeBytesAhead / plan.copy.stage_bytes,
                                                          2 * plan.teams, kFewestStages}));
  }
  // A stage always belongs to the same team: one that sees only every other filling of it could
  // take an old one for its own, as both end a phase of the same parity.
  // So it does to the same producer, for the same reason.  Each of those is worth a few stages.
  if (plan.teams > 0) {
    const int room = plan.num_stages - plan.num_stages % plan.teams;
    for (plan.producers = bulk ? 1 : kDecodeProducers;; --plan.producers) {
      plan.num_stages = room - room % std::lcm(plan.producers, plan.teams);
      if (4 * plan.num_stages >= 3 * room) break;
    }
  }
  // Few KV heads: many small stages, filled by a copy each.  A batch waits for its last stage, so
  // it is a small part of them.
  plan.bulk_batch =
      plan.copy.num_pieces() == 1 && plan.num_stages >= kBatchStages ? plan.num_stages / 6 : 1;
  plan.whole_tiles = plan.bulk_batch == 1 && plan.copy.num_pieces() == 1;
  plan.first_tiles = bulk ? plan.teams : plan.num_stages;
  return plan.num_stages >= 2;
}

// The size of the clusters where they are the fastest way, else 0.  A matter of shapes: lengths are
// not known here, but for the most that the block table has room for.
inline int choose_cluster(const AttentionParams& p, const DecodePlan& plan,
                          const ClusterRoom& room) {
  const int head_dim = p.cache.head_dim;
  const int64_t most_keys = int64_t{p.max_blocks} * p.cache.block_size;
  const bool possible = p.arch == 90 && p.path != Path::kPortable && p.int8 &&
                        (head_dim == 64 || head_dim == 128) && plan.max_rows <= 8 &&
                        plan.light_prepare && is_light(head_dim, p.out_rotation, p.out_signs);
  if (!possible) return 0;
  const int size = room.largest_size(int64_t{p.num_seqs} * p.cache.num_kv_heads);
  return most_keys <= cluster_key_limit(size) ? size : 0;
}

inline void plan_clusters(const AttentionParams& p, DecodePlan& plan) {
  const int head_dim = p.cache.head_dim;
  plan.mode = DecodeMode::kInt8Rows8;
  plan.heads_per_chunk = p.cache.num_kv_heads;
  plan.rows_per_chunk = plan.max_rows;
  plan.row_chunks = plan.num_chunks = 1;
  plan.cluster_copy = takes_boxes(p.cache)         ? ClusterCopy::kBoxes
                      : takes_bulk_fields(p.cache) ? ClusterCopy::kRuns
                                                   : ClusterCopy::kPieces;
  plan.copy.width = copy_width(p.cache);
  StageView& stage = plan.copy.stage;
  stage.code_token_stride = head_dim / 2;
  stage.norm_token_stride = plan.cluster_copy == ClusterCopy::kBoxes ? kNormBoxBytes : 4;
  stage.v_codes = kTileTokens * stage.code_token_stride;
  stage.k_norms = 2 * stage.v_codes;
  stage.v_norms = stage.k_norms + kTileTokens * kNormBoxBytes;
  plan.copy.bytes = 2 * kTileTokens * (stage.code_token_stride + stage.norm_token_stride);
}

}  // namespace detail

// Throws std::invalid_argument for what no decode kernel can do.  `has_bulk`: the bulk-copy kernels
// are compiled in.  `room`: for clusters, if those kernels are.
inline DecodePlan make_decode_plan(const AttentionParams& p, bool has_bulk,
                                   const ClusterRoom& room = {}) {
  using detail::require;
  const PageView& view = p.cache;
  require(
      view.head_dim == 64 || view.head_dim == 96 || view.head_dim == 128 || view.head_dim == 256,
      "head_dim: expected 64, 96, 128 or 256, got " + std::to_string(view.head_dim));
  const auto require_rotation = [&](const float* rotation, bool signs, const char* name) {
    require(rotation == nullptr || !signs || is_power_of_two(view.head_dim),
            std::string(name) +
                ": expected a matrix: there is no Hadamard rotation of this head_dim, got " +
                std::to_string(view.head_dim) + " signs");
  };
  require_rotation(p.q_rotation, p.q_signs, "q_rotation");
  require_rotation(p.out_rotation, p.out_signs, "out_rotation");
  require(view.block_size > 0 && view.block_size % kTileTokens == 0,
          "block_size: expected a multiple of 16, got " + std::to_string(view.block_size));
  require(view.num_kv_heads > 0 && p.num_q_heads > 0 && p.num_q_heads % view.num_kv_heads == 0,
          "q: " + std::to_string(p.num_q_heads) + " query heads cannot be shared out among " +
              std::to_string(view.num_kv_heads) + " KV heads");
  require(p.max_query_len > 0, "max_query_len: decode needs at least 1");
  require(p.num_sms > 0, "num_sms: expected the number of SMs of the device");

  DecodePlan plan{};
  plan.group = p.num_q_heads / view.num_kv_heads;
  const int64_t max_rows = static_cast<int64_t>(plan.group) * p.max_query_len;
  // The portable kernel's limit whatever the pipeline, which depends on the cache's alignment.
  const int most_rows = decode_row_limit(view.head_dim, p.int8);
  require(max_rows <= most_rows,
          "max_query_len: decode takes up to " + std::to_string(most_rows) +
              " query rows a KV head (query heads of the group times query tokens), got " +
              std::to_string(max_rows) + "; use prefill");
  plan.max_rows = static_cast<int>(max_rows);
  plan.tiles_per_block = view.block_size / kTileTokens;
  plan.block_divider = Divider::make(static_cast<uint32_t>(plan.tiles_per_block));
  // A CTA of the main kernel fills an SM, and starts late where it must wait for one of the prepare
  // kernel to leave.  A few SMs are better left out than waited for.
  plan.query_rows =
      p.num_q_heads * (p.short_query_len > 0 ? static_cast<int64_t>(p.num_seqs) * p.short_query_len
                                             : static_cast<int64_t>(p.num_tokens));
  require(plan.query_rows < INT32_MAX - kPrepareRows * p.num_sms,
          "q: too many query tokens and heads for one call");
  plan.light_prepare = detail::is_light(view.head_dim, p.q_rotation, p.q_signs);
  const int64_t prepare_blocks = ceil_div<int64_t>(plan.query_rows, kPrepareRows);
  // Up to two blocks a CTA leave half of the SMs to CTAs of the main kernel, which fetch their
  // first tiles meanwhile.
  const int64_t half = std::max(1, p.num_sms / 2);
  plan.prepare_grid = static_cast<int32_t>(
      std::min<int64_t>(prepare_blocks, prepare_blocks <= 2 * half ? half : p.num_sms));
  // A row takes little without a matrix: fewer CTAs, whose SMs start that little later, or are not
  // there for the main kernel.
  if (plan.light_prepare) {
    const int blocks_per_cta = prepare_blocks > p.num_sms / 32 ? 3 : 2;
    plan.prepare_grid = static_cast<int32_t>(
        std::min<int64_t>(ceil_div<int64_t>(prepare_blocks, blocks_per_cta), p.num_sms));
  }
  plan.grid = p.num_sms - (prepare_blocks <= p.num_sms / 32 ? plan.prepare_grid : 0);

  const bool wants_bulk = has_bulk && p.arch == 90 && p.path != Path::kPortable;
  plan.cluster = detail::choose_cluster(p, plan, room);
  if (plan.cluster > 0) {
    detail::plan_clusters(p, plan);
  } else if (!wants_bulk || !detail::plan_tiles(p, true, plan)) {
    require(detail::plan_tiles(p, false, plan),
            "head_dim: a tile does not fit in this device's shared memory");
  }
  plan.team_bytes = plan.teams * plan.copy.stage_bytes;
  plan.ring_bytes = plan.num_stages * plan.copy.stage_bytes;
  plan.smem_bytes = plan.stage_offset + plan.ring_bytes;
  plan.token_map = choose_token_map(view.head_dim, plan.copy.stage);
  plan.code_step = plan.token_map.step() * plan.copy.stage.code_token_stride;
  plan.norm_step = plan.token_map.step() * plan.copy.stage.norm_token_stride;
  plan.value_norms = plan.copy.stage.v_norms - plan.copy.stage.k_norms;
  plan.value_norms_step = plan.value_norms + plan.norm_step;

  const int64_t rows_per_seq = static_cast<int64_t>(p.max_query_len) * p.num_q_heads;
  require(rows_per_seq * p.num_seqs <= INT32_MAX,
          "q: too many sequences, query tokens and heads for one call");
  plan.seq_divider = Divider::make(static_cast<uint32_t>(rows_per_seq));
  plan.query_divider = Divider::make(static_cast<uint32_t>(p.num_q_heads));
  plan.group_divider = Divider::make(static_cast<uint32_t>(plan.group));
  plan.chunk_divider = Divider::make(static_cast<uint32_t>(plan.heads_per_chunk));
  plan.row_divider = Divider::make(static_cast<uint32_t>(plan.rows_per_chunk));
  plan.row_chunk_divider = Divider::make(static_cast<uint32_t>(plan.row_chunks));
  if (plan.cluster > 0) return plan;

  // A unit costs a CTA about what 96 KB of keys do, beside its tiles.
  plan.segment_cost = 1 + 98304 / plan.copy.stage_bytes;
  // So does waiting for a CTA of the prepare kernel to leave; the last CTAs do.
  const bool waits = plan.bulk && plan.grid == p.num_sms && plan.prepare_grid < plan.grid;
  const int late_ctas = waits ? plan.prepare_grid : 0;
  plan.shares = {Divider::make(plan.grid), plan.grid - late_ctas, plan.segment_cost};

  const int64_t rows = plan.query_rows;
  const int64_t partials =
      static_cast<int64_t>(plan.grid) + static_cast<int64_t>(p.num_seqs) * plan.num_chunks;
  const int64_t partial_rows = partials * plan.heads_per_chunk * plan.rows_per_chunk;
  const int query_bytes = has_int8_query(plan.mode) ? 1 : 2;
  int64_t at = 0;
  const auto take = [&at](int64_t bytes) {
    const int64_t begin = at;
    at += round_up<int64_t>(bytes, 256);
    return begin;
  };
  plan.query_codes = take(rows * view.head_dim * query_bytes);
  plan.query_residual =
      take(decode_octets(plan.mode) == 1 ? rows * view.head_dim * query_bytes : 0);
  plan.query_scale = take(rows * 4);
  plan.dense_rotation = take(4);
  plan.unit_ctas = take(static_cast<int64_t>(p.num_seqs) * plan.num_chunks * sizeof(CtaRange));
  plan.partial_stats = take(partial_rows * 8);
  plan.partial_out = take(partial_rows * view.head_dim * 4);
  plan.workspace_bytes = at;
  return plan;
}

}  // namespace tq4
