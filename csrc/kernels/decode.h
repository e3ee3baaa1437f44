// Decode: one to a few query tokens a sequence over the paged cache, split over the keys.
#pragma once
#include <cstdint>

#include "../params.h"

namespace tq4 {

// Bytes of p.workspace that launch_decode needs (0: none).  A function of the shapes and of the
// device's SM count only, never of the lengths on the device, so a captured CUDA graph stays valid
// when they change.
int64_t decode_workspace_bytes(const AttentionParams& p);

// Enqueues the best compiled-in kernel for p.arch on `stream`.  Throws std::invalid_argument for
// an unsupported value and std::runtime_error for a CUDA error.  No host synchronisation.
void launch_decode(const AttentionParams& p, Stream stream);

}  // namespace tq4
