// The exact mode of decode, without quantisation of q and K; cp.async pipeline: sm_80 and up.
#include "decode_launch.cuh"
#include "decode_steps.h"

namespace tq4::sm80 {

void launch_decode_fp16(const AttentionParams& p, const DecodePlan& plan, Stream stream) {
  dispatch_rows(p, plan, [&](auto d, auto wide) {
    launch_decode_config<d, DecodeMode::kFp16Rows8, false, wide>(p, plan, stream);
  });
}

}  // namespace tq4::sm80
