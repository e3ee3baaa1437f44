// TQ4 prefill by wgmma: sm_90a.
//
//   prepare_queries  q8 = round(q R^T / s_q), row scales                       -> workspace
//   expand_tiles     pages -> int8 K, fp16 V' and norms, once a tile           -> workspace
//   wgmma_prefill    S = s_q s_c sm_scale n_k (q8 . k8), O = softmax(S) V', out = (O / l) R
//
// Unpacking inside this kernel would cost every CTA what the pre-pass costs once, and its issue
// slots are what the softmax needs.
//
// A CTA owns 128 packed rows (row = token * G + head of the group) of one sequence and KV head.
//
//   warpgroup 0     producer: one thread; bulk copies workspace -> rings of K tiles and V tiles
//   warpgroups 1, 2 consumers: 64 rows each
//
//   consumer   tile      0           1           2
//   tensor             QK0 |  QK1   PV0  |  QK2   PV1  | ...
//   softmax                 S0         S1 (beside PV0)
//
// The consumers take turns: while one issues its products the other is in its softmax.
//
// Barriers, per stage of each ring: full (the copy has landed) and empty (8 consumer warps are done).
// K and V have rings of their own, as a K tile is done with one product earlier.  After the last
// tile the V ring brings the matrix of the output rotation, in tiles like those of V.
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
  static constexpr int kConsumers = 2;  // warpgroups
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kConsumerWarps = 4 * kConsumers;
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kTile = Image::kTileTokens;
  static constexpr int kStages = D == 64 ? 6 : D == 256 ? 3 : 4;
  static constexpr int kScoreRegs = kTile / 2;  // accumulators of S a lane
  static constexpr int kOutRegs = D / 2;        // of O
  static_assert(kRows == Query::kRows, "one query image a CTA");

  static constexpr int kAlign = 1024;  // the 128-byte swizzle repeats
  static constexpr int kQuery = 0;
  static constexpr int kKeys = round_up(Query::kBytes, kAlign);
  static constexpr int kValues = kKeys + kStages * Image::Key::kBytes;
  static constexpr int kNorms = kValues + kStages * Image::Value::kBytes;
  static constexpr int kBarriers = kNorms + kStages * Image::kNormBytes;
  static constexpr int kPlace = round_up(kBarriers + 8 * (1 + 4 * kStages), 16);
  static constexpr int kSmemBytes = kAlign + kPlace + 16;
  static_assert(kSmemBytes <= 227 * 1024, "shared memory of an SM");
  static_assert(Image::Key::kBytes % kAlign == 0 && Image::Value::kBytes % kAlign == 0);

  TQ4_HOST_DEVICE static constexpr int query_full() { return kBarriers; }
  TQ4_HOST_DEVICE static constexpr int key_full(int s) { return kBarriers + 8 * (1 + s); }
  TQ4_HOST_DEVICE static constexpr int key_empty(int s) { return key_full(kStages + s); }
  TQ4_HOST_DEVICE static constexpr int value_full(int s) { return key_full(2 * kStages + s); }
  TQ4_HOST_DEVICE static constexpr int value_empty(int s) { return key_full(3 * kStages + s); }
};

