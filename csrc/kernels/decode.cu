// launch_decode: the plan, the two small kernels, and the choice of the main one.
#include "decode.h"

#include <algorithm>
#include <cstdint>

#include "../device/decode_combine.cuh"
#include "../device/decode_plan.h"
#include "../device/decode_prepare.cuh"
#include "decode_launch.cuh"
#include "decode_steps.h"

namespace tq4 {

#ifdef TQ4_HAS_SM90A
constexpr bool kHasBulkKernels = true;
#else
constexpr bool kHasBulkKernels = false;
#endif

void launch_decode_prepare(const AttentionParams& p, const DecodePlan&plan, Stream stream) {
  const int64_t rows = static_cast<int64_t>(p.num_tokens) * p.num_q_heads;
  const int64_t grid = ceil_div<int64_t>(rows, kPrepareRows);
  if (grid > INT32_MAX) throw std::invalid_argument("q: too many query tokens for one call");
  dispatch_head_dim(p.cache.head_dim, [&](auto d) {
    launch_kernel(decode_prepare_kernel<d>, dim3(static_cast<unsigned>(grid)), dim3(prepare_threads<d>()),
                  0, stream, p, plan);
  });
}

void launch_decode_combine(const AttentionParams& p, const DecodePlan& plan, Stream stream) {
  const int64_t rows = static_cast<int64_t>(p.num_seqs) * p.max_query_len * p.num_q_heads;
  // As few rows a CTA as fill the device, in powers of two.
  int rows_per_cta = 1;
  while (rows_per_cta < kCombineMaxRows && rows > static_cast<int64_t>(rows_per_cta) * p.num_sms) {
    rows_per_cta *= 2;
  }
  const int64_t grid = ceil_div<int64_t>(rows, rows_per_cta);
  if (grid > INT32_MAX) throw std::invalid_argument("q: too many query tokens for one call");
  dispatch_head_dim(p.cache.head_dim, [&](auto d) {
    launch_dependent_kernel(p.arch, decode_combine_kernel<d>, dim3(static_cast<unsigned>(grid)),
                            dim3(kCombineThreads), 0, stream, p, plan, rows_per_cta);
  });
}

int64_t decode_workspace_bytes(const AttentionParams& p) {
  return p.num_seqs == 0 || p.num_tokens == 0 ? 0 : make_decode_plan(p, kHasBulkKernels).workspace_bytes;
}

void launch_decode(const AttentionParams& p, Stream stream) {
  if (p.num_seqs == 0 || p.num_tokens == 0) return;
  const DecodePlan plan = make_decode_plan(p, kHasBulkKernels);
  if (p.workspace == nullptr || reinterpret_cast<uintptr_t>(p.workspace) % 16 != 0) {
    throw std::invalid_argument("workspace: expected decode_workspace_bytes() bytes, 16-byte aligned");
  }
  launch_decode_prepare(p, plan, stream);
  if (!p.int8) {
    sm80::launch_decode_fp16(p, plan, stream);
#ifdef TQ4_HAS_SM90A
  } else if (plan.bulk) {
    sm90::launch_decode_int8(p, plan, stream);
#endif
  } else {
    sm80::launch_decode_int8(p, plan, stream);
  }
  launch_decode_combine(p, plan, stream);
}

}  // namespace tq4
