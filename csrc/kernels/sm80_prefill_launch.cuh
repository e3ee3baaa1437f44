// Host side of the mma.sync prefill kernels: the grid.
#pragma once
#include <cstdint>
#include <stdexcept>

#include "../device/prefill_schedule.cuh"
#include "../params.h"
#include "head_dim.h"

namespace tq4::sm80 {

template <typename Config>
unsigned prefill_grid(const AttentionParams& p) {
  const int group = p.num_q_heads / p.cache.num_kv_heads;
  const int64_t slots = prefill_slots(p.num_tokens, group, Config::kRows, p.num_seqs);
  const int64_t grid = slots * p.cache.num_kv_heads;
  if (grid > INT32_MAX) throw std::invalid_argument("q: too many query tokens for one call");
  return static_cast<unsigned>(grid);
}

}  // namespace tq4::sm80
