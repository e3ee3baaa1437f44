// Store and compress of many rows by wgmma (device/encode_wgmma.cuh), sm_90a.
#pragma once
#include "../device/encode_params.h"

namespace tq4::sm90 {

// Whether launch_encode has a kernel for it.
bool encodes(const EncodeParams& p, int head_dim, DType dtype);

// As tq4::launch_store and launch_compress; p.num_rows > 0.
void launch_encode(const EncodeParams& p, int head_dim, DType dtype, Stream stream);

}  // namespace tq4::sm90
