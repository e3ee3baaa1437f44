// csrc/layout.h: the four fields of a page cover its used bytes exactly once, in both layouts.
#include "layout.h"

#include <vector>

#include "check.h"

namespace {

using tq4::PageView;

// Adds 1 to every byte that K and V of every (token, head) of one block own.
void mark(const PageView& view, std::vector<int>* bytes) {
  for (int token = 0; token < view.block_size; ++token) {
    for (int head = 0; head < view.num_kv_heads; ++head) {
      const int code = token * view.code_token_stride + head * view.code_head_stride;
      const int norm = token * view.norm_token_stride + head * view.norm_head_stride;
      for (int i = 0; i < view.head_dim / 2; ++i) {
        ++bytes->at(view.k_codes + code + i);
        ++bytes->at(view.v_codes + code + i);
      }
      CHECK((view.k_norms + norm) % 4 == 0 && (view.v_norms + norm) % 4 == 0);
      CHECK((view.k_codes + code) % 4 == 0 && (view.v_codes + code) % 4 == 0);
      for (int i = 0; i < 4; ++i) {
        ++bytes->at(view.k_norms + norm + i);
        ++bytes->at(view.v_norms + norm + i);
      }
    }
  }
}

}  // namespace

int main() {
  for (int head_dim : {64, 96, 128, 256}) {
    for (int heads : {1, 2, 8}) {
      for (int block_size : {16, 64}) {
        const int64_t used = tq4::token_bytes(heads, head_dim);
        CHECK(used == heads * (head_dim + 8));
        for (int64_t padding : {0, 4, 60}) {
          const int64_t row = used + padding;
          const PageView view = tq4::token_major_view(nullptr, 3, heads, block_size, head_dim,
                                                      block_size * row, row);
          std::vector<int> bytes(block_size * row, 0);
          mark(view, &bytes);
          for (size_t i = 0; i < bytes.size(); ++i) {
            CHECK(bytes[i] == (static_cast<int64_t>(i) % row < used ? 1 : 0));
          }
        }
        const int64_t page = tq4::head_page_bytes(block_size, head_dim);
        for (int64_t padding : {0, 64}) {
          const PageView view = tq4::head_major_view(nullptr, 3, heads, block_size, head_dim,
                                                     heads * (page + padding), page + padding);
          std::vector<int> bytes(heads * (page + padding), 0);
          mark(view, &bytes);
          for (size_t i = 0; i < bytes.size(); ++i) {
            CHECK(bytes[i] == (static_cast<int64_t>(i) % (page + padding) < page ? 1 : 0));
          }
        }
      }
    }
  }
  // Offsets of blocks need 64 bits, and keep them.
  const PageView big = tq4::token_major_view(nullptr, 1 << 20, 8, 16, 128, int64_t{1} << 33, 1088);
  CHECK(big.block_stride == int64_t{1} << 33);
  return tq4::test::report("test_layout");
}
