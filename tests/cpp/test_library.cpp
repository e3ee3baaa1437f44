// A C++ caller of libtq4: every launcher links without torch, and refuses bad arguments before it
// would touch a GPU.
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "check.h"
#include "tq4.h"

namespace {

tq4::AttentionParams decode_problem(int arch) {
  constexpr int kHeads = 8, kHeadDim = 128, kBlockSize = 16;
  const int64_t row = tq4::token_bytes(kHeads, kHeadDim);
  tq4::AttentionParams p{};
  p.cache = tq4::token_major_view(nullptr, 64, kHeads, kBlockSize, kHeadDim, kBlockSize * row, row);
  p.num_q_heads = 32;
  p.num_seqs = p.num_tokens = 4;
  p.max_query_len = 1;
  p.int8 = true;
  p.num_sms = 132;
  p.arch = arch;
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

// On Hopper the plan of decode depends on how many clusters the device runs at the same time.
bool can_plan(int arch) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0) return true;
  (void)cudaGetLastError();
  return arch != 90;
}

void check_needs_device() {
  std::string message;
  try {
    tq4::decode_workspace_bytes(decode_problem(90));
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  CHECK(contains(message, "cudaGetDevice"));
}

// Prefill unpacks ahead where there are rows enough, and the workspace is bounded.
void check_prefill(int arch) {
  tq4::AttentionParams p = decode_problem(arch);
  p.max_blocks = 64;
  for (const tq4::Path path : {tq4::Path::kAuto, tq4::Path::kPortable}) {
    tq4::AttentionParams chunk = p;
    chunk.path = path;
    chunk.num_seqs = 1;
    chunk.num_tokens = chunk.max_query_len = 512;
    chunk.short_queries = tq4::ShortQueries::kPrefill;
    const int64_t bytes = tq4::prefill_workspace_bytes(chunk);
    CHECK(bytes > 0);
    if (path == tq4::Path::kPortable) {
      CHECK(contains(refusal([&] { tq4::launch_prefill(chunk, nullptr); }), "workspace"));
    }
    tq4::AttentionParams other = chunk;
    other.unpack = tq4::Unpack::kInKernel;
    CHECK(tq4::prefill_workspace_bytes(other) == 0);
    other = chunk;
    other.int8 = false;
    CHECK(tq4::prefill_workspace_bytes(other) == 0);
    other = chunk;
    other.num_tokens = other.max_query_len = 16;
    CHECK(tq4::prefill_workspace_bytes(other) == 0);
    other.unpack = tq4::Unpack::kAhead;
    CHECK(tq4::prefill_workspace_bytes(other) > 0);
    other = chunk;  // tables wider than what one pass holds, then than what all passes hold
    other.num_seqs = 2;
    other.max_blocks = 1 << 14;
    CHECK(tq4::prefill_workspace_bytes(other) > bytes);
    CHECK(tq4::prefill_workspace_bytes(other) <=
          tq4::prefill_workspace_bytes(chunk) + (int64_t{512} << 20));
    other.max_blocks = 1 << 24;
    CHECK(tq4::prefill_workspace_bytes(other) == 0);
  }
}

void check_decode(int arch) {
  tq4::AttentionParams p = decode_problem(arch);
  p.max_blocks = 1 << 16;  // long sequences: by kernels that have a workspace
  CHECK(tq4::decode_workspace_bytes(p) > 0);
  tq4::AttentionParams twice = p;
  twice.num_seqs = twice.num_tokens = 8;
  CHECK(tq4::decode_workspace_bytes(twice) > tq4::decode_workspace_bytes(p));

  // Sequences of few query tokens are decode's, alone or beside longer ones.
  tq4::AttentionParams mixed = p;
  CHECK(tq4::prefill_workspace_bytes(mixed) == tq4::decode_workspace_bytes(mixed));
  CHECK(contains(refusal([&] { tq4::launch_prefill(mixed, nullptr); }), "prefill_workspace_bytes"));
  mixed.unpack = tq4::Unpack::kInKernel;
  mixed.num_tokens = mixed.max_query_len = 100;
  CHECK(tq4::prefill_workspace_bytes(mixed) > 0);
  mixed.short_queries = tq4::ShortQueries::kPrefill;
  CHECK(tq4::prefill_workspace_bytes(mixed) == 0);

  p.cache.head_dim = 80;
  CHECK(contains(refusal([&] { tq4::launch_prefill(p, nullptr); }), "head_dim"));
  CHECK(contains(refusal([&] { tq4::launch_decode(p, nullptr); }), "head_dim"));

  p.cache.head_dim = 96;
  const float signs[96] = {};
  p.out_rotation = signs;
  p.out_signs = true;
  CHECK(contains(refusal([&] { tq4::launch_decode(p, nullptr); }), "out_rotation"));

  // Nothing to do is no error.
  p = decode_problem(arch);
  p.num_seqs = p.num_tokens = 0;
  CHECK(tq4::decode_workspace_bytes(p) == 0);
  CHECK(tq4::prefill_workspace_bytes(p) == 0);
  CHECK(refusal([&] { tq4::launch_prefill(p, nullptr); }).empty());
  CHECK(refusal([&] { tq4::launch_decode(p, nullptr); }).empty());
}

}  // namespace

int main() {
  for (const int arch : {80, 90}) {
    check_prefill(arch);
    if (can_plan(arch)) {
      check_decode(arch);
    } else {
      check_needs_device();
    }
  }
  return tq4::test::report("test_library");
}
