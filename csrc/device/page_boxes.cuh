// A tile of token-major pages as boxes of the page maps: the codes and the norms of some KV heads
// and 16 tokens, K and V in one box.  By one lane.
#pragma once
#include <cstdint>

#include "../ptx/smem.cuh"
#include "../ptx/tensor_copy.cuh"
#include "decode_map.h"
#include "tensor_map.h"

namespace tq4 {

// To `dst` as `place` says, counted off the barrier; `codes` and `norms` are the bytes from a
// field's first head to the box, `token` is the tile's first in the page.
__device__ __forceinline__ void copy_page_boxes(const PageMaps& maps, const StageView& place,
                                                int codes, int norms, int page, int token,
                                                uint32_t dst, uint32_t barrier) {
  const auto box = [&](const TensorMap& map, int to, int column) {
    ptx::tensor_copy_once_to_shared(dst + to, map, column / kMapElementBytes, token, 0, page,
                                    barrier, ptx::read_once_policy());
  };
  box(maps.codes, place.k_codes, codes);
  box(maps.norms, place.k_norms, norms);
}

}  // namespace tq4
