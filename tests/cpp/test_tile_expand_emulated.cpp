// csrc/device/tile_expand.cuh, run on the CPU (cuda_cpu.h): every chunk of every image against the
// codes of its token, for the image of the mma.sync prefill kernel and for another one, in one pass
// and in several, with windows, empty sequences, more sequences than threads, pages of any size and
// garbage wherever nothing may be read.
#include "emulated_cache.h"
// What the kernel includes must come after the emulation.
#include "device/prefill_image.cuh"

namespace {

using tq4::test::Random;

constexpr int kCodes[16] = {-104, -79, -62, -48, -36, -25, -15, -5, 5, 15, 25, 36, 48, 62, 79, 104};

// Natural order, 128 tokens: nothing that the other image happens to have.
template <int D>
struct PlainImage : tq4::TileImage<D, 128> {
  static constexpr int kValues = 128 * D;
  static constexpr int kScales = kValues + 128 * 2 * D;
  static constexpr int kBytes = kScales + 128 * 4;
  static constexpr int key_offset(int token, int chunk) { return token * D + 16 * chunk; }
  static constexpr int value_offset(int token, int chunk) {
    return kValues + token * 2 * D + 16 * chunk;
  }
  static void write_scale(uint8_t* image, int token, float k_norm) {
    std::memcpy(image + kScales + 4 * token, &k_norm, 4);
  }
};

struct Case {
  std::vector<int> lengths{70};
  std::vector<int> queries{20};
  int num_kv_heads = 1;
  bool head_major = false;
  int block_size = 16;
  int pad = 0;  // bytes between rows and blocks of the cache
  int window_left = -1;
  int short_query_len = 0;
  int64_t limit_tiles = 1 << 20;
  int grid = 3;
};

template <typename Image>
void run(const char* name, const Case& c) {
  constexpr int D = Image::kHeadDim, kTokens = Image::kTileTokens;
  Random random(3);
  const int num_seqs = static_cast<int>(c.lengths.size()), heads = c.num_kv_heads;
  std::vector<int32_t> starts{0};
  for (int t : c.queries) starts.push_back(starts.back() + t);
  int used = 0, longest = 1;
  for (int length : c.lengths) {
    used += tq4::ceil_div(length, c.block_size);
    longest = std::max(longest, length);
  }
  const int max_blocks = tq4::ceil_div(longest, c.block_size) + 1;
  tq4::test::Cache cache(c.head_major, used + 1, heads, c.block_size, D, c.pad, 0xff);
  std::vector<int32_t> table(static_cast<size_t>(num_seqs) * max_blocks, 0x7ffffff0);
  for (int s = 0, block = used; s < num_seqs; ++s) {
    for (int b = 0; b < tq4::ceil_div(c.lengths[s], c.block_size); ++b) {
      table[static_cast<size_t>(s) * max_blocks + b] = block--;
    }
  }
  const auto slot_of = [&](int s, int key) {
    return static_cast<int64_t>(table[static_cast<size_t>(s) * max_blocks + key / c.block_size]) *
               c.block_size +
           key % c.block_size;
  };
  for (int s = 0; s < num_seqs; ++s) {
    for (int key = 0; key < c.lengths[s]; ++key) {
      for (int h = 0; h < heads; ++h) {
        for (bool value : {false, true}) {
          for (int i = 0; i < D / 2; ++i) {
            cache.codes(value, slot_of(s, key), h)[i] = static_cast<uint8_t>(random.next());
          }
          *cache.norm(value, slot_of(s, key), h) =
              static_cast<float>(5 + tq4::test::gaussian(&random));
        }
      }
    }
  }
  const auto book = tq4::test::gaussian_codebook(D);
  int8_t codes[16];
  for (int i = 0; i < 16; ++i) codes[i] = static_cast<int8_t>(kCodes[i]);
  int exponent = 0;
  std::frexp(book.centroids[15], &exponent);

  tq4::AttentionParams p = {};
  p.cache = cache.view;
  p.block_table = table.data();
  p.block_table_stride = p.max_blocks = max_blocks;
  p.seq_lens = c.lengths.data();
  p.query_start_loc = starts.data();
  p.k_centroids = p.v_centroids = book.centroids;
  p.k_codes = codes;
  p.window_left = c.window_left;
  p.short_query_len = c.short_query_len;
  p.num_seqs = num_seqs;
  tq4::TileWorkspace w =
      tq4::make_tile_workspace(num_seqs, heads, static_cast<int64_t>(max_blocks) * c.block_size,
                               kTokens, Image::kBytes, c.limit_tiles * Image::kBytes);
  CHECK(w.num_passes >= 1);
  // One image more than the workspace has, to see that it stays untouched.
  std::vector<uint4> storage((w.capacity + 1) * Image::kBytes / 16);
  w.tiles = reinterpret_cast<uint8_t*>(storage.data());

  const auto unit_of = [&](int s) {
    const int queries = c.queries[s] > c.short_query_len ? c.queries[s] : 0;
    return tq4::unit_keys(c.lengths[s], queries, c.window_left, kTokens);
  };
  int64_t seen = 0;
  for (int pass = 0; pass < w.num_passes; ++pass) {
    std::memset(static_cast<void*>(storage.data()), 0xee, storage.size() * 16);
    emulation::launch(tq4::expand_tiles_kernel<Image>, c.grid, Image::kExpandThreads, p, w, pass);
    std::vector<bool> written(w.capacity + 1);
    int64_t before = 0;
    for (int s = 0; s < num_seqs; ++s) {
      const tq4::UnitKeys unit = unit_of(s);
      for (int h = 0; h < heads; ++h) {
        const tq4::UnitPlace place = tq4::unit_place(w, before, unit.tiles, heads, h);
        if (unit.tiles == 0 || place.pass != pass) continue;
        for (int tile = 0; tile < unit.tiles; ++tile, ++seen) {
          const uint8_t* image = w.tiles + (place.first_tile + tile) * Image::kBytes;
          written[place.first_tile + tile] = true;
          // What write_scale leaves alone differs in these two.
          std::vector<uint8_t> scales[2]{std::vector<uint8_t>(Image::kBytes, 0x00),
                                         std::vector<uint8_t>(Image::kBytes, 0xff)};
          for (int token = 0; token < kTokens; ++token) {
            const int key = unit.begin + tile * kTokens + token;
            const bool there = key < c.lengths[s];
            const int64_t slot = there ? slot_of(s, key) : 0;
            const auto code = [&](bool value, int dim) {
              const uint8_t byte = cache.codes(value, slot, h)[dim / 2];
              return dim % 2 ? byte & 15 : byte >> 4;
            };
            for (int chunk = 0; chunk < Image::kKeyChunks; ++chunk) {
              const auto* x =
                  reinterpret_cast<const int8_t*>(image + Image::key_offset(token, chunk));
              for (int i = 0; i < 16; ++i) {
                const int dim = Image::key_dim(chunk) + (i ^ 1);
                const bool covered = there && i < Image::key_dims(chunk);
                CHECK(x[i] == (covered ? kCodes[code(false, dim)] : 0));
              }
            }
            const float v_norm = there ? std::ldexp(*cache.norm(true, slot, h), exponent) : 0.f;
            const float v_norm_half = emulation::half_to_float(emulation::float_to_half(v_norm));
            for (int chunk = 0; chunk < Image::kValueChunks; ++chunk) {
              const auto* x =
                  reinterpret_cast<const uint16_t*>(image + Image::value_offset(token, chunk));
              for (int i = 0; i < 8; ++i) {
                uint16_t expected = 0;
                if (there && chunk < D / 8) {
                  const float unit_value = emulation::half_to_float(emulation::float_to_half(
                      std::ldexp(book.centroids[code(true, 8 * chunk + i)], -exponent)));
                  expected = emulation::float_to_half(unit_value * v_norm_half);
                }
                CHECK(x[i] == expected);
              }
            }
            for (auto& bytes : scales) {
              Image::write_scale(bytes.data(), token, there ? *cache.norm(false, slot, h) : 0.f);
            }
          }
          int written_bytes = 0;
          for (int i = 0; i < Image::kBytes; ++i) {
            if (scales[0][i] != scales[1][i]) continue;
            ++written_bytes;
            CHECK(image[i] == scales[0][i]);
          }
          // Nothing is left out: images are copied whole.
          CHECK(written_bytes + 16 * kTokens * (Image::kKeyChunks + Image::kValueChunks) ==
                Image::kBytes);
        }
      }
      before += unit.tiles;
    }
    for (int64_t tile = 0; tile <= w.capacity; ++tile) {
      if (written[tile]) continue;
      bool untouched = true;
      for (int i = 0; i < Image::kBytes; ++i) {
        untouched = untouched && w.tiles[tile * Image::kBytes + i] == 0xee;
      }
      CHECK(untouched);
    }
  }
  int64_t all = 0;
  for (int s = 0; s < num_seqs; ++s) all += unit_of(s).tiles * heads;
  CHECK(seen == all);
  if (tq4::test::failures() > 0) std::printf("%s, D %d\n", name, D);
}

template <int D>
void run_dim(const char* name, const Case& c) {
  run<tq4::sm80::PrefillImage<tq4::sm80::PrefillConfig<D, true, true>>>(name, c);
  run<PlainImage<D>>(name, c);
}

template <int D>
void run_layouts() {
  Case c;
  c.num_kv_heads = 2;
  c.lengths = {0, 1, 130, 64, 47};
  c.queries = {1, 1, 7, 0, 47};
  run_dim<D>("lengths", c);
  c.head_major = true;
  run_dim<D>("head-major", c);
  c.pad = 4;
  run_dim<D>("unaligned rows", c);
  c.block_size = 48;
  run_dim<D>("page of 48", c);
}

}  // namespace

