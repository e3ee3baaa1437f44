// store: rotate, quantise and pack new tokens into pages.  compress: the same to dense arrays.
#pragma once
#include "../params.h"

namespace tq4 {

// Enqueue on `stream`.  Throw std::invalid_argument for an unsupported value and std::runtime_error
// for a CUDA error.  No host synchronisation; legal during CUDA-graph capture.
//
// Inputs may have any strides; rows that are not 16-byte aligned are read by a slower path.
// Rotations are 16-byte aligned, matrices or, for D = 64, 128 and 256, signs: a few hundred tokens
// take several microseconds less with signs.  Boundaries ascend.  Slots are not checked: a slot
// past the cache is the caller's error.
void launch_store(const StoreParams& p, Stream stream);
void launch_compress(const CompressParams& p, Stream stream);

}  // namespace tq4