// Offsets in the workspace.
struct PrefillBuffers {
  int64_t queries, rotation;
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

// What the CTA works on: the same in every thread.
struct CtaWork {
  PrefillTile tile;
  int num_keys, pos0, num_rows, group;
  int first_head;
  int key_begin;  // of tile 0 of the CTA
  int num_tiles;
  int full_begin, full_end;  // tiles inside need no mask
};

template <typename Config>
__device__ __forceinline__ void produce(const TileWorkspace& w, const uint8_t* query_image,
                                        const uint8_t* rotation_image, int64_t first_tile,
                                        int num_tiles, uint32_t smem) {
  using Image = typename Config::Image;
  ptx::mbarrier_arrive_expect_bytes(smem + Config::query_full(), Config::Query::kBytes);
  ptx::bulk_copy_to_shared(smem + Config::kQuery, query_image, Config::Query::kBytes,
                           smem + Config::query_full());
  RingPosition key, value;
  value.parity = key.parity = 1;  // a fresh ring is empty
  const auto image = [&](int tile) { return w.tiles + (first_tile + tile) * w.tile_bytes; };
  const auto copy_values = [&](const uint8_t* source) {
    const uint32_t full = smem + Config::value_full(value.stage);
    ptx::mbarrier_wait(smem + Config::value_empty(value.stage), value.parity);
    ptx::mbarrier_arrive_expect_bytes(full, Image::Value::kBytes);
    ptx::bulk_copy_to_shared(smem + Config::kValues + value.stage * Image::Value::kBytes, source,
                             Image::Value::kBytes, full);
    value.advance<Config::kStages>();
  };
  // In the order in which the consumers want them: K of the next tile before V of this one.
  for (int i = num_tiles - 1; i >= -1; --i) {
    if (i >= 0) {
      const uint32_t full = smem + Config::key_full(key.stage);
      ptx::mbarrier_wait(smem + Config::key_empty(key.stage), key.parity);
      ptx::mbarrier_arrive_expect_bytes(full, Image::Key::kBytes + Image::kNormBytes);
      ptx::bulk_copy_to_shared(smem + Config::kKeys + key.stage * Image::Key::kBytes, image(i),
                               Image::Key::kBytes, full);
      ptx::bulk_copy_to_shared(smem + Config::kNorms + key.stage * Image::kNormBytes,
                               image(i) + Image::kNorms, Image::kNormBytes, full);
      key.advance<Config::kStages>();
    }
    if (i + 1 < num_tiles) copy_values(image(i + 1) + Image::kValues);
  }
  if (rotation_image != nullptr) {
    for (int i = 0; i < Image::kRotationTiles; ++i) {
      copy_values(rotation_image + i * Image::Value::kBytes);
    }
  }
}

// Denominator, LSE and the factor of the output, of the lane's two rows.
template <typename Config>
__device__ __forceinline__ void finish_rows(const AttentionParams& p, const CtaWork& work, int row,
                                            LaneState& rows, float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float l = rows.l[i], m = rows.m[i];
    l += __shfl_xor_sync(kFullWarp, l, 1);
    l += __shfl_xor_sync(kFullWarp, l, 2);
    float scale = 1.f;
    const int packed = work.tile.first_row + row + 8 * i;
    if (packed < work.num_rows) {
      const int token = packed / work.group;
      const int head = work.first_head + packed - token * work.group;
      if (p.sinks != nullptr) {  // one more term of the denominator, with no value
        const float sink = p.sinks[head] * kLog2e;
        const float top = fmaxf(m, sink);
        scale = ptx::exp2_approx(m - top);
        l = l * scale + ptx::exp2_approx(sink - top);
        m = top;
      }
      if (p.lse != nullptr && threadIdx.x % 4 == 0) {
        // l = 0: no visible key.  NaN goes through.
        p.lse[static_cast<int64_t>(head) * p.num_tokens + work.tile.q_begin + token] =
            l == 0.f ? -INFINITY : (m + log2f(l)) * kLn2;
      }
    }
    factor[i] = l == 0.f ? 0.f : __fdiv_rn(scale, l);
  }
}

// Named barriers of the consumers' turns.
constexpr uint32_t kTurn = 1;

template <typename Config>
__device__ __forceinline__ void consume(const AttentionParams& p, const CtaWork& work,
                                        uint32_t smem) {
  constexpr int D = Config::D;
  using Image = typename Config::Image;
  const int consumer = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
  const int row = (threadIdx.x - 128) / 32 * 16 + lane / 4;  // in the CTA; and row + 8
  const uint32_t queries = smem + Config::kQuery + consumer * 64 * Config::Query::Codes::kRowBytes;

  LaneState rows;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int pos = work.pos0 + (work.tile.first_row + row + 8 * i) / work.group;
    rows.hi[i] = min(work.num_keys - 1, pos + window_or_max(p.window_right));
    rows.lo[i] = pos - window_or_max(p.window_left);
    rows.m[i] = kMinusHuge;
    rows.l[i] = 0.f;
  }
  ptx::mbarrier_wait(smem + Config::query_full(), 0);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    rows.scale[i] = ptx::ld_shared_f32(smem + Config::kQuery + Config::Query::kScales +
                                       4 * (row + 8 * i));
  }

  float o[Config::kOutRegs];
