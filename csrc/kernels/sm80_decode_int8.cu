// INT8 decode, cp.async pipeline: sm_80 and up.
#include "decode_launch.cuh"
#include "decode_steps.h"

namespace tq4::sm80 {

void launch_decode_int8(const AttentionParams& p, const DecodePlan& plan, Stream stream) {
  dispatch_rows(p, plan, [&](auto d, auto wide) {
    launch_decode_int8_config<d, false, wide>(p, plan, stream);
  });
}

}  // namespace tq4::sm80
