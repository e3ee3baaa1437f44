// The C++ interface of libtq4: argument structs and launchers, without torch.
//
// A launcher checks its arguments (std::invalid_argument), enqueues on the given stream
// (std::runtime_error on a CUDA error) and returns without synchronising with the host.
#pragma once

#include "params.h"  // argument structs

#include "layout.h"  // PageView of the two page layouts

#include "kernels/decode.h"
#include "kernels/gather.h"
#include "kernels/prefill.h"
#include "kernels/store.h"
