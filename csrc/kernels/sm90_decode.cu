// INT8 decode, bulk-copy pipeline: sm_90.
#include "decode_launch.cuh"
#include "decode_steps.h"

namespace tq4::sm90 {

void launch_decode_int8(const AttentionParams& p, const DecodePlan& plan, Stream stream) {
  launch_decode_int8_with<BulkPipeline>(p, plan, stream);
}

}  // namespace tq4::sm90
