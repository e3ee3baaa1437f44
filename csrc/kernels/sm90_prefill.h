#pragma once
#include <cstdint>

#include "../params.h"

namespace tq4::sm90 {

// Bytes of p.workspace that launch_prefill wants; 0 where it cannot run (then it must not be
// called).
int64_t prefill_workspace_bytes(const AttentionParams& p);

// INT8 prefill by wgmma.
void launch_prefill(const AttentionParams& p, Stream stream);

}  // namespace tq4::sm90
