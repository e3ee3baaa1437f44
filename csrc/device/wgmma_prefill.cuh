// TQ4 prefill by wgmma: sm_90a.
//
//   prepare_queries  q8 = round(q R^T / s_q), row scales                       -> workspace
//   expand_tiles     pages -> int8 K, fp16 V' and norms, once a tile           -> workspace
//   wgmma_prefill    S = s_q s_c sm_scale n_k (q8 . k8), O = softmax(S) V', out = (O / l) R
//
// Unpacking inside this kernel would cost every CTA what the pre-pass costs once, and its issue
// slots are what the softmax needs.
//
// A CTA takes tiles of 192 packed rows (row = token * G + head of the group; D = 256: 128) of one
// sequence and KV head from a counter, one after the other, and walks their visible keys 64 at a
// time.
//
//   warpgroup 0     producer: one thread; bulk copies workspace -> rings of K tiles and V tiles
//   warpgroups 1 .. consumers: 64 rows each
//
//   a consumer   tile      0           1           2
//   tensor core           QK0 |  QK1   PV0  |  QK2   PV1  | ...
//   its warps                  S0         S1 (beside PV0)
//
// The consumers take turns: while one issues its products the others are in their softmax.  Three
// of them with 64-token tiles hide more latency than two with 128-token ones, which fill the
// registers as well: +6 % (docs/tuning.md).
//
// Barriers, in pairs: full (what was written or copied has landed) and empty (all consumer warps
// are done with it), for the slots that tell the consumers their work, for the queries, and for
// each stage of the two rings.  K and V have rings of their own, as a K tile is done with one
// product earlier. After the last tile the V ring brings the matrix of the output rotation, in
// tiles like those of V.
//
// Keys go from the last tile to the first: the tiles that the causal mask cuts come first.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "../params.h"
#include "../ptx/arith.cuh"
#include "../ptx/bulk_copy.cuh"
#include "../ptx/dynamic_smem.cuh"
#include "../ptx/grid_dependency.cuh"
#include "../ptx/mbarrier.cuh"
#include "../ptx/register_pool.cuh"
#include "../ptx/smem.cuh"
#include "prefill_output.cuh"
#include "prefill_schedule.cuh"
#include "tile_workspace.h"
#include "wgmma_image.cuh"
#include "wgmma_steps.cuh"

namespace tq4::sm90 {

template <int D_>
struct PrefillConfig {
  static constexpr int D = D_;
  using Image = WgmmaImage<D>;
  using Query = QueryImage<D>;
  static constexpr int kConsumers = wgmma_consumers(D);  // warpgroups
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kConsumerWarps = 4 * kConsumers;
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kTile = Image::kTileTokens;
  static constexpr int kStages = D == 256 ? 3 : D == 64 ? 8 : 7;
  // A thread of a consumer and of the producer: together what the launch gave to all.
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 152 : 232;
  static constexpr int kProducerRegisters = kConsumers == 3 ? 56 : 40;
  static constexpr int kScoreRegs = kTile / 2;  // accumulators of S a lane
  static constexpr int kOutRegs = D / 2;        // of O
  static_assert(kRows == Query::kRows, "one query image a CTA");

  static constexpr int kAlign = 1024;  // the 128-byte swizzle repeats
  static constexpr int kQuery = 0;
  static constexpr int kKeys = round_up(Query::kBytes, kAlign);
  static constexpr int kValues = kKeys + kStages * Image::Key::kBytes;
  static constexpr int kNorms = kValues + kStages * Image::Value::kBytes;
  static constexpr int kWorkSlots = 2;
  static constexpr int kWork = kNorms + kStages * Image::kNormBytes;  // CtaWork [kWorkSlots]
  static constexpr int kBarriers = kWork + kWorkSlots * 48;
  // Pairs of barriers: the query, the stages of K, those of V, the slots of work.
  static constexpr int kPairs = 1 + 2 * kStages + kWorkSlots;
  static constexpr int kSmemBytes = kAlign + kBarriers + 16 * kPairs;
  static_assert(kSmemBytes <= 227 * 1024, "shared memory of an SM");
  static_assert(Image::Key::kBytes % kAlign == 0 && Image::Value::kBytes % kAlign == 0);

