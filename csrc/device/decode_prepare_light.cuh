// The prepare kernel of decode for rows that are rotated by butterflies, or not at all: a warp a
// row, no matrix to read, and so a third of the time of decode_prepare.cuh.
#pragma once
#include <cstdint>

#include "../params.h"
#include "../ptx/grid_dependency.cuh"
#include "common.cuh"
#include "decode_plan.h"
#include "decode_query.cuh"

namespace tq4 {

template <int D>
__global__ void __launch_bounds__(kPrepareRows* kWarpSize, 2)
    decode_prepare_light_kernel(const __grid_constant__ AttentionParams p,
                                const __grid_constant__ DecodePlan plan) {
  using Row = QueryRow<D>;
  ptx::allow_dependent_launch();
  auto* workspace = static_cast<uint8_t*>(p.workspace);
  const DecodeBatch batch = decode_batch(p, plan);
  const int num_rows = static_cast<int>(plan.query_rows);
  const int step = gridDim.x * kPrepareRows;
  const bool aligned = Row::is_aligned(p);
  // Starts the loads of a row, if it is there and has a token.
  const auto load = [&](int index, Row& row) {
    if (index >= num_rows) return false;
    const int place = static_cast<int>(plan.query_divider.quotient(index));
    const int64_t token = query_token(p, batch, place);
    if (token < 0) return false;
    row.load(static_cast<const uint16_t*>(p.q) + token * p.q_token_stride +
                 (index - place * p.num_q_heads) * p.q_head_stride,
             aligned);
    return true;
  };
  int index = blockIdx.x * kPrepareRows + threadIdx.x / kWarpSize;
  Row row, next;
  bool exists = load(index, row);
  float signs[Row::kDims];
  Row::load_signs(p.q_rotation, signs);
  clear_findings(p, plan);
  prefetch_batch(p);
  const float scale = unit_scale(p, plan);
#pragma unroll 1
  for (; index < num_rows; index += step) {
    const bool next_exists = load(index + step, next);
    if (exists) {
      row.unpack(p.dtype);
      if (p.q_rotation != nullptr) row.rotate(signs);
      const float unit = row.write(plan.mode, workspace + plan.query_codes,
                                   workspace + plan.query_residual, index);
      if (threadIdx.x % kWarpSize == 0) {
        reinterpret_cast<float*>(workspace + plan.query_scale)[index] = unit * scale;
      }
    }
    row = next;
    exists = next_exists;
  }
}

}  // namespace tq4