#pragma unroll
  for (int i = 0; i < Config::kOutRegs; ++i) o[i] = 0.f;
  RingPosition key, value;
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
    tile_softmax(tile, key.stage);  // O is zero: nothing to rescale
    key.advance<Config::kStages>();
    pack_operand(x, weights);

#ifdef TQ4_TURNS
    if (consumer == 1) ptx::named_barrier_arrive(kTurn, 256);
#endif
    for (--tile; tile >= 0; --tile) {
      ptx::mbarrier_wait(smem + Config::key_full(key.stage), key.parity);
#ifdef TQ4_TURNS
      ptx::named_barrier_sync(kTurn + consumer, 256);
#endif
      ptx::wgmma_fence();
      issue_qk<D>(queries, smem + Config::kKeys + key.stage * Image::Key::kBytes, acc);
      ptx::mbarrier_wait(smem + Config::value_full(value.stage), value.parity);
      issue_values<typename Image::Value>(
          weights, smem + Config::kValues + value.stage * Image::Value::kBytes, o, true);
#ifdef TQ4_TURNS
      ptx::named_barrier_arrive(kTurn + 1 - consumer, 256);
#endif
      ptx::wgmma_wait<1>();
      ptx::wgmma_hold(acc);
      const bool moved = tile_softmax(tile, key.stage);
      key.advance<Config::kStages>();
      ptx::wgmma_hold(x);  // the compiler would move the exponentials behind the wait
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(o);
      release(smem + Config::value_empty(value.stage));
      value.advance<Config::kStages>();
      if (moved) scale_rows(o, alpha);
      pack_operand(x, weights);
    }
#ifdef TQ4_TURNS
    if (consumer == 0) ptx::named_barrier_sync(kTurn, 256);
