// The small kernels of decode for rows that are rotated by butterflies, or not at all: a warp a row.
//
//   decode_prepare_light   a third of the time of decode_prepare, which has R to read
//   decode_combine_light   has next to no registers and shared memory, so that a CTA finds room
//                          beside one of the main kernel; starts when all of those have, goes once
//                          through its code, and waits for the units of its rows one by one
//                          (UnitProgress): what is left when the last CTA is done are the partial
//                          results of that CTA's rows
//
// The combination waits for CTAs that run already and wait for nobody: the main kernel allows its
// launch, which takes all CTAs of it to do (PTX ISA, "griddepcontrol").
#pragma once
#include <cstdint>

#include "../params.h"
#include "../ptx/global_counter.cuh"
#include "../ptx/grid_dependency.cuh"
#include "common.cuh"
#include "decode_output.cuh"
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
      const float largest =
          row.write(plan.mode, workspace + plan.query_codes, workspace + plan.query_residual, index);
      if (threadIdx.x % kWarpSize == 0) {
        reinterpret_cast<float*>(workspace + plan.query_scale)[index] =
            row_unit(plan.mode, largest) * scale;
      }
    }
    row = next;
    exists = next_exists;
  }
}

// Waits until all partial results of a unit are there, `tiles` of them by each warp.
__device__ __forceinline__ CtaRange wait_for_unit(const uint64_t* counter, uint32_t tiles) {
  UnitProgress progress{ptx::load_counter(counter)};
  while (progress.tiles() != tiles) {
    ptx::nap();
    progress = {ptx::load_counter(counter)};
  }
  ptx::acquire_fence();
  return progress.ctas();
}

template <int D>
__global__ void __launch_bounds__(kLightThreads, kLightCtas)
    decode_combine_light_kernel(const __grid_constant__ AttentionParams p,
                                const __grid_constant__ DecodePlan plan) {
  using Sum = RowSum<D>;
  constexpr int kBatch = D <= 128 ? 6 : 2;  // partial results loaded at once
  const auto* progress = reinterpret_cast<const uint64_t*>(static_cast<const uint8_t*>(p.workspace) +
                                                           plan.unit_progress);
  const DecodeBatch batch = decode_batch(p, plan);
  const int num_rows = static_cast<int>(p.num_seqs * plan.seq_divider.divisor);
  const int step = gridDim.x * kLightWarps;
  const bool aligned = Sum::is_aligned(p);
  typename Sum::Vector row0[Sum::kDims / Sum::kVector] = {};
  if (p.out_rotation != nullptr) Sum::load_signs(p.out_rotation, row0);
  int index = blockIdx.x * kLightWarps + threadIdx.x / kWarpSize;
  bool rehearsal = true;  // the first time through, of a row without partial results
#pragma unroll 1
  while (index < num_rows) {
    CombineRow row = find_row(p, plan, batch, index);
    const PartialTerms<D> terms = PartialTerms<D>::make(p, plan, row, 0);
    CtaRange ctas{0, 0};
    if (rehearsal) {
      row.exists = false;
    } else if (row.exists) {
      const TileRange tiles = batch.tiles(row.seq);
      ctas = wait_for_unit(progress + row.unit, (tiles.end - tiles.begin) * plan.slots);
    }
    Sum sum;
    sum.clear();
    sum.template add<kBatch>(terms, ctas, 0);
    sum.finish(p, row);
    if (p.out_rotation != nullptr) sum.transform(row0);
    if (row.exists) {
      if (row.surplus > 0) write_surplus<D>(p, row);
      sum.store(p, row.token * p.out_token_stride + row.head * p.out_head_stride, aligned);
    }
    if (!rehearsal) index += step;
    rehearsal = false;
  }
  ptx::wait_for_predecessor();  // this kernel ends after the main one
}

}  // namespace tq4
