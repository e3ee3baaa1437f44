// Launchers of the three kernels behind launch_decode.  Each enqueues one kernel on `stream`.
#pragma once
#include "../device/decode_plan.h"
#include "../params.h"

namespace tq4 {

// Rotated, quantised queries and row scales -> workspace.
void launch_decode_prepare(const AttentionParams& p, const DecodePlan& plan, Stream stream);

// Partial results and prefix sums -> workspace.
namespace sm80 {
void launch_decode_int8(const AttentionParams& p, const DecodePlan& plan, Stream stream);
void launch_decode_fp16(const AttentionParams& p, const DecodePlan& plan, Stream stream);
}  // namespace sm80
namespace sm90 {
// For plan.bulk.
void launch_decode_int8(const AttentionParams& p, const DecodePlan& plan, Stream stream);
void launch_decode_int8x2(const AttentionParams& p, const DecodePlan& plan, Stream stream);
// Of the current device.
ClusterRoom find_cluster_room();
// For plan.cluster: all of decode.
void launch_decode_cluster(const AttentionParams& p, const DecodePlan& plan, Stream stream);
}  // namespace sm90

// Partial results -> out and LSE.
void launch_decode_combine(const AttentionParams& p, const DecodePlan& plan, Stream stream);

}  // namespace tq4
