// launch_decode: the plan, the two small kernels, and the choice of the main one.
#include <algorithm>
#include <cstdint>

#include "../device/decode_combine.cuh"
#include "../device/decode_plan.h"
#include "../device/decode_prepare.cuh"
#include "../device/decode_prepare_light.cuh"
#include "decode.h"
#include "decode_launch.cuh"
#include "decode_steps.h"

namespace tq4 {

#ifdef TQ4_HAS_SM90A
constexpr bool kHasBulkKernels = true;
#else
constexpr bool kHasBulkKernels = false;
#endif

void launch_decode_prepare(const AttentionParams& p, const DecodePlan& plan, Stream stream) {
  dispatch_head_dim(p.cache.head_dim, [&](auto d) {
    if constexpr (is_power_of_two(d)) {
      if (plan.light_prepare) {
        return launch_kernel(decode_prepare_light_kernel<d>, dim3(plan.prepare_grid),
                             dim3(kPrepareRows * kWarpSize), 0, stream, p, plan);
      }
    }
    launch_kernel(decode_prepare_kernel<d>, dim3(plan.prepare_grid),
                  dim3(PrepareConfig<d>::kThreads), 0, stream, p, plan);
  });
}

void launch_decode_combine(const AttentionParams& p, const DecodePlan& plan, Stream stream) {
  const int64_t rows = static_cast<int64_t>(p.num_seqs) * p.max_query_len * p.num_q_heads;
  // As few rows a block as fill the device, in powers of two.
  int rows_per_block = 1;
  while (rows_per_block < kCombineRows && rows > static_cast<int64_t>(rows_per_block) * p.num_sms) {
    rows_per_block *= 2;
  }
  const int64_t blocks = ceil_div<int64_t>(rows, rows_per_block);
  dispatch_head_dim(p.cache.head_dim, [&](auto d) {
    const dim3 grid(static_cast<unsigned>(std::min<int64_t>(blocks, p.num_sms)));
    launch_dependent_kernel(plan.overlapped, decode_combine_kernel<d>, grid, dim3(kCombineThreads),
                            CombineConfig<d>::kSmemBytes, stream, p, plan, rows_per_block);
  });
}

DecodePlan plan_decode(const AttentionParams& p) {
#ifdef TQ4_HAS_SM90A
  if (p.arch == 90 && p.path != Path::kPortable) {
    return make_decode_plan(p, true, sm90::find_cluster_room());
  }
#endif
  return make_decode_plan(p, kHasBulkKernels);
}

int64_t decode_workspace_bytes(const AttentionParams& p) {
  return p.num_seqs == 0 || p.num_tokens == 0 ? 0 : plan_decode(p).workspace_bytes;
}

void launch_decode(const AttentionParams& p, Stream stream) {
  if (p.num_seqs == 0 || p.num_tokens == 0) return;
  DecodePlan plan = plan_decode(p);
#ifdef TQ4_HAS_SM90A
  if (plan.cluster > 0) return sm90::launch_decode_cluster(p, plan, stream);
#endif
  plan.overlapped = waits_for_predecessors(decode_combine_kernel<128>, p.arch);
  if (p.workspace == nullptr || reinterpret_cast<uintptr_t>(p.workspace) % 16 != 0) {
    throw std::invalid_argument(
        "workspace: expected decode_workspace_bytes() bytes, 16-byte aligned");
  }
  launch_decode_prepare(p, plan, stream);
  if (plan.mode == DecodeMode::kFp16Rows8) {
    sm80::launch_decode_fp16(p, plan, stream);
#ifdef TQ4_HAS_SM90A
  } else if (plan.mode == DecodeMode::kInt8x2Rows8) {
    sm90::launch_decode_int8x2(p, plan, stream);
  } else if (plan.bulk) {
    sm90::launch_decode_int8(p, plan, stream);
#endif
  } else {
    sm80::launch_decode_int8(p, plan, stream);
  }
  launch_decode_combine(p, plan, stream);
}

}  // namespace tq4
