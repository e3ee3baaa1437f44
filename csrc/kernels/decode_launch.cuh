// Host side shared by the decode kernels: dependent launches, dispatch on the head dimension.
#pragma once
#include <stdexcept>

#include "../device/decode_kernel.cuh"
#include "../device/launch.h"
#include "head_dim.h"

namespace tq4 {

template <int D, DecodeMode kMode, bool kBulk, bool kWide>
void launch_decode_config(const AttentionParams& p, const DecodePlan& plan, Stream stream) {
  using Config = DecodeConfig<D, kMode, kBulk, kWide>;
  launch_dependent_kernel(plan.overlapped, decode_kernel<Config>, dim3(plan.grid),
                          dim3(Config::kThreads), plan.smem_bytes, stream, p, plan);
}

template <bool kBulk, bool kWide>
void launch_decode_int8_with(const AttentionParams& p, const DecodePlan& plan, Stream stream) {
  dispatch_head_dim(p.cache.head_dim, [&](auto d) {
    // Rows of the smaller head dimensions, merged or not, are always aligned enough.
    if constexpr (kWide || d >= 128) {
      if constexpr (d != 256) {
        if (plan.mode == DecodeMode::kInt8Rows16) {
          return launch_decode_config<d, DecodeMode::kInt8Rows16, kBulk, kWide>(p, plan, stream);
        }
      }
      launch_decode_config<d, DecodeMode::kInt8Rows8, kBulk, kWide>(p, plan, stream);
    } else {
      throw std::logic_error("decode: no kernel for unaligned rows of this head dimension");
    }
  });
}

}  // namespace tq4
