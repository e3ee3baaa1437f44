// The end of a segment: the teams' results become one, in shared memory, and that one goes to the
// workspace as a partial result.
//
// Teams merge pairwise in rounds: in a round of `half`, team half + i sends to team i.  The order
// is fixed, so results repeat bit for bit.  A sender's accumulators pass through shared memory
// merge_quads() quads at a time; a quad is 16 bytes a lane, consecutive lanes side by side: no
// conflicts.
#pragma once
#include <cstdint>

#include "../params.h"
#include "../ptx/mbarrier.cuh"
#include "decode_plan.h"
#include "decode_step.cuh"

namespace tq4 {

constexpr uint32_t kConsumerBarrier = 1;  // of the active consumer warps

// Where a (team, slot) stands.
struct TeamPlace {
  int team, slot;
  int teams, slots;
  uint32_t exchange;  // shared address of the exchange area

  __device__ __forceinline__ void sync() const {
    ptx::named_barrier_sync(kConsumerBarrier, teams * slots * kWarpSize);
  }
};

template <typename Config>
__device__ __forceinline__ void merge_round(const TeamPlace& place, int half,
                                            DecodeState<Config>& state) {
  constexpr int kQuads = Config::Map::kValueTiles * Config::kOctets;
  constexpr int kPass = merge_quads(Config::kBulk) < kQuads ? merge_quads(Config::kBulk) : kQuads;
  const uint32_t lane = threadIdx.x % kWarpSize;
  const bool sends = place.team >= half && place.team < 2 * half;
  const bool receives = place.team < half && place.team + half < place.teams;
  const int sender = (sends ? place.team - half : place.team) * place.slots + place.slot;
  const uint32_t area = place.exchange + sender * merge_area_bytes(Config::kBulk, Config::kOctets);
  const uint32_t stats = area + kPass * 16 * kWarpSize + 4 * lane;

  float own_factor[2 * Config::kOctets],
      other_factor[2 * Config::kOctets];  // of columns 2 t, 2 t + 1
#pragma unroll
  for (int begin = 0; begin < kQuads; begin += kPass) {
    place.sync();  // the area is free: its last readers are past it
    if (sends) {
#pragma unroll
      for (int q = begin; q < begin + kPass && q < kQuads; ++q) {
        const float (&quad)[4] = state.o[q / Config::kOctets][q % Config::kOctets];
        ptx::st_shared_v4(area + ((q - begin) * kWarpSize + lane) * 16, __float_as_uint(quad[0]),
                          __float_as_uint(quad[1]), __float_as_uint(quad[2]),
                          __float_as_uint(quad[3]));
      }
      if (begin == 0) {
#pragma unroll
        for (int i = 0; i < Config::kOctets; ++i) {
          ptx::st_shared_u32(stats + 8 * i * kWarpSize, __float_as_uint(state.m[i]));
          ptx::st_shared_u32(stats + (8 * i + 4) * kWarpSize, __float_as_uint(state.l[i]));
        }
      }
    }
    place.sync();  // the senders' data is there
    if (receives) {
      if (begin == 0) {
#pragma unroll
        for (int i = 0; i < Config::kOctets; ++i) {
          const float other_m = ptx::ld_shared_f32(stats + 8 * i * kWarpSize);
          const float other_l = ptx::ld_shared_f32(stats + (8 * i + 4) * kWarpSize);
          const float m = fmaxf(state.m[i], other_m);
          const float own = ptx::exp2_approx(state.m[i] - m);
          const float other = ptx::exp2_approx(other_m - m);
          state.m[i] = m;
          state.l[i] = state.l[i] * own + other_l * other;
          const int t = lane % 4;
#pragma unroll
          for (int b = 0; b < 2; ++b) {
            own_factor[2 * i + b] = __shfl_sync(kFullWarp, own, 8 * t + 4 * b);
            other_factor[2 * i + b] = __shfl_sync(kFullWarp, other, 8 * t + 4 * b);
          }
        }
      }
#pragma unroll
      for (int q = begin; q < begin + kPass && q < kQuads; ++q) {
        const int i = q % Config::kOctets;
        float (&quad)[4] = state.o[q / Config::kOctets][i];
        const float4 other = ptx::ld_shared_v4f(area + ((q - begin) * kWarpSize + lane) * 16);
        quad[0] = quad[0] * own_factor[2 * i] + other.x * other_factor[2 * i];
        quad[1] = quad[1] * own_factor[2 * i + 1] + other.y * other_factor[2 * i + 1];
        quad[2] = quad[2] * own_factor[2 * i] + other.z * other_factor[2 * i];
        quad[3] = quad[3] * own_factor[2 * i + 1] + other.w * other_factor[2 * i + 1];
      }
    }
  }
}

// Leaves the sum of all teams in team 0.
template <typename Config>
__device__ __forceinline__ void merge_teams(const TeamPlace& place, DecodeState<Config>& state) {
  if (place.teams == 1) return;
  int half = 1;
  while (2 * half < place.teams) half *= 2;
#pragma unroll 1
  for (; half > 0; half /= 2) merge_round<Config>(place, half, state);
}

// One warp's rows: (m, l) by row, O by row and dimension, rows `pitch` floats apart.  `first` is
// the index of row 0 of the warp, `count` the rows of the warp that exist.
template <typename Config>
__device__ __forceinline__ void write_partial(float2* stats, float* out, int pitch, int64_t first,
                                              int count, float value_unit,
                                              const DecodeState<Config>& state) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < Config::kOctets; ++i) {
    float l = state.l[i];
    l += __shfl_xor_sync(kFullWarp, l, 1);
    l += __shfl_xor_sync(kFullWarp, l, 2);
    if (t == 0 && 8 * i + g < count) stats[first + 8 * i + g] = make_float2(state.m[i], l);
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const int row = 8 * i + 2 * t + b;
      if (row >= count) continue;
      float* dst = out + (first + row) * pitch;
#pragma unroll
      for (int m = 0; m < Config::Map::kValueTiles; m += 2) {
        *reinterpret_cast<float4*>(dst + Config::Map::value_dim(g, m)) =
            make_float4(state.o[m][i][b] * value_unit, state.o[m][i][2 + b] * value_unit,
                        state.o[m + 1][i][b] * value_unit, state.o[m + 1][i][2 + b] * value_unit);
      }
    }
  }
}

}  // namespace tq4
