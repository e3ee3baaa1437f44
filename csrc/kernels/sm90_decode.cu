// INT8 decode, bulk-copy pipeline: sm_90a.
#include "decode_launch.cuh"
#include "decode_steps.h"

namespace tq4::sm90 {

void launch_decode_int8(const AttentionParams& p, const DecodePlan& plan, Stream stream) {
  if (plan.wide) {
    launch_decode_int8_with<true, true>(p, plan, stream);
  } else {
    launch_decode_int8_with<true, false>(p, plan, stream);
  }
}

}  // namespace tq4::sm90
