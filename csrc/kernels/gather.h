// gather: pages of given sequences back to dense K and V.  decompress: the same from dense arrays.
#pragma once
#include "../params.h"

namespace tq4 {

// Enqueue on `stream`.  Throw std::invalid_argument for an unsupported value and std::runtime_error
// for a CUDA error.  No host synchronisation; legal during CUDA-graph capture.
//
// Outputs may have any strides; rows that are not 16-byte aligned are written by a slower path.
// Rotations are 16-byte aligned, packed codes 4-byte aligned.  Lengths and block numbers are not
// checked: those past the table or the cache are the caller's error.
void launch_gather(const GatherParams& p, Stream stream);
void launch_decompress(const DecompressParams& p, Stream stream);

}  // namespace tq4
