// One warp, one tile of 16 tokens in a stage of shared memory: the steps of decode_step.cuh in
// order, and which keys are hidden.
#pragma once
#include <cstdint>

#include "../params.h"
#include "../ptx/smem.cuh"
#include "common.cuh"
#include "decode_plan.h"
#include "decode_step.cuh"

namespace tq4 {

// Keys of the tile that the lane's row 8 i + g may not see, bit 4 i + column.
template <typename Config>
__device__ __forceinline__ uint32_t hidden_columns(const AttentionParams& p, const DecodePlan& plan,
                                                   const DecodeSegment& segment, int first_row,
                                                   int tile) {
  const int g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4;
  uint32_t hidden = 0;
#pragma unroll
  for (int i = 0; i < Config::kOctets; ++i) {
    const auto query = static_cast<int>(plan.group_divider.quotient(first_row + 8 * i + g));
    const int position = segment.num_keys - segment.num_queries + query;
    const int64_t end = static_cast<int64_t>(position) + window_or_max(p.window_right) + 1;
    const int first_key = position - window_or_max(p.window_left);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int key = tile * kTileTokens + plan.token_map.token(c / 2, 2 * t + c % 2);
      if (key < first_key || key >= end || key >= segment.num_keys) hidden |= 1u << (4 * i + c);
    }
  }
  return hidden;
}

// Tiles that every row sees whole, from `begin` on: no mask.
struct UnmaskedTiles {
  int begin;
  uint32_t count;

  __device__ __forceinline__ static UnmaskedTiles make(const AttentionParams& p,
                                                       const DecodeSegment& segment) {
    const int first_position = segment.num_keys - segment.num_queries;
    const int64_t key_end =
        static_cast<int64_t>(first_position) + window_or_max(p.window_right) + 1;
    const int begin =
        ceil_div(max(0, segment.num_keys - 1 - window_or_max(p.window_left)), kTileTokens);
    const int end =
        static_cast<int>(max(int64_t{0}, min(key_end, int64_t{segment.num_keys}))) / kTileTokens;
    return {begin, static_cast<uint32_t>(max(0, end - begin))};
  }

  __device__ __forceinline__ bool has(int tile) const {
    return static_cast<uint32_t>(tile - begin) < count;
  }
};

// One tile.  release() is called by all lanes as soon as its last bytes are in registers; where
// `masked`, hidden() says what hidden_columns does.
template <typename Config, typename Release, typename Hidden>
__device__ __forceinline__ void consume_tile(
    const DecodePlan& plan, uint32_t stage, Release&& release, uint32_t lane_table,
    const LaneOffsets& at, const KeyCodes<Config>& key_codes, const DecodeRows<Config>& rows,
    float softcap, bool masked, Hidden&& hidden, DecodeState<Config>& state) {
  float s[Config::kOctets][4];
  compute_scores<Config>(stage + at.key, plan.code_step, lane_table, key_codes, rows,
                         plan.query_residual - plan.query_codes, s);

  float key_norm[4], value_norm[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) {  // column 2 t + c % 2 of n-tile c / 2
    const uint32_t norm = stage + at.norm[c % 2];
    key_norm[c] = ptx::ld_shared_f32(norm + (c < 2 ? 0 : plan.norm_step));
    value_norm[c] = ptx::ld_shared_f32(norm + (c < 2 ? plan.value_norms : plan.value_norms_step));
  }
  uint32_t words[4][Config::Map::kValueWords];
  const auto load_values = [&] {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      load_value_words<Config::D, Config::kWide>(stage + at.value[c % 2] + c / 2 * plan.code_step,
                                                 words[c]);
    }
    release();
  };
  if (Config::kWordsAhead > 0) load_values();
  uint32_t ahead[4 * Config::kWordsAhead + 1][4];
  expand_values<Config>(lane_table, words, 0, Config::kWordsAhead,
                        [&](int tile, const uint32_t (&a)[4]) {
#pragma unroll
                          for (int i = 0; i < 4; ++i) ahead[tile][i] = a[i];
                        });
  uint32_t weights[Config::kOctets][2];
  update_softmax<Config>(s, key_norm, value_norm, rows, softcap, masked,
                         static_cast<Hidden&&>(hidden), state, weights);
  if (Config::kWordsAhead == 0) load_values();
#pragma unroll
  for (int tile = 0; tile < 4 * Config::kWordsAhead; ++tile) {
    accumulate_tile<Config>(ahead[tile], tile, weights, state);
  }
  expand_values<Config>(
      lane_table, words, Config::kWordsAhead, Config::Map::kValueWords,
      [&](int tile, const uint32_t (&a)[4]) { accumulate_tile<Config>(a, tile, weights, state); });
}

}  // namespace tq4