#endif
    ptx::mbarrier_wait(smem + Config::value_full(value.stage), value.parity);
    ptx::wgmma_fence();
    issue_values<typename Image::Value>(
        weights, smem + Config::kValues + value.stage * Image::Value::kBytes, o, true);
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(o);
    release(smem + Config::value_empty(value.stage));
    value.advance<Config::kStages>();
  }

  float factor[2];
  finish_rows<Config>(p, work, row, rows, factor);
  scale_rows(o, factor);
  if (p.out_rotation != nullptr) {
    // O / l is bounded by the largest |V'|, an fp16 number: it fits.
    uint32_t a[Config::kOutRegs / 8][4];
    pack_operand(o, a);
    constexpr int kSteps = (D < Config::kTile ? D : Config::kTile) / 16;
#pragma unroll
    for (int i = 0; i < Image::kRotationTiles; ++i) {
      uint32_t part[kSteps][4];
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
#pragma unroll
        for (int e = 0; e < 4; ++e) part[k][e] = a[i * kSteps + k][e];
      }
      ptx::mbarrier_wait(smem + Config::value_full(value.stage), value.parity);
      ptx::wgmma_fence();
      issue_values<typename Image::Value>(
          part, smem + Config::kValues + value.stage * Image::Value::kBytes, o, i > 0);
      ptx::wgmma_wait<0>();
      ptx::wgmma_hold(o);
      release(smem + Config::value_empty(value.stage));  // there may be more tiles than stages
      value.advance<Config::kStages>();
    }
  }

  const bool aligned4 =
      (reinterpret_cast<uintptr_t>(p.out) | (p.out_token_stride * 2) | (p.out_head_stride * 2)) %
          4 ==
      0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int packed = work.tile.first_row + row + 8 * i;
    if (packed >= work.num_rows) continue;
    const int token = packed / work.group;
    uint16_t* dst = static_cast<uint16_t*>(p.out) +
                    (work.tile.q_begin + token) * p.out_token_stride +
                    (work.first_head + packed - token * work.group) * p.out_head_stride;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      sm80::store_pair(dst + 8 * j + 2 * (lane % 4), o[4 * j + 2 * i], o[4 * j + 2 * i + 1],
                       p.dtype, aligned4);
    }
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
  uint8_t* const raw = ptx::dynamic_shared();
  const uint32_t smem = round_up(ptx::smem_address(raw), static_cast<uint32_t>(Config::kAlign));
  const int group = p.num_q_heads / p.cache.num_kv_heads;
  // KV heads innermost: CTAs that share tiles run side by side.
  const int kv_head = blockIdx.x % p.cache.num_kv_heads;
  const int64_t slots = gridDim.x / p.cache.num_kv_heads;
  const int64_t slot = slots - 1 - blockIdx.x / p.cache.num_kv_heads;

  CtaWork work;
  work.tile = find_prefill_tile(p.query_start_loc, p.num_seqs, group, Config::kRows, slot);
  if (work.tile.seq < 0) return ptx::wait_for_predecessor();  // see the end of tile_expand.cuh
  work.num_keys = p.seq_lens[work.tile.seq];
  work.pos0 = work.num_keys - work.tile.q_len;
  work.num_rows = work.tile.q_len * group;
  work.group = group;
  work.first_head = kv_head * group;
  const int last_row = min(work.tile.first_row + Config::kRows, work.num_rows) - 1;
  const int pos_first = work.pos0 + work.tile.first_row / group;
  const int pos_last = work.pos0 + last_row / group;
  const KeyRange keys =
      visible_keys(pos_first, pos_last, p.window_left, p.window_right, work.num_keys);
  const UnitKeys unit = unit_keys(work.num_keys, work.tile.q_len, p.window_left, Config::kTile);
  work.key_begin = keys.begin / Config::kTile * Config::kTile;
  work.num_tiles =
      keys.end > work.key_begin ? ceil_div(keys.end - work.key_begin, Config::kTile) : 0;
  work.full_begin = pos_last - window_or_max(p.window_left);
  work.full_end =
      min(work.num_keys, pos_first + min(window_or_max(p.window_right), kMaxWindow - 1) + 1);

  if (threadIdx.x == 0) {
    ptx::mbarrier_init(smem + Config::query_full(), 1);
    for (int s = 0; s < Config::kStages; ++s) {
      ptx::mbarrier_init(smem + Config::key_full(s), 1);
      ptx::mbarrier_init(smem + Config::key_empty(s), Config::kConsumerWarps);
      ptx::mbarrier_init(smem + Config::value_full(s), 1);
      ptx::mbarrier_init(smem + Config::value_empty(s), Config::kConsumerWarps);
    }
    ptx::mbarrier_fence_init();
  }
  if (threadIdx.x < kWarpSize) {
    // Tiles of the sequences before this one: where the unit lies, and in which pass.
    int64_t before = 0;
    for (int s = threadIdx.x; s < work.tile.seq; s += kWarpSize) {
      before += unit_keys(p.seq_lens[s], p.query_start_loc[s + 1] - p.query_start_loc[s],
                          p.window_left, Config::kTile)
                    .tiles;
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) before += __shfl_xor_sync(kFullWarp, before, step);
    const UnitPlace place = unit_place(w, before, unit.tiles, p.cache.num_kv_heads, kv_head);
    if (threadIdx.x == 0) {
      const uint64_t first = place.first_tile + (work.key_begin - unit.begin) / Config::kTile;
      ptx::st_shared_v4(smem + Config::kPlace, static_cast<uint32_t>(first),
                        static_cast<uint32_t>(first >> 32), place.pass, 0);
    }
  }
  __syncthreads();  // barriers and place are written
  const uint4 place = ptx::ld_shared_v4(smem + Config::kPlace);
  if (static_cast<int>(place.z) != pass) return ptx::wait_for_predecessor();

  if (threadIdx.x < 128) {
    ptx::give_registers<24>();
    if (threadIdx.x == 0) {
      ptx::wait_for_predecessor();  // queries, rotation and tiles are in the workspace
      const auto* workspace = static_cast<const uint8_t*>(p.workspace);
      const int64_t image = slot * p.cache.num_kv_heads + kv_head;
      produce<Config>(w, workspace + buffers.queries + image * Config::Query::kBytes,
                      p.out_rotation == nullptr ? nullptr : workspace + buffers.rotation,
                      static_cast<int64_t>(static_cast<uint64_t>(place.y) << 32 | place.x),
                      work.num_tiles, smem);
    }
  } else {
    ptx::take_registers<240>();
    consume<Config>(p, work, smem);
  }
#endif
}

}  // namespace tq4::sm90
