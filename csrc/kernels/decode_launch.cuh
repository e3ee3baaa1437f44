// Host side shared by the decode kernels: dependent launches, dispatch on the head dimension.
#pragma once
#include <stdexcept>
#include <type_traits>

#include "../device/decode_kernel.cuh"
#include "../device/launch.h"
#include "head_dim.h"
#include "page_maps.h"

namespace tq4 {

template <int D, DecodeMode kMode, bool kBulk, bool kWide>
void launch_decode_config(const AttentionParams& p, const DecodePlan& plan, Stream stream) {
  using Config = DecodeConfig<D, kMode, kBulk, kWide>;
  typename DecodePipeline<Config>::Maps maps{};
  if constexpr (kBulk) {
    if (plan.boxes) maps = sm90::make_page_maps(p.cache, plan.copy.stage);
  }
  launch_dependent_kernel(plan.overlapped, decode_kernel<Config>, dim3(plan.grid),
                          dim3(Config::kThreads), plan.smem_bytes, stream, p, plan, maps);
}

template <int D, bool kBulk, bool kWide>
void launch_decode_int8_config(const AttentionParams& p, const DecodePlan& plan, Stream stream) {
  if constexpr (D != 256) {
    if (plan.mode == DecodeMode::kInt8Rows16) {
      return launch_decode_config<D, DecodeMode::kInt8Rows16, kBulk, kWide>(p, plan, stream);
    }
    if constexpr (kBulk) {
      if (plan.mode == DecodeMode::kInt8Rows32) {
        return launch_decode_config<D, DecodeMode::kInt8Rows32, kBulk, kWide>(p, plan, stream);
      }
    }
  }
  launch_decode_config<D, DecodeMode::kInt8Rows8, kBulk, kWide>(p, plan, stream);
}

// Calls launch(D, kWide) with types that hold the head dimension and plan.wide.
template <typename Launch>
void dispatch_rows(const AttentionParams& p, const DecodePlan& plan, Launch&& launch) {
  dispatch_head_dim(p.cache.head_dim, [&](auto d) {
    if (plan.wide) return launch(d, std::true_type{});
    if constexpr (reads_unaligned(d)) {
      launch(d, std::false_type{});
    } else {
      throw std::logic_error("decode: no kernel for unaligned rows of this head dimension");
    }
  });
}

}  // namespace tq4
