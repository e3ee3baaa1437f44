// Host side of the mma.sync prefill kernels that read pages.
#pragma once
#include "../device/launch.h"
#include "../device/page_copy.h"
#include "sm80_prefill.cuh"
#include "sm80_prefill_launch.cuh"

namespace tq4::sm80 {

template <bool kInt8>
void launch_prefill_pages(const AttentionParams& p, Stream stream) {
  dispatch_head_dim(p.cache.head_dim, [&](auto d) {
    using Config = PrefillConfig<d, kInt8>;
    launch_kernel(prefill_kernel<Config>, dim3(prefill_grid<Config>(p)), dim3(Config::kThreads),
                  Config::kSmemBytes, stream, p, copy_width(p.cache), block_shift(p.cache));
  });
}

}  // namespace tq4::sm80
