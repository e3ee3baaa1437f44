// Prefill: batches of queries of any length over the paged cache.
#pragma once
#include "../params.h"

namespace tq4 {

// Enqueues the best compiled-in kernel for p.arch on `stream`.  Throws std::invalid_argument for
// an unsupported value and std::runtime_error for a CUDA error.  No host synchronisation.
void launch_prefill(const AttentionParams& p, Stream stream);

}  // namespace tq4
