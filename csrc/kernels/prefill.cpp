#include "prefill.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "../device/query_split.h"
#include "decode.h"
#include "sm80_prefill.h"
#include "sm90_prefill.h"

namespace tq4 {
namespace {

// Query rows of a KV head that pay for writing its keys out unpacked (docs/tuning.md).
constexpr int64_t kMinRowsUnpackedAhead = 512;

#ifdef TQ4_HAS_SM90A
// It always unpacks ahead.
bool takes_wgmma(const AttentionParams& p) { return p.arch == 90 && p.path == Path::kAuto; }
#endif

// Bytes of workspace with which the keys are unpacked ahead; 0: in the kernel.
int64_t unpacked_bytes(const AttentionParams& p) {
  if (!p.int8 || p.unpack == Unpack::kInKernel) return 0;
  const int64_t group = p.num_q_heads / p.cache.num_kv_heads;
  if (p.unpack == Unpack::kAuto && p.max_query_len * group < kMinRowsUnpackedAhead) return 0;
#ifdef TQ4_HAS_SM90A
  if (takes_wgmma(p)) return sm90::prefill_workspace_bytes(p);
#endif
  return sm80::prefill_tiles_workspace_bytes(p);
}

// What the two parts of a call want, one after the other in the same bytes (see launch_prefill).
struct WorkspaceBytes {
  int64_t decode, prefill;
};

WorkspaceBytes workspace_bytes(const QuerySplit& split) {
  return {split.has_decode ? decode_workspace_bytes(split.decode) : 0,
          split.has_prefill ? unpacked_bytes(split.prefill) : 0};
}

// The prefill kernels themselves.
void launch_prefill_kernels(const AttentionParams& p, bool unpacked_ahead, Stream stream) {
  if (unpacked_ahead) {
#ifdef TQ4_HAS_SM90A
    if (takes_wgmma(p)) return sm90::launch_prefill(p, stream);
#endif
    return sm80::launch_prefill_tiles(p, stream);
  }
  if (p.int8) {
    sm80::launch_prefill_int8(p, stream);
  } else {
    sm80::launch_prefill_fp16(p, stream);
  }
}

}  // namespace

int64_t prefill_workspace_bytes(const AttentionParams& p) {
  if (p.num_seqs == 0 || p.num_tokens == 0) return 0;
  const WorkspaceBytes bytes = workspace_bytes(split_queries(p));
  return std::max(bytes.decode, bytes.prefill);
}

void launch_prefill(const AttentionParams& p, Stream stream) {
  if (p.num_seqs == 0 || p.num_tokens == 0) return;
  if ((reinterpret_cast<uintptr_t>(p.q) | static_cast<uint64_t>(p.q_token_stride * 2) |
       static_cast<uint64_t>(p.q_head_stride * 2)) %
      16) {
    throw std::invalid_argument("q: expected rows that start at multiples of 16 bytes");
  }
  if (p.q_signs || p.out_signs) {
    throw std::invalid_argument("q_signs, out_signs: prefill takes rotations as matrices");
  }
  const QuerySplit split = split_queries(p);
  const WorkspaceBytes bytes = workspace_bytes(split);
  if (std::max(bytes.decode, bytes.prefill) > 0 &&
      (p.workspace == nullptr || reinterpret_cast<uintptr_t>(p.workspace) % 16 != 0)) {
    throw std::invalid_argument(
        "workspace: expected prefill_workspace_bytes() bytes, 16-byte aligned");
  }
  // The first kernel of either is an ordinary launch: it starts when all before it have ended, also
  // those of decode that may overlap each other.  So both may use the same workspace.
  if (split.has_decode) launch_decode(split.decode, stream);
  if (split.has_prefill) launch_prefill_kernels(split.prefill, bytes.prefill > 0, stream);
}

}  // namespace tq4
