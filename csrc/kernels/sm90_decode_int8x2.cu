// The exact mode of decode, q and K as two INT8 terms each, bulk-copy pipeline: sm_90a.
#include "decode_launch.cuh"
#include "decode_steps.h"

namespace tq4::sm90 {

void launch_decode_int8x2(const AttentionParams& p, const DecodePlan& plan, Stream stream) {
  dispatch_rows(p, plan, [&](auto d, auto wide) {
    launch_decode_config<d, DecodeMode::kInt8x2Rows8, true, wide>(p, plan, stream);
  });
}

}  // namespace tq4::sm90