  TQ4_HOST_DEVICE static constexpr int full(int pair) { return kBarriers + 16 * pair; }
  TQ4_HOST_DEVICE static constexpr int empty(int pair) { return full(pair) + 8; }
  TQ4_HOST_DEVICE static constexpr int query_full() { return full(0); }
  TQ4_HOST_DEVICE static constexpr int query_empty() { return empty(0); }
  TQ4_HOST_DEVICE static constexpr int key_full(int s) { return full(1 + s); }
  TQ4_HOST_DEVICE static constexpr int key_empty(int s) { return empty(1 + s); }
  TQ4_HOST_DEVICE static constexpr int value_full(int s) { return full(1 + kStages + s); }
  TQ4_HOST_DEVICE static constexpr int value_empty(int s) { return empty(1 + kStages + s); }
  TQ4_HOST_DEVICE static constexpr int work_full(int s) { return full(1 + 2 * kStages + s); }
  TQ4_HOST_DEVICE static constexpr int work_empty(int s) { return empty(1 + 2 * kStages + s); }
  TQ4_HOST_DEVICE static constexpr int work(int s) { return kWork + 48 * s; }
};

// Offsets in the workspace.
struct PrefillBuffers {
  int64_t queries, rotation;
  int64_t counters;   // int32 [passes]: work taken beyond the first of each CTA
  int32_t num_slots;  // tiles of queries, of a KV head
};

struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  template <int kStages>
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// One CTA's worth of work; a slot of it in shared memory tells the consumers.
struct alignas(16) CtaWork {
  int num_keys, pos0, num_rows, first_row;  // of the sequence; first_row of the tile
  int q_begin, first_head;
  int key_begin;             // of tile 0 of this work
  int num_tiles;             // -1: no more work
  int full_begin, full_end;  // tiles inside need no mask
  int pad[2];
};
static_assert(sizeof(CtaWork) == 48, "read as three vectors");

__device__ __forceinline__ void write_work(uint32_t address, const CtaWork& work) {
  ptx::st_shared_v4(address, work.num_keys, work.pos0, work.num_rows, work.first_row);
  ptx::st_shared_v4(address + 16, work.q_begin, work.first_head, work.key_begin, work.num_tiles);
  ptx::st_shared_v2(address + 32, work.full_begin, work.full_end);
}

__device__ __forceinline__ CtaWork read_work(uint32_t address) {
  const uint4 a = ptx::ld_shared_v4(address), b = ptx::ld_shared_v4(address + 16);
  const uint2 c = ptx::ld_shared_v2(address + 32);
  CtaWork work;
  work.num_keys = a.x, work.pos0 = a.y, work.num_rows = a.z, work.first_row = a.w;
  work.q_begin = b.x, work.first_head = b.y, work.key_begin = b.z, work.num_tiles = b.w;
  work.full_begin = c.x, work.full_end = c.y;
  return work;
}

// Tiles of one head of the sequences before `seq`.  Called by one whole warp.
template <typename Config>
__device__ __forceinline__ int64_t tiles_before(const AttentionParams& p, int seq) {
  int64_t before = 0;
  for (int s = threadIdx.x % kWarpSize; s < seq; s += kWarpSize) {
    before += unit_keys(p.seq_lens[s], prefill_queries(p.query_start_loc, s, p.short_query_len),
                        p.window_left, Config::kTile)
                  .tiles;
  }
  if (seq > 0) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) before += __shfl_xor_sync(kFullWarp, before, step);
  }
  return before;
}