int main() {
  run_layouts<64>();
  run_layouts<96>();
  run_layouts<128>();
  run_layouts<256>();

  Case c;
  c.lengths = {300, 20, 0, 190, 64};
  c.queries = {10, 20, 3, 1, 64};
  c.num_kv_heads = 3;
  c.window_left = 50;
  run_dim<64>("window", c);
  c.limit_tiles = 9;
  run_dim<64>("window in passes", c);
  c.window_left = -1;
  c.limit_tiles = 6;
  c.grid = 1;
  run_dim<64>("passes", c);
  c.grid = 50;
  run_dim<64>("more CTAs than tiles", c);
  c.short_query_len = 3;
  run_dim<64>("without short sequences", c);
  c.short_query_len = 64;
  run_dim<64>("short sequences only", c);

  c = Case{};
  c.grid = 2;
  c.lengths.clear();
  c.queries.clear();
  for (int s = 0; s < 600; ++s) {
    c.lengths.push_back(s % 3 == 0 ? 0 : s % 37);
    c.queries.push_back(s % 5);
  }
  c.limit_tiles = 150;
  run<tq4::sm80::PrefillImage<tq4::sm80::PrefillConfig<64, true, true>>>("many sequences", c);
  c.short_query_len = 2;
  run<tq4::sm80::PrefillImage<tq4::sm80::PrefillConfig<64, true, true>>>("many, some short", c);
  return tq4::test::report("test_tile_expand_emulated");
}
