// Host side of the mma.sync prefill kernels: grid, shared memory, dispatch on the head dimension.
#pragma once
#include <stdexcept>
#include <string>

#include "../device/launch.h"
#include "../device/page_copy.h"
#include "sm80_prefill.cuh"

namespace tq4::sm80 {

template <int D, bool kInt8>
void launch_prefill_config(const AttentionParams& p, Stream stream) {
  using Config = PrefillConfig<D, kInt8>;
  const int group = p.num_q_heads / p.cache.num_kv_heads;
  const int64_t slots = prefill_slots(p.num_tokens, group, Config::kRows, p.num_seqs);
  const int64_t grid = slots * p.cache.num_kv_heads;
  if (grid > INT32_MAX) throw std::invalid_argument("q: too many query tokens for one call");
  launch_kernel(prefill_kernel<Config>, static_cast<unsigned>(grid), Config::kThreads,
                Config::kSmemBytes, stream, p, copy_width(p.cache), block_shift(p.cache));
}

template <bool kInt8>
void launch_prefill_mode(const AttentionParams& p, Stream stream) {
  switch (p.cache.head_dim) {
    case 64: return launch_prefill_config<64, kInt8>(p, stream);
    case 96: return launch_prefill_config<96, kInt8>(p, stream);
    case 128: return launch_prefill_config<128, kInt8>(p, stream);
    case 256: return launch_prefill_config<256, kInt8>(p, stream);
    default:
      throw std::invalid_argument("head_dim: expected 64, 96, 128 or 256, got " +
                                  std::to_string(p.cache.head_dim));
  }
}

}  // namespace tq4::sm80