// Finds work `index` (of slots * Hkv); false if there is none, or it is another pass's.  Called by
// one whole warp.
template <typename Config>
__device__ __forceinline__ bool find_work(const AttentionParams& p, const TileWorkspace& w,
                                          int pass, int64_t slot, int kv_head, CtaWork& work,
                                          int64_t& first_tile) {
  const int group = p.num_q_heads / p.cache.num_kv_heads;
  const int seq = find_slot_sequence(p.query_start_loc, p.num_seqs, group, Config::kRows, slot);
  work.num_keys = p.seq_lens[seq];  // in flight with the query lengths
  const PrefillTile tile =
      slot_tile(p.query_start_loc, seq, group, Config::kRows, p.short_query_len, slot);
  if (tile.seq < 0) return false;
  work.pos0 = work.num_keys - tile.q_len;
  work.num_rows = tile.q_len * group;
  work.first_row = tile.first_row;
  work.q_begin = tile.q_begin;
  work.first_head = kv_head * group;
  const int last_row = min(tile.first_row + Config::kRows, work.num_rows) - 1;
  const int pos_first = work.pos0 + tile.first_row / group;
  const int pos_last = work.pos0 + last_row / group;
  const KeyRange keys =
      visible_keys(pos_first, pos_last, p.window_left, p.window_right, work.num_keys);
  work.key_begin = keys.begin / Config::kTile * Config::kTile;
  work.num_tiles =
      keys.end > work.key_begin ? ceil_div(keys.end - work.key_begin, Config::kTile) : 0;
  work.full_begin = pos_last - window_or_max(p.window_left);
  work.full_end =
      min(work.num_keys, pos_first + min(window_or_max(p.window_right), kMaxWindow - 1) + 1);

  // Where the unit lies, and in which pass.
  const int64_t before = tiles_before<Config>(p, tile.seq);
  const UnitKeys unit = unit_keys(work.num_keys, tile.q_len, p.window_left, Config::kTile);
  const UnitPlace place = unit_place(w, before, unit.tiles, p.cache.num_kv_heads, kv_head);
  first_tile = place.first_tile + (work.key_begin - unit.begin) / Config::kTile;
  return place.pass == pass;
}

// What the producer's copies go through.
template <typename Config>
struct Producer {
  using Image = typename Config::Image;
  uint32_t smem;
  RingPosition key{0, 1}, value{0, 1}, query{0, 1};  // fresh rings are empty

  __device__ __forceinline__ void copy_values(const uint8_t* source) {
    const uint32_t full = smem + Config::value_full(value.stage);
    ptx::mbarrier_wait(smem + Config::value_empty(value.stage), value.parity);
    ptx::mbarrier_arrive_expect_bytes(full, Image::Value::kBytes);
    ptx::bulk_copy_to_shared(smem + Config::kValues + value.stage * Image::Value::kBytes, source,
                             Image::Value::kBytes, full);
    value.advance<Config::kStages>();
  }

  __device__ __forceinline__ void copy_keys(const uint8_t* image) {
    const uint32_t full = smem + Config::key_full(key.stage);
    ptx::mbarrier_wait(smem + Config::key_empty(key.stage), key.parity);
    ptx::mbarrier_arrive_expect_bytes(full, Image::Key::kBytes + Image::kNormBytes);
    ptx::bulk_copy_to_shared(smem + Config::kKeys + key.stage * Image::Key::kBytes, image,
                             Image::Key::kBytes, full);
    ptx::bulk_copy_to_shared(smem + Config::kNorms + key.stage * Image::kNormBytes,
                             image + Image::kNorms, Image::kNormBytes, full);
    key.advance<Config::kStages>();
  }

  __device__ __forceinline__ void copy_query(const uint8_t* image) {
    const uint32_t full = smem + Config::query_full();
    ptx::mbarrier_wait(smem + Config::query_empty(), query.parity);
    ptx::mbarrier_arrive_expect_bytes(full, Config::Query::kBytes);
    ptx::bulk_copy_to_shared(smem + Config::kQuery, image, Config::Query::kBytes, full);
    query.advance<1>();
  }

