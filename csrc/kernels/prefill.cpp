#include "prefill.h"

#include "sm80_prefill.h"

namespace tq4 {

void launch_prefill(const AttentionParams& p, Stream stream) {
  if (p.num_seqs == 0 || p.num_tokens == 0) return;
  if (p.int8) {
    sm80::launch_prefill_int8(p, stream);
  } else {
    sm80::launch_prefill_fp16(p, stream);
  }
}

}  // namespace tq4
