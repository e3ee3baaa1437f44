// csrc/device/decode_{map,plan,schedule}.h: maps are bijections, copied tiles hold what the page
// held, and the shares of a fixed grid cover every visible tile exactly once.
#include <algorithm>
#include <cstring>
#include <map>
#include <set>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "check.h"
#include "cluster_room.h"
#include "device/decode_plan.h"
#include "device/tensor_map.h"
#include "layout.h"
#include "segment_walk.h"

namespace {

using tq4::test::Random;

template <int D>
void check_decode_map() {
  using Map = tq4::DecodeMap<D>;
  std::set<int> key_bytes, value_bytes;
  for (int t = 0; t < 4; ++t) {
    for (int j = 0; j < Map::kKeyWords; ++j) {
      CHECK(Map::key_byte(t, j) % 4 == 0 && Map::key_dim(t, j) == 2 * Map::key_byte(t, j));
      CHECK(key_bytes.insert(Map::key_byte(t, j)).second);
    }
  }
  CHECK(key_bytes.size() == D / 8 && *key_bytes.rbegin() == D / 2 - 4);
  for (int g = 0; g < 8; ++g) {
    for (int m = 0; m < Map::kValueTiles; ++m) {
      CHECK(value_bytes.insert(Map::value_byte(g, m)).second);
      CHECK(m % 2 == 0 || Map::value_byte(g, m) == Map::value_byte(g, m - 1) + 1);
    }
  }
  CHECK(value_bytes.size() == D / 2 && *value_bytes.rbegin() == D / 2 - 1);
}

// Boxes as the copy engine wants them, each with the fields of all heads of a chunk.
void check_boxes(const tq4::PageView& view, const tq4::DecodePlan& plan) {
  const tq4::StageView& stage = plan.copy.stage;
  const int heads = plan.heads_per_chunk;
  CHECK(plan.bulk && tq4::is_token_major(view) && !plan.whole_tiles && plan.bulk_batch == 1);
  CHECK(heads == view.num_kv_heads || heads % 4 == 0);
  CHECK(stage.code_token_stride % 16 == 0 && stage.code_token_stride % 128 != 0);
  CHECK(stage.code_token_stride >= heads * view.head_dim / 2);
  CHECK(stage.code_token_stride <= 256 * tq4::kMapElementBytes);
  CHECK(stage.norm_token_stride % 16 == 0 && stage.norm_token_stride >= heads * 4);
  CHECK(stage.code_head_stride == view.head_dim / 2 && stage.norm_head_stride == 4);
  const int codes = tq4::kTileTokens * stage.code_token_stride;
  const int norms = tq4::kTileTokens * stage.norm_token_stride;
  CHECK(stage.k_codes == 0 && stage.v_codes == codes);
  CHECK(stage.k_norms == 2 * codes && stage.v_norms == 2 * codes + norms);
  CHECK(plan.copy.bytes == 2 * (codes + norms) && plan.copy.stage_bytes == plan.copy.bytes);
  for (const int field : {stage.k_codes, stage.v_codes, stage.k_norms, stage.v_norms}) {
    CHECK(field % 128 == 0);
  }
  for (const int field : {view.k_codes, view.v_codes, view.k_norms, view.v_norms}) {
    CHECK(field % 16 == 0);
  }
  CHECK(view.v_codes > view.k_codes && view.v_norms > view.k_norms);
}

// A page of random bytes, copied tile by tile as the plan says; every field must arrive.
void check_copy(const tq4::PageView& view, int64_t page_bytes, const tq4::DecodePlan& plan,
                Random* random) {
  std::vector<uint8_t> page(page_bytes);
  for (uint8_t& byte : page) byte = static_cast<uint8_t>(random->next());
  const tq4::TileCopy& copy = plan.copy;
  const tq4::StageView& stage = copy.stage;
  const int codes = view.head_dim / 2;
  if (plan.boxes) return check_boxes(view, plan);
  for (int tile = 0; tile < plan.tiles_per_block; ++tile) {
    for (int chunk = 0; chunk < plan.num_chunks / plan.row_chunks; ++chunk) {
      std::vector<uint8_t> staged(copy.stage_bytes, 0);
      std::vector<int> writes(copy.stage_bytes, 0);
      int total = 0;
      for (int run = 0; run < copy.num_runs; ++run) {
        const tq4::CopyRun& r = copy.run[run];
        for (int rep = 0; rep < copy.reps; ++rep) {
          const int src =
              r.src + tile * r.tile_stride + chunk * r.chunk_stride + rep * copy.src_stride;
          const int dst = r.dst + rep * copy.dst_stride;
          CHECK(src >= 0 && src + r.bytes <= page_bytes && dst >= 0 &&
                dst + r.bytes <= copy.stage_bytes);
          CHECK(src % r.width == 0 && dst % r.width == 0 && r.bytes % r.width == 0);
          CHECK(r.width >= copy.width && static_cast<int>(r.row.divisor) == r.bytes / r.width);
          std::memcpy(&staged[dst], &page[src], r.bytes);
          for (int i = 0; i < r.bytes; ++i) ++writes[dst + i];
          total += r.bytes;
        }
      }
      CHECK(total == copy.bytes && copy.stage_bytes % 128 == 0);
      for (int count : writes) CHECK(count <= 1);
      for (int token = 0; token < tq4::kTileTokens; ++token) {
        for (int head = 0; head < plan.heads_per_chunk; ++head) {
          const int page_head = chunk * plan.heads_per_chunk + head;
          const int page_token = tile * tq4::kTileTokens + token;
          const int code = page_token * view.code_token_stride + page_head * view.code_head_stride;
          const int norm = page_token * view.norm_token_stride + page_head * view.norm_head_stride;
          const int stage_code = token * stage.code_token_stride + head * stage.code_head_stride;
          const int stage_norm = token * stage.norm_token_stride + head * stage.norm_head_stride;
          CHECK(
              !std::memcmp(&staged[stage.k_codes + stage_code], &page[view.k_codes + code], codes));
          CHECK(
              !std::memcmp(&staged[stage.v_codes + stage_code], &page[view.v_codes + code], codes));
          CHECK(!std::memcmp(&staged[stage.k_norms + stage_norm], &page[view.k_norms + norm], 4));
          CHECK(!std::memcmp(&staged[stage.v_norms + stage_norm], &page[view.v_norms + norm], 4));
        }
      }
    }
  }
}

// Short sequences: by clusters where all that they take is given.
void check_clusters(tq4::AttentionParams p) {
  const float signs[256] = {};
  const tq4::ClusterRoom room = h200_cluster_room();
  const auto plan = [&] { return tq4::make_decode_plan(p, p.arch == 90, room); };
  const int head_dim = p.cache.head_dim;
  p.num_seqs = 1;
  p.num_tokens = p.max_query_len;
  const int size = room.largest_size(p.cache.num_kv_heads);
  p.max_blocks = static_cast<int32_t>(tq4::cluster_key_limit(size)) / p.cache.block_size;
  const bool fits = p.arch == 90 && p.int8 && (head_dim == 64 || head_dim == 128) &&
                    p.num_q_heads / p.cache.num_kv_heads * p.max_query_len <= 8 && size > 0;
  const int wanted = fits ? size : 0;
  CHECK(plan().cluster == wanted);
  CHECK(tq4::make_decode_plan(p, p.arch == 90).cluster == 0);  // no room
  p.q_rotation = p.out_rotation = signs;
  CHECK(plan().cluster == 0);  // matrices
  for (bool* const signs_of : {&p.q_signs, &p.out_signs}) {
    *signs_of = true;
    bool refused = false;
    try {
      plan();
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    CHECK(refused == (head_dim == 96));  // no Hadamard rotation
  }
  if (head_dim == 96) return;
  CHECK(plan().cluster == wanted);
  if (fits) CHECK(plan().workspace_bytes == 0);
  p.max_blocks += 1;
  CHECK(plan().cluster == 0);
}

// Clusters are as large as all of them find room for at the same time.
void check_cluster_sizes() {
  const tq4::ClusterRoom room = h200_cluster_room();
  const int wanted[][2] = {{1, 16}, {7, 16}, {8, 9},  {9, 9},  {10, 8}, {15, 8},
                           {16, 6}, {17, 6}, {18, 5}, {23, 4}, {30, 4}, {31, 0}};
  for (const auto& [clusters, size] : wanted) CHECK(room.largest_size(clusters) == size);
  for (int size = tq4::kSmallestCluster; size <= tq4::kLargestCluster; ++size) {
    const int64_t most = tq4::cluster_key_limit(size);
    CHECK(most >= tq4::cluster_key_limit(size - 1) && most <= tq4::kClusterMostKeys);
  }
  CHECK(tq4::ClusterRoom{}.largest_size(1) == 0);
}

void check_plan(const tq4::PageView& view, int64_t page_bytes, int group, int max_query_len,
                bool int8, int arch, Random* random) {
  tq4::AttentionParams p{};
  p.cache = view;
  p.num_q_heads = group * view.num_kv_heads;
  p.max_query_len = max_query_len;
  p.num_seqs = 5;
  p.num_tokens = p.num_seqs * max_query_len;
  p.int8 = int8;
  p.arch = arch;
  p.num_sms = 132;
  p.max_blocks = 1 << 16;  // room for long sequences: not by clusters
  const tq4::DecodePlan plan = tq4::make_decode_plan(p, arch == 90);
  CHECK(plan.cluster == 0);
  check_clusters(p);
  const int octets = tq4::decode_octets(plan.mode);
  CHECK(!plan.bulk || (arch == 90 && plan.copy.width == 16));
  if (!int8) {  // the exact mode: by INT8 terms exactly where pages can be bulk copied
    CHECK(plan.mode == (plan.bulk ? tq4::DecodeMode::kInt8x2Rows8 : tq4::DecodeMode::kFp16Rows8));
  } else {
    CHECK(tq4::has_given_codes(plan.mode));
  }
  CHECK(plan.wide ||
        (tq4::reads_unaligned(view.head_dim) && (plan.bulk || plan.copy.num_pieces() == 1)));
  CHECK(plan.group == group && plan.max_rows == group * max_query_len);
  CHECK(plan.heads_per_chunk * plan.num_chunks == view.num_kv_heads * plan.row_chunks);
  CHECK(plan.row_groups * 8 * octets >= plan.rows_per_chunk);
  CHECK(plan.rows_per_chunk * plan.row_chunks >= plan.max_rows);
  CHECK(plan.rows_per_chunk * (plan.row_chunks - 1) < plan.max_rows);
  if (plan.bulk && tq4::is_token_major(view)) {  // rows are copied whole, if warps are as many
    CHECK(plan.heads_per_chunk == view.num_kv_heads || plan.num_stages >= 3);
  } else {
    CHECK(plan.row_chunks == 1);
  }
  std::set<std::pair<int, int>> places;  // of all units of a sequence
  for (int chunk = 0; chunk < plan.num_chunks; ++chunk) {
    const tq4::ChunkPlace place = tq4::chunk_place(plan, chunk);
    CHECK(place.head_chunk * plan.heads_per_chunk < view.num_kv_heads);
    CHECK(place.first_row < plan.max_rows && place.first_row % plan.rows_per_chunk == 0);
    places.insert({place.head_chunk, place.first_row});
  }
  CHECK(static_cast<int>(places.size()) == plan.num_chunks);
  CHECK(plan.teams >= 1 && plan.slots * plan.teams <= plan.warps);
  CHECK(plan.num_stages >= 2 && plan.smem_bytes <= tq4::decode_smem_limit(arch));
  CHECK(plan.num_stages % plan.teams == 0);  // a stage belongs to one team
  CHECK(plan.producers >= 1 && plan.producers <= (plan.bulk ? 1 : tq4::kDecodeProducers));
  CHECK(plan.num_stages % plan.producers == 0);  // and to one producer warp
  CHECK(plan.num_stages <= tq4::kDecodeMaxStages);
  CHECK(plan.smem_bytes == plan.stage_offset + plan.num_stages * plan.copy.stage_bytes);
  const int room = (tq4::decode_smem_limit(arch) - plan.stage_offset) / plan.copy.stage_bytes;
  if (plan.bulk) {  // no more bytes ahead than do any good, but two stages a team
    const int wanted = std::max(tq4::kDecodeBytesAhead / plan.copy.stage_bytes, tq4::kFewestStages);
    CHECK(plan.num_stages <= std::max(wanted, 2 * plan.teams));
    CHECK(plan.num_stages >= std::min(2 * plan.teams, room - room % plan.teams));
    CHECK(plan.first_tiles >= 1 && plan.first_tiles <= plan.num_stages);
    CHECK(plan.num_stages + plan.teams >
          std::min({room, tq4::kDecodeMaxStages, std::max(wanted, 2 * plan.teams)}));
    // In a batch each lane's position is at most twice around (RingPosition::advance).
    CHECK(plan.bulk_batch >= 1 && 4 * plan.bulk_batch <= std::max(plan.num_stages, 4));
    CHECK(plan.bulk_batch == 1 || plan.num_stages >= tq4::kWarpSize / 2);
  } else {
    const int most = std::min(room, tq4::kDecodeMaxStages);
    CHECK(4 * plan.num_stages >= 3 * (most - most % plan.teams));
  }
  CHECK(plan.tiles_per_block * tq4::kTileTokens == view.block_size);
  const int64_t offsets[] = {plan.query_codes,    plan.query_residual, plan.query_scale,
                             plan.dense_rotation, plan.unit_ctas,      plan.partial_stats,
                             plan.partial_out,    plan.workspace_bytes};
  for (int i = 0; i + 1 < 8; ++i) CHECK(offsets[i] % 16 == 0 && offsets[i] <= offsets[i + 1]);
  const int64_t rows = int64_t{p.num_tokens} * p.num_q_heads;
  CHECK(plan.query_residual - plan.query_codes >=
        rows * view.head_dim * (tq4::has_int8_query(plan.mode) ? 1 : 2));
  CHECK(octets > 1 ||
        plan.query_scale - plan.query_residual >= plan.query_residual - plan.query_codes);
  CHECK(plan.dense_rotation - plan.query_scale >= rows * 4);
  CHECK(plan.partial_stats - plan.unit_ctas >= int64_t{8} * p.num_seqs * plan.num_chunks);
  int seen = 0;
  for (int i = 0; i < 16; ++i) seen |= 1 << plan.token_map.token(i / 8, i % 8);
  CHECK(seen == 0xffff);
  check_copy(view, page_bytes, plan, random);
}

// Stages and batches of some models.
void check_stages() {
  struct Model {
    int head_dim, kv_heads, num_stages, bulk_batch;
  };
  for (const Model& m : {Model{128, 1, 48, 8}, Model{128, 2, 24, 4}, Model{128, 4, 12, 1},
                         Model{128, 8, 6, 1}, Model{128, 16, 3, 1}, Model{64, 8, 10, 1}}) {
    const int64_t row = tq4::token_bytes(m.kv_heads, m.head_dim);
    tq4::AttentionParams p{};
    p.cache =
        tq4::token_major_view(nullptr, 4, m.kv_heads, tq4::kTileTokens, m.head_dim, 16 * row, row);
    p.num_q_heads = 4 * m.kv_heads;
    p.num_seqs = p.num_tokens = p.max_query_len = 1;
    p.int8 = true;
    p.arch = 90;
    p.num_sms = 132;
    p.max_blocks = 1 << 16;
    const tq4::DecodePlan plan = tq4::make_decode_plan(p, true);
    CHECK(plan.num_stages == m.num_stages && plan.bulk_batch == m.bulk_batch);
    CHECK(plan.ring_bytes <= tq4::kDecodeBytesAhead);
  }
}

void check_plans() {
  Random random(3);
  for (int head_dim : {64, 96, 128, 256}) {
    for (int heads : {1, 2, 8, 32}) {
      for (int block_size : {16, 64}) {
        const auto both = [&](const tq4::PageView& view, int64_t page_bytes) {
          for (int group : {1, 4}) {
            for (int queries : {1, 4, 16}) {
              check_plan(view, page_bytes, group, queries, true, 90, &random);
              check_plan(view, page_bytes, group, queries, false, 90, &random);
            }
            check_plan(view, page_bytes, group, 1, false, 80, &random);
            check_plan(view, page_bytes, group, 1, true, 89, &random);
          }
        };
        for (int64_t padding : {0, 8, 48}) {
          const int64_t row = tq4::token_bytes(heads, head_dim) + padding;
          both(
              tq4::token_major_view(nullptr, 4, heads, block_size, head_dim, block_size * row, row),
              block_size * row);
        }
        const int64_t page = tq4::head_page_bytes(block_size, head_dim) + 16;
        both(tq4::head_major_view(nullptr, 4, heads, block_size, head_dim, heads * page, page),
             heads * page);
      }
    }
  }
}

struct Batch {
  std::vector<int32_t> seq_lens, query_start_loc;
  tq4::DecodeBatch view;
};

void check_schedule(Batch* owner, const tq4::DecodeShares& shares) {
  const int grid = static_cast<int>(shares.grid.divisor);
  tq4::DecodeBatch& batch = owner->view;
  const int num_seqs = batch.num_seqs;
  std::vector<int32_t> prefix(num_seqs + 1, 0);
  for (int seq = 0; seq < num_seqs; ++seq) {
    prefix[seq + 1] = prefix[seq] + batch.unit_cost(batch.tiles(seq));
  }
  const int64_t total = int64_t{prefix[num_seqs]} * batch.num_chunks;
  std::map<std::tuple<int, int, int>, int> computed;          // (seq, chunk, tile)
  std::map<std::pair<int, int>, std::set<int>> unit_to_ctas;  // (seq, chunk)
  std::map<std::pair<int, int>, tq4::CtaRange> ranges;  // as the segments at a unit's ends say
  std::set<int> partials;
  for (int cta = 0; cta < grid && total > 0; ++cta) {
    const tq4::DecodeShare share = tq4::share_of(total, cta, shares);
    const int64_t begin = share.begin;
    CHECK(share.length >= 0);
    CHECK(begin + share.length ==
          (cta + 1 < grid ? tq4::share_of(total, cta + 1, shares).begin : total));
    int start = 0;
    while (start + 1 < num_seqs && int64_t{prefix[start + 1]} * batch.num_chunks <= begin) ++start;
    auto walker = tq4::test::start_walk(batch, total, cta, shares, start, prefix[start]);
    tq4::DecodeSegment segment;
    while (tq4::test::next_segment(walker, batch, segment)) {
      CHECK(segment.num_keys == batch.seq_lens[segment.seq]);
      CHECK(segment.num_queries == batch.num_queries(segment.seq));
      CHECK(segment.query_begin == batch.query_begin(segment.seq));
      for (int tile = segment.tile_begin; tile < segment.tile_end; ++tile) {
        ++computed[{segment.seq, segment.chunk, tile}];
      }
      unit_to_ctas[{segment.seq, segment.chunk}].insert(cta);
      tq4::CtaRange& range = ranges.insert({{segment.seq, segment.chunk}, {-1, -1}}).first->second;
      if (segment.begins_unit) {
        CHECK(range.begin < 0);
        range.begin = cta;
      }
      if (segment.ends_unit) {
        CHECK(range.end < 0);
        range.end = cta + 1;
      }
      const int partial = cta + segment.seq * batch.num_chunks + segment.chunk;
      CHECK(partials.insert(partial).second && partial < grid + num_seqs * batch.num_chunks);
    }
  }
  size_t expected = 0;
  for (int seq = 0; seq < num_seqs; ++seq) {
    const tq4::TileRange range = batch.tiles(seq);
    for (int chunk = 0; chunk < batch.num_chunks; ++chunk) {
      for (int tile = range.begin; tile < range.end; ++tile, ++expected) {
        CHECK((computed[{seq, chunk, tile}] == 1));
      }
      const tq4::CtaRange ctas = ranges[{seq, chunk}];
      const std::set<int>& have = unit_to_ctas[{seq, chunk}];
      // Exactly the CTAs of the range have a segment: the combination reads a partial result of
      // each.
      for (int cta : have) CHECK(ctas.begin <= cta && cta < ctas.end);
      CHECK(static_cast<int>(have.size()) == ctas.end - ctas.begin);
    }
  }
  CHECK(computed.size() == expected);
}

void check_schedules() {
  Random random(4);
  for (int round = 0; round < 3000; ++round) {
    Batch owner;
    tq4::DecodeBatch& batch = owner.view;
    batch = {};
    batch.num_seqs = random.range(1, 9);
    const bool one_query = random.range(0, 1) == 0;
    owner.query_start_loc.push_back(0);
    for (int seq = 0; seq < batch.num_seqs; ++seq) {
      const int kind = random.range(0, 3);
      owner.seq_lens.push_back(kind == 0   ? 0
                               : kind == 1 ? random.range(1, 40)
                                           : random.range(1, 900));
      owner.query_start_loc.push_back(owner.query_start_loc.back() + random.range(0, 4));
    }
    batch.most_queries = random.range(0, 1) == 0 ? INT32_MAX : random.range(1, 3);
    batch.seq_lens = owner.seq_lens.data();
    batch.query_start_loc = one_query ? nullptr : owner.query_start_loc.data();
    batch.num_chunks = random.range(1, 3);
    batch.segment_cost = random.range(1, 4);
    batch.window_left = random.range(0, 2) == 0 ? random.range(0, 300) : -1;
    for (int grid : {1, 3, 16, 132}) {
      check_schedule(&owner, {tq4::Divider::make(grid), random.range(0, grid), random.range(0, 9)});
    }
  }
}

// Lines too long for 32 bits are shared out as well.
void check_long_shares() {
  Random random(6);
  for (int round = 0; round < 2000; ++round) {
    const int64_t total = static_cast<int64_t>(random.next() >> random.range(24, 63));
    const int grid = random.range(1, 200);
    const tq4::DecodeShares shares{tq4::Divider::make(grid), random.range(0, grid),
                                   random.range(0, 9)};
    if (total / grid > INT32_MAX / 4) continue;
    int64_t at = 0;
    for (int cta = 0; cta < grid; ++cta) {
      const tq4::DecodeShare share = tq4::share_of(total, cta, shares);
      CHECK(share.begin == at && share.length >= 0);
      CHECK(total < 100 * grid || share.length <= total / grid + total / grid / 8 + 10);
      at += share.length;
    }
    CHECK(at == total);
  }
}

// A tile is in the range exactly when a query sees one of its keys.
void check_visible_tiles() {
  Random random(5);
  for (int round = 0; round < 4000; ++round) {
    const int keys = random.range(0, 120), queries = random.range(0, 6);
    const int left = random.range(-1, 50), right = random.range(-1, 3);
    const tq4::TileRange range = tq4::visible_tiles(keys, queries, left);
    int begin = -1, end = -1;
    for (int key = 0; key < keys; ++key) {
      for (int query = 0; query < queries; ++query) {
        const int position = keys - queries + query;
        if (left >= 0 && key < position - left) continue;
        if (right >= 0 && key > position + right) continue;
        if (begin < 0) begin = key / tq4::kTileTokens;
        end = key / tq4::kTileTokens + 1;
      }
    }
    if (begin < 0) {
      CHECK(range.begin >= range.end);
    } else {
      CHECK(range.begin == begin && range.end == end);
    }
  }
}

}  // namespace

int main() {
  check_decode_map<64>();
  check_decode_map<96>();
  check_decode_map<128>();
  check_decode_map<256>();
  check_plans();
  check_cluster_sizes();
  check_stages();
  check_visible_tiles();
  check_schedules();
  check_long_shares();
  return tq4::test::report("test_decode_plan");
}
