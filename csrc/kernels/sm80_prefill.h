// Launchers of the mma.sync prefill kernels, one translation unit a mode.
#pragma once
#include "../params.h"

namespace tq4::sm80 {

void launch_prefill_int8(const AttentionParams& p, Stream stream);
void launch_prefill_fp16(const AttentionParams& p, Stream stream);

}  // namespace tq4::sm80
