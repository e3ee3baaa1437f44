// Launchers of the mma.sync prefill kernels, one translation unit a mode.
#pragma once
#include <cstdint>

#include "../params.h"

namespace tq4::sm80 {

void launch_prefill_int8(const AttentionParams& p, Stream stream);
void launch_prefill_fp16(const AttentionParams& p, Stream stream);

// INT8 with K and V unpacked ahead.  Bytes of p.workspace that this needs; 0 where the batch may be
// too large for it.
int64_t prefill_tiles_workspace_bytes(const AttentionParams& p);
void launch_prefill_tiles(const AttentionParams& p, Stream stream);

}  // namespace tq4::sm80
