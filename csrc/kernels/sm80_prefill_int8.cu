#include "sm80_prefill.h"
#include "sm80_prefill_pages.cuh"

namespace tq4::sm80 {

void launch_prefill_int8(const AttentionParams& p, Stream stream) {
  launch_prefill_pages<true>(p, stream);
}

}  // namespace tq4::sm80