  // Everything of one work, in the order in which the consumers want it: K of the next tile before
  // V of this one, the rotation last.
  __device__ __forceinline__ void copy_work(const TileWorkspace& w, const uint8_t* query_image,
                                            const uint8_t* rotation_image, int64_t first_tile,
                                            int num_tiles) {
    const auto image = [&](int tile) { return w.tiles + (first_tile + tile) * w.tile_bytes; };
    copy_query(query_image);
    for (int i = num_tiles - 1; i >= -1; --i) {
      if (i >= 0) copy_keys(image(i));
      if (i + 1 < num_tiles) copy_values(image(i + 1) + Image::kValues);
    }
    if (rotation_image != nullptr) {
      for (int i = 0; i < Image::kRotationTiles; ++i) {
        copy_values(rotation_image + i * Image::Value::kBytes);
      }
    }
  }
};

// The producer warp: takes work from a counter, so that CTAs with short work take more of it.
template <typename Config>
__device__ __forceinline__ void produce(const AttentionParams& p, const TileWorkspace& w,
                                        const PrefillBuffers& buffers, int pass, uint32_t smem) {
  auto* const workspace = static_cast<uint8_t*>(p.workspace);
  auto* const counter = reinterpret_cast<int32_t*>(workspace + buffers.counters) + pass;
  const int lane = threadIdx.x;
  const int heads = p.cache.num_kv_heads;
  const int num_work = buffers.num_slots * heads;
  Producer<Config> producer{smem};
  RingPosition slot{0, 1};
  bool waited = false;
  int index = blockIdx.x;
  while (index < num_work) {
    // KV heads innermost: CTAs that share tiles run side by side.  The last tiles of a sequence
    // first: under a causal mask they have most keys.
    const int tile_slot = buffers.num_slots - 1 - index / heads, kv_head = index % heads;
    CtaWork work;
    int64_t first_tile;
    const bool found = find_work<Config>(p, w, pass, tile_slot, kv_head, work, first_tile);
    if (!waited) ptx::wait_for_predecessor();  // queries, rotation, tiles and counters are written
    waited = true;
    int next = 0;
    // The last works go to whoever is done first, not to whose copies are under way first.
    const bool claims_late = found && index >= num_work - 2 * static_cast<int>(gridDim.x);
    if (lane == 0) {
      if (!claims_late) next = gridDim.x + atomicAdd(counter, 1);
      if (found) {
        ptx::mbarrier_wait(smem + Config::work_empty(slot.stage), slot.parity);
        write_work(smem + Config::work(slot.stage), work);
        ptx::mbarrier_arrive(smem + Config::work_full(slot.stage));
        const int64_t image = static_cast<int64_t>(tile_slot) * heads + kv_head;
        producer.copy_work(w, workspace + buffers.queries + image * Config::Query::kBytes,
                           p.out_rotation == nullptr ? nullptr : workspace + buffers.rotation,
                           first_tile, work.num_tiles);
      }
      if (claims_late) {
        ptx::mbarrier_wait(smem + Config::query_empty(), producer.query.parity);
        next = gridDim.x + atomicAdd(counter, 1);
      }
    }
    if (found) slot.advance<Config::kWorkSlots>();
    index = __shfl_sync(kFullWarp, next, 0);
  }
  if (!waited) ptx::wait_for_predecessor();  // see the end of tile_expand.cuh
  if (lane == 0) {
    CtaWork end{};
    end.num_tiles = -1;
    ptx::mbarrier_wait(smem + Config::work_empty(slot.stage), slot.parity);
    write_work(smem + Config::work(slot.stage), end);
    ptx::mbarrier_arrive(smem + Config::work_full(slot.stage));
  }
}

