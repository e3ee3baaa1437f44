#pragma once
#include "../device/encode_params.h"

namespace tq4::sm90 {

// Whether launch_encode has a kernel for it.
bool encodes(const EncodeParams& p, int head_dim, DType dtype);

// Store and compress by wgmma (device/encode_wgmma.cuh).
void launch_encode(const EncodeParams& p, int head_dim, DType dtype, Stream stream);

}  // namespace tq4::sm90
