// Host side of the mma.sync prefill kernels: grid and dispatch on the head dimension.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../device/prefill_schedule.cuh"
#include "../params.h"

namespace tq4::sm80 {

template <typename Config>
unsigned prefill_grid(const AttentionParams& p) {
  const int group = p.num_q_heads / p.cache.num_kv_heads;
  const int64_t slots = prefill_slots(p.num_tokens, group, Config::kRows, p.num_seqs);
  const int64_t grid = slots * p.cache.num_kv_heads;
  if (grid > INT32_MAX) throw std::invalid_argument("q: too many query tokens for one call");
  return static_cast<unsigned>(grid);
}

template <typename Function>
auto dispatch_prefill_head_dim(int head_dim, Function&& function) {
  switch (head_dim) {
    case 64:
      return function(std::integral_constant<int, 64>{});
    case 96:
      return function(std::integral_constant<int, 96>{});
    case 128:
      return function(std::integral_constant<int, 128>{});
    case 256:
      return function(std::integral_constant<int, 256>{});
    default:
      throw std::invalid_argument("head_dim: expected 64, 96, 128 or 256, got " +
                                  std::to_string(head_dim));
  }
}

}  // namespace tq4::sm80