// Denominator, LSE and the factor of the output, of the lane's two rows.
template <typename Config>
__device__ __forceinline__ void finish_rows(const AttentionParams& p, const CtaWork& work,
                                            int group, int row, LaneState& rows,
                                            float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float l = rows.l[i], m = rows.m[i];
    l += __shfl_xor_sync(kFullWarp, l, 1);
    l += __shfl_xor_sync(kFullWarp, l, 2);
    float scale = 1.f;
    const int packed = work.first_row + row + 8 * i;
    if (packed < work.num_rows) {
      const int token = packed / group;
      const int head = work.first_head + packed - token * group;
      if (p.sinks != nullptr) {  // one more term of the denominator, with no value
        const float sink = p.sinks[head] * kLog2e;
        const float top = fmaxf(m, sink);
        scale = ptx::exp2_approx(m - top);
        l = l * scale + ptx::exp2_approx(sink - top);
        m = top;
      }
      if (p.lse != nullptr && threadIdx.x % 4 == 0) {
        // l = 0: no visible key.  NaN goes through.
        p.lse[static_cast<int64_t>(head) * p.num_tokens + work.q_begin + token] =
            l == 0.f ? -INFINITY : (m + log2f(l)) * kLn2;
      }
    }
    factor[i] = l == 0.f ? 0.f : __fdiv_rn(scale, l);
  }
}

// Named barriers of the consumers' turns.
constexpr uint32_t kTurn = 1;

template <typename Config>
struct ConsumerRings {
  RingPosition key, value;
  uint32_t query_parity = 0;
};

// The lane's two rows of the output; t = lane % 4.  Rotated ones have the columns of
// WgmmaImage::rotation_dim.
template <typename Config>
__device__ __forceinline__ void write_rows(const AttentionParams& p, const CtaWork& work, int group,
                                           int row, int t, const float (&o)[Config::kOutRegs]) {
  constexpr int D = Config::D;
  const uint64_t bits = reinterpret_cast<uintptr_t>(p.out) |
                        static_cast<uint64_t>(p.out_token_stride * 2) |
                        static_cast<uint64_t>(p.out_head_stride * 2);
  const bool rotated = p.out_rotation != nullptr;
  const auto pack = [&](float x, float y) {
    return p.dtype == DType::kBFloat16 ? ptx::pack_bf16x2(x, y) : ptx::pack_f16x2(x, y);
  };
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int packed = work.first_row + row + 8 * i;
    if (packed >= work.num_rows) continue;
    const int token = packed / group;
    uint16_t* dst = static_cast<uint16_t*>(p.out) + (work.q_begin + token) * p.out_token_stride +
                    (work.first_head + packed - token * group) * p.out_head_stride;
    if (rotated && bits % 16 == 0) {
#pragma unroll
      for (int b = 0; b < D / 32; ++b) {
        uint32_t w[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          w[e] = pack(o[4 * (4 * b + e) + 2 * i], o[4 * (4 * b + e) + 2 * i + 1]);
        }
        *reinterpret_cast<uint4*>(dst + 32 * b + 8 * t) = make_uint4(w[0], w[1], w[2], w[3]);
      }
      continue;
    }
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      const int dim = rotated ? Config::Image::rotation_dim(j, t) : 8 * j + 2 * t;
      sm80::store_pair(dst + dim, o[4 * j + 2 * i], o[4 * j + 2 * i + 1], p.dtype, bits % 4 == 0);
    }
  }
}

// o = a R, tile `kPart` of R's rows and those after it.
template <typename Config, int kPart>
__device__ __forceinline__ void rotate_output(const uint32_t (&a)[Config::kOutRegs / 8][4],
                                              uint32_t smem, RingPosition& value, int lane,
                                              float (&o)[Config::kOutRegs]) {
  using Value = typename Config::Image::Value;
  constexpr int kFirst = kPart * Config::kTile;
  constexpr int kRows = Config::D - kFirst < Config::kTile ? Config::D - kFirst : Config::kTile;
  uint32_t part[kRows / 16][4];
#pragma unroll
  for (int k = 0; k < kRows / 16; ++k) {
#pragma unroll
    for (int e = 0; e < 4; ++e) part[k][e] = a[kFirst / 16 + k][e];
  }
  ptx::mbarrier_wait(smem + Config::value_full(value.stage), value.parity);
  ptx::wgmma_fence();
  issue_values<Value>(part, smem + Config::kValues + value.stage * Value::kBytes, o, kPart > 0);
  ptx::wgmma_wait<0>();
  ptx::wgmma_hold(o);
  __syncwarp();  // every lane is done with the stage: there may be more tiles than stages
  if (lane == 0) ptx::mbarrier_arrive(smem + Config::value_empty(value.stage));
  value.advance<Config::kStages>();
  if constexpr (kPart + 1 < Config::Image::kRotationTiles) {
    rotate_output<Config, kPart + 1>(a, smem, value, lane, o);
  }
}

