// Prefill: batches of queries of any length over the paged cache.  Sequences of few query tokens
// take the decode kernels (device/query_split.h).
#pragma once
#include "../params.h"

namespace tq4 {

// Bytes of p.workspace that launch_prefill wants, from shapes alone; may be 0.
int64_t prefill_workspace_bytes(const AttentionParams& p);

// Enqueues the best compiled-in kernel for p.arch on `stream`.  Throws std::invalid_argument for
// an unsupported value and std::runtime_error for a CUDA error.  No host synchronisation.
void launch_prefill(const AttentionParams& p, Stream stream);

}  // namespace tq4
