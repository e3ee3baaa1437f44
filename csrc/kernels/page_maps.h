// Host side of copies by tensor map: sm_90a.
#pragma once
#include <cuda.h>
#include <cudaTypedefs.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../device/decode_map.h"
#include "../device/decode_schedule.h"
#include "../device/launch.h"
#include "../device/page_copy.h"
#include "../device/tensor_map.h"
#include "../params.h"

namespace tq4::sm90 {

// The driver's function, which is found without linking to the driver.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static std::atomic<void*> known{nullptr};
  void* function = known.load(std::memory_order_relaxed);
  if (function == nullptr) {
    cudaDriverEntryPointQueryResult found{};
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                cudaEnableDefault, &found),
               "finding cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    }
    known.store(function, std::memory_order_relaxed);
  }
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

// Where K's field and V's begin in a row, and their bytes.
struct FieldPair {
  int k, v, bytes;
};

// Boxes of 16 rows of `box_bytes` of both fields.
inline TensorMap make_page_map(const PageView& view, const FieldPair& fields, int box_bytes) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(fields.bytes / kMapElementBytes),
                              static_cast<cuuint64_t>(view.block_size), 2,
                              static_cast<cuuint64_t>(view.num_blocks)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(view.code_token_stride),
                                static_cast<cuuint64_t>(fields.v - fields.k),
                                static_cast<cuuint64_t>(view.block_stride)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_bytes / kMapElementBytes), kTileTokens, 2,
                            1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  static_assert(kMapElementBytes == 8, "the type below");
  CUtensorMap map;
  const CUresult status = tensor_map_encoder()(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT64, 4, view.base + fields.k, sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(status));
  }
  TensorMap same;
  static_assert(sizeof(same) == sizeof(map), "the driver's type");
  std::memcpy(&same, &map, sizeof(same));
  return same;
}

// Boxes that fill stages as `stage` says.
inline PageMaps make_page_maps(const PageView& view, const StageView& stage) {
  const FieldPair codes{view.k_codes, view.v_codes, view.num_kv_heads * view.head_dim / 2};
  const FieldPair norms{view.k_norms, view.v_norms, view.num_kv_heads * 4};
  return {make_page_map(view, codes, stage.code_token_stride),
          make_page_map(view, norms, stage.norm_token_stride)};
}

}  // namespace tq4::sm90