// One work of the warpgroup's 64 rows.
template <typename Config>
__device__ __forceinline__ void attend(const AttentionParams& p, const CtaWork& work, uint32_t smem,
                                       ConsumerRings<Config>& rings) {
  constexpr int D = Config::D;
  using Image = typename Config::Image;
  RingPosition& key = rings.key;
  RingPosition& value = rings.value;
  const int group = p.num_q_heads / p.cache.num_kv_heads;
  const int consumer = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
  const int row = (threadIdx.x - 128) / 32 * 16 + lane / 4;  // in the CTA; and row + 8
  const uint32_t queries = smem + Config::kQuery + consumer * 64 * Config::Query::Codes::kRowBytes;

  LaneState rows;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int pos = work.pos0 + (work.first_row + row + 8 * i) / group;
    rows.hi[i] = min(work.num_keys - 1, pos + window_or_max(p.window_right));
    rows.lo[i] = pos - window_or_max(p.window_left);
    rows.m[i] = kMinusHuge;
    rows.l[i] = 0.f;
  }
  ptx::mbarrier_wait(smem + Config::query_full(), rings.query_parity);
  rings.query_parity ^= 1;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    rows.scale[i] =
        ptx::ld_shared_f32(smem + Config::kQuery + Config::Query::kScales + 4 * (row + 8 * i));
  }

  float o[Config::kOutRegs];
#pragma unroll
  for (int i = 0; i < Config::kOutRegs; ++i) o[i] = 0.f;
  const auto release = [&](uint32_t barrier) {
    __syncwarp();  // every lane is done with the stage
    if (lane == 0) ptx::mbarrier_arrive(barrier);
  };

  if (work.num_tiles > 0) {
    int32_t acc[Config::kScoreRegs];
    float x[Config::kScoreRegs];
    uint32_t weights[Config::kScoreRegs / 8][4];
    float alpha[2];
    // Scores of the tile in `acc` to probabilities in x.
    const auto tile_softmax = [&](int tile, int stage) {
      scale_scores(smem + Config::kNorms + stage * Image::kNormBytes, acc, x);
      release(smem + Config::key_empty(stage));
      if (p.softcap > 0.f) cap_scores(p.softcap, rows, x);
      const int first_key = work.key_begin + tile * Config::kTile;
      if (first_key < work.full_begin || first_key + Config::kTile > work.full_end) {
        mask_scores(first_key, rows, x);
      }
      return softmax(x, rows, alpha);
    };

    int tile = work.num_tiles - 1;
    ptx::mbarrier_wait(smem + Config::key_full(key.stage), key.parity);
    ptx::wgmma_fence();
    issue_qk<D>(queries, smem + Config::kKeys + key.stage * Image::Key::kBytes, acc);
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(acc);
    if (tile == 0) release(smem + Config::query_empty());
    tile_softmax(tile, key.stage);  // O is zero: nothing to rescale
    key.advance<Config::kStages>();
    pack_operand(x, weights);

    if (consumer == Config::kConsumers - 1) ptx::named_barrier_arrive(kTurn, 256);
    for (--tile; tile >= 0; --tile) {
      ptx::mbarrier_wait(smem + Config::key_full(key.stage), key.parity);
      ptx::named_barrier_sync(kTurn + consumer, 256);
      ptx::wgmma_fence();
      issue_qk<D>(queries, smem + Config::kKeys + key.stage * Image::Key::kBytes, acc);
      ptx::mbarrier_wait(smem + Config::value_full(value.stage), value.parity);
      issue_values<typename Image::Value>(
          weights, smem + Config::kValues + value.stage * Image::Value::kBytes, o, true);
      ptx::named_barrier_arrive(kTurn + (consumer + 1) % Config::kConsumers, 256);
      ptx::wgmma_wait<1>();
      ptx::wgmma_hold(acc);
      if (tile == 0) release(smem + Config::query_empty());
      const bool moved = tile_softmax(tile, key.stage);
      key.advance<Config::kStages>();
      // A branch that is never taken, on something that needs every exponential: without it ptxas
      // moves them behind the wait, where they no longer run beside the product.
      if (rows.l[0] + rows.l[1] < 0.f) asm volatile("nanosleep.u32 1;" ::: "memory");
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(o);
      release(smem + Config::value_empty(value.stage));
      value.advance<Config::kStages>();
      if (moved) scale_rows(o, alpha);
      pack_operand(x, weights);
    }
    if (consumer == 0) ptx::named_barrier_sync(kTurn, 256);
    ptx::mbarrier_wait(smem + Config::value_full(value.stage), value.parity);
    ptx::wgmma_fence();
    issue_values<typename Image::Value>(
        weights, smem + Config::kValues + value.stage * Image::Value::kBytes, o, true);
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(o);
    release(smem + Config::value_empty(value.stage));
    value.advance<Config::kStages>();
  } else {
    release(smem + Config::query_empty());
  }

  float factor[2];
  finish_rows<Config>(p, work, group, row, rows, factor);
  scale_rows(o, factor);
  if (p.out_rotation != nullptr) {
    // O / l is bounded by the largest |V'|, an fp16 number: it fits.
    uint32_t a[Config::kOutRegs / 8][4];
    pack_operand(o, a);
    rotate_output<Config, 0>(a, smem, value, lane, o);
  }

  write_rows<Config>(p, work, group, row, lane % 4, o);
}

