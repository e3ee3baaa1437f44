// The kernel of gather and decompress, run on the CPU (emulation/), against the definition in
// double precision: head dimensions, dtypes, rotations, both layouts, empty and partial sequences,
// poisoned tails, garbage in the block table, strided and unaligned output.
#include "device/expand_kernel.cuh"
#include "emulated_cache.h"
#include "intrinsics.h"

namespace {

using namespace tq4::test;

struct Case {
  std::vector<int> lengths{20, 0, 33};
  std::vector<int> gaps{0, 0, 0};  // unused output rows after each sequence
  int heads = 2, block_size = 16;
  Turn k_turn = Turn::kHadamard, v_turn = Turn::kOrthogonal;
  bool head_major = false;
  int pad = 0;         // of cache rows, bytes
  int gap = 0;         // of output rows, elements
  bool dense = false;  // decompress
  int warps = 2, ctas = 1;
};

// What T can hold of x, up to `relative` before rounding.
template <typename T>
bool close(T got, double expected, double scale) {
  constexpr double kRounding = sizeof(T) == 4              ? 0x1p-24
                               : std::is_same_v<T, __half> ? 0x1p-11
                                                           : 0x1p-8;
  return std::fabs(to_float(got) - expected) <=
         1e-6 * scale + 1.01 * kRounding * std::fabs(expected) + (sizeof(T) == 2 ? 3.1e-8 : 0);
}

template <typename T>
void check_row(const T* out, int dim, const Rotation& rotation, const Codebook& book,
               const uint8_t* codes, float norm) {
  std::vector<double> x(dim);
  double scale = 0;
  for (int i = 0; i < dim; ++i) {
    x[i] = static_cast<double>(norm) *
           book.centroids[i % 2 == 0 ? codes[i / 2] >> 4 : codes[i / 2] & 15];
    scale += x[i] * x[i];
  }
  scale = std::sqrt(scale);
  for (int j = 0; j < dim; ++j) {
    double expected = x[j];
    if (rotation.data() != nullptr) {
      expected = 0;
      for (int i = 0; i < dim; ++i) expected += x[i] * rotation.at(i, j);
    }
    CHECK(close(out[j], expected, rotation.data() == nullptr ? 0.2 * std::fabs(expected) : scale));
  }
}

template <typename T, int D>
void run(const Case& c, uint64_t seed) {
  Random random(seed);
  const int num_seqs = static_cast<int>(c.lengths.size());
  std::vector<int32_t> start{0}, seq_lens(c.lengths.begin(), c.lengths.end());
  int max_blocks = 2, used = 0;
  for (int s = 0; s < num_seqs; ++s) {
    start.push_back(start.back() + c.lengths[s] + c.gaps[s]);
    used += tq4::ceil_div(c.lengths[s], c.block_size);
    max_blocks = std::max(max_blocks, tq4::ceil_div(c.lengths[s], c.block_size) + 1);
  }
  const int total = start.back() + 3;  // rows past the last sequence
  const int num_blocks = used + 2;
  std::vector<int> free_blocks(num_blocks);
  for (int i = 0; i < num_blocks; ++i) free_blocks[i] = i;
  for (int i = num_blocks - 1; i > 0; --i)
    std::swap(free_blocks[i], free_blocks[random.range(0, i)]);
  std::vector<int32_t> block_table(static_cast<size_t>(num_seqs) * max_blocks, 0x7ffffff0);
  Cache cache(c.head_major, num_blocks, c.heads, c.block_size, D, c.pad, 0xff);
  const auto slot_of = [&](int s, int token) {
    return static_cast<int64_t>(block_table[s * max_blocks + token / c.block_size]) * c.block_size +
           token % c.block_size;
  };
  for (int s = 0; s < num_seqs; ++s) {
    for (int token = 0; token < c.lengths[s]; ++token) {
      if (token % c.block_size == 0) {
        block_table[s * max_blocks + token / c.block_size] = free_blocks.back();
        free_blocks.pop_back();
      }
      for (int i = 0; i < 2 * c.heads; ++i) {
        uint8_t* codes = cache.codes(i % 2, slot_of(s, token), i / 2);
        for (int b = 0; b < D / 2; ++b) codes[b] = static_cast<uint8_t>(random.next());
        *cache.norm(i % 2, slot_of(s, token), i / 2) =
            static_cast<float>(std::exp(gaussian(&random)));
      }
    }
  }
  const Rotation k_rotation = make_rotation(c.k_turn, D, &random);
  const Rotation v_rotation = make_rotation(c.v_turn, D, &random);
  const Codebook book = gaussian_codebook(D);
  Dense<T> key(total, c.heads, D, c.gap, 0x5a), value(total, c.heads, D, c.gap, 0x5a);
  std::vector<uint32_t> packed(static_cast<size_t>(total) * c.heads * D / 8);
  std::vector<float> norms(static_cast<size_t>(total) * c.heads);
  for (uint32_t& word : packed) word = static_cast<uint32_t>(random.next());
  for (float& norm : norms) norm = static_cast<float>(std::exp(gaussian(&random)));

  tq4::ExpandParams p;
  if (c.dense) {
    tq4::DecompressParams d = {};
    d.packed = reinterpret_cast<uint8_t*>(packed.data());
    d.norms = norms.data();
    d.rotation = k_rotation.data();
    d.centroids = book.centroids;
    d.out = key.data;
    d.dtype = dtype_of<T>();
    d.num_tokens = total;
    d.num_heads = c.heads;
    d.head_dim = D;
    p = tq4::expand_params(d);
  } else {
    tq4::GatherParams g = {};
    g.cache = cache.view;
    g.block_table = block_table.data();
    g.block_table_stride = max_blocks;
    g.seq_lens = seq_lens.data();
    g.out_start_loc = start.data();
    g.k_rotation = k_rotation.data();
    g.v_rotation = v_rotation.data();
    g.k_centroids = g.v_centroids = book.centroids;
    g.key = key.data;
    g.value = value.data;
    g.key_token_stride = key.token_stride;
    g.key_head_stride = key.head_stride;
    g.value_token_stride = value.token_stride;
    g.value_head_stride = value.head_stride;
    g.dtype = dtype_of<T>();
    g.num_seqs = num_seqs;
    g.total = total;
    p = tq4::expand_params(g);
  }
  using Config = tq4::ExpandConfig<T, D>;
  emulation::launch(tq4::expand_kernel<Config>, c.ctas * p.num_sides, Config::kThreads, p);

  if (c.dense) {
    for (int i = 0; i < total * c.heads; ++i) {
      check_row(key.row(i / c.heads, i % c.heads), D, k_rotation, book,
                reinterpret_cast<uint8_t*>(packed.data()) + i * D / 2, norms[i]);
    }
    return;
  }
  for (int side = 0; side < 2; ++side) {
    Dense<T>& out = side ? value : key;
    std::vector<uint8_t> written(out.storage.size() * 16, 0);
    uint8_t* bytes = reinterpret_cast<uint8_t*>(out.storage.data());
    for (int s = 0; s < num_seqs; ++s) {
      for (int i = 0; i < c.lengths[s] * c.heads; ++i) {
        const int token = i / c.heads, head = i % c.heads;
        T* row = out.row(start[s] + token, head);
        std::memset(written.data() + (reinterpret_cast<uint8_t*>(row) - bytes), 1, D * sizeof(T));
        check_row(row, D, side ? v_rotation : k_rotation, book,
                  cache.codes(side, slot_of(s, token), head),
                  *cache.norm(side, slot_of(s, token), head));
      }
    }
    bool untouched = true;
    for (size_t i = 0; i < written.size(); ++i)
      untouched = untouched && (written[i] || bytes[i] == 0x5a);
    CHECK(untouched);
  }
}

template <int D>
void run_dim(uint64_t seed) {
  Case plain;
  run<__half, D>(plain, ++seed);
  run<__nv_bfloat16, D>(plain, ++seed);
  run<float, D>(plain, ++seed);

  Case other;
  other.lengths = {1, 47, 0, 0, 16};
  other.gaps = {2, 0, 1, 0, 0};
  other.heads = 1;
  other.block_size = 48;
  other.head_major = true;
  other.pad = 4;
  other.k_turn = Turn::kNone;
  other.v_turn = D == 96 ? Turn::kNone : Turn::kAlmostHadamard;
  other.gap = 8;
  other.ctas = 2;
  run<__half, D>(other, ++seed);
  other.gap = 3;
  run<__nv_bfloat16, D>(other, ++seed);
  run<float, D>(other, ++seed);

  Case dense;
  dense.dense = true;
  dense.heads = 3;
  dense.k_turn = D == 96 ? Turn::kOrthogonal : Turn::kHadamard;
  run<__half, D>(dense, ++seed);
  dense.k_turn = Turn::kNone;
  run<float, D>(dense, ++seed);
}

}  // namespace

int main() {
  run_dim<64>(100);
  run_dim<96>(200);
  run_dim<128>(300);
  run_dim<256>(400);
  return tq4::test::report("test_gather_emulated");
}
