#include <tq4.h>

#include <cstdio>

// Sizes a cache and a decode step, which needs no GPU where it is for another than Hopper.
int main() {
  constexpr int kHeads = 8, kHeadDim = 128, kBlockSize = 16, kBlocks = 64;
  const int64_t row = tq4::token_bytes(kHeads, kHeadDim);
  tq4::AttentionParams p{};
  p.cache = tq4::token_major_view(nullptr, kBlocks, kHeads, kBlockSize, kHeadDim, kBlockSize * row, row);
  p.num_q_heads = 32;
  p.num_seqs = p.num_tokens = 4;
  p.max_query_len = 1;
  p.int8 = true;
  p.num_sms = 108;
  p.arch = 80;
  const int64_t workspace = tq4::decode_workspace_bytes(p);
  std::printf("%lld bytes of cache, %lld of workspace\n",
              static_cast<long long>(kBlocks * kBlockSize * row), static_cast<long long>(workspace));
  return workspace > 0 ? 0 : 1;
}