template <typename Config>
__device__ __forceinline__ void consume(const AttentionParams& p, uint32_t smem) {
  ConsumerRings<Config> rings;
  RingPosition slot;
  while (true) {
    ptx::mbarrier_wait(smem + Config::work_full(slot.stage), slot.parity);
    const CtaWork work = read_work(smem + Config::work(slot.stage));
    __syncwarp();  // every lane has read it
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(smem + Config::work_empty(slot.stage));
    if (work.num_tiles < 0) return;
    attend<Config>(p, work, smem, rings);
    slot.advance<Config::kWorkSlots>();
  }
}

template <int D>
__global__ void __launch_bounds__(PrefillConfig<D>::kThreads, 1)
    wgmma_prefill_kernel(const __grid_constant__ AttentionParams p,
                         const __grid_constant__ TileWorkspace w,
                         const __grid_constant__ PrefillBuffers buffers, int pass) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Config = PrefillConfig<D>;
  ptx::allow_dependent_launch();
  // The host plans passes for the longest keys that there may be: often there are none left for the
  // later ones, which then need not look at every work.
  if (pass > 0 &&
      tiles_before<Config>(p, p.num_seqs) * p.cache.num_kv_heads < pass * w.pass_tiles) {
    return ptx::wait_for_predecessor();  // see the end of tile_expand.cuh
  }
  const uint32_t smem =
      round_up(ptx::smem_address(ptx::dynamic_shared()), static_cast<uint32_t>(Config::kAlign));
  if (threadIdx.x == 0) {
    for (int i = 0; i < Config::kPairs; ++i) {
      ptx::mbarrier_init(smem + Config::full(i), 1);
      ptx::mbarrier_init(smem + Config::empty(i), Config::kConsumerWarps);
    }
    ptx::mbarrier_fence_init();
  }
  __syncthreads();  // the barriers are ready
  if (threadIdx.x < 128) {
    ptx::give_registers<Config::kProducerRegisters>();
    if (threadIdx.x < kWarpSize) produce<Config>(p, w, buffers, pass, smem);
  } else {
    ptx::take_registers<Config::kConsumerRegisters>();
    consume<Config>(p, smem);
  }
#endif
}

}  // namespace tq4::sm90
