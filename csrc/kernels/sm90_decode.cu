// INT8 decode, bulk-copy pipeline: sm_90a.
#include "decode_launch.cuh"
#include "decode_steps.h"

namespace tq4::sm90 {

void launch_decode_int8(const AttentionParams& p, const DecodePlan& plan, Stream stream) {
  dispatch_rows(p, plan, [&](auto d, auto wide) {
    launch_decode_int8_config<d, true, wide>(p, plan, stream);
  });
}

}  // namespace tq4::sm90
