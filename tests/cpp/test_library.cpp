// A C++ caller of libtq4: every launcher links without torch, and refuses bad arguments before it would
// touch a GPU.
#include "tq4.h"

#include <stdexcept>
#include <string>

#include "check.h"

namespace {

tq4::AttentionParams decode_problem() {
  constexpr int kHeads = 8, kHeadDim = 128, kBlockSize = 16;
  const int64_t row = tq4::token_bytes(kHeads, kHeadDim);
  tq4::AttentionParams p{};
  p.cache = tq4::token_major_view(nullptr, 64, kHeads, kBlockSize, kHeadDim, kBlockSize * row, row);
  p.num_q_heads = 32;
  p.num_seqs = p.num_tokens = 4;
  p.max_query_len = 1;
  p.int8 = true;
  p.num_sms = 132;
  p.arch = 90;
  return p;
}

// The message of the std::invalid_argument that `call` throws; empty if it throws nothing.
template <typename Call>
std::string refusal(Call&& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

int main() {
  tq4::AttentionParams p = decode_problem();
  CHECK(tq4::decode_workspace_bytes(p) > 0);
  tq4::AttentionParams twice = p;
  twice.num_seqs = twice.num_tokens = 8;
  CHECK(tq4::decode_workspace_bytes(twice) > tq4::decode_workspace_bytes(p));

  p.cache.head_dim = 80;
  CHECK(contains(refusal([&] { tq4::launch_prefill(p, nullptr); }), "head_dim"));
  CHECK(contains(refusal([&] { tq4::launch_decode(p, nullptr); }), "head_dim"));

  // Nothing to do is no error.
  p = decode_problem();
  p.num_seqs = p.num_tokens = 0;
  CHECK(tq4::decode_workspace_bytes(p) == 0);
  CHECK(refusal([&] { tq4::launch_prefill(p, nullptr); }).empty());
  CHECK(refusal([&] { tq4::launch_decode(p, nullptr); }).empty());
  return tq4::test::report("test_library");
}
