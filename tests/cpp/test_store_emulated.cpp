// The kernels of store and compress, run on the CPU (emulation/), against the definition in double
// precision: head dimensions, dtypes, rotations of every kind, both layouts, strided and unaligned
// input, skipped slots, odd codebooks.  Compiled against a copy of csrc/device beside
// emulation/ptx.
#include "device/encode_kernel.cuh"
#include "device/encode_rows.cuh"
#include "device/encode_wgmma.cuh"
#include "emulated_cache.h"
#include "intrinsics.h"

namespace {

using namespace tq4::test;

struct Case {
  int tokens = 5, heads = 2, block_size = 16;
  Turn k_turn = Turn::kHadamard, v_turn = Turn::kOrthogonal;
  bool head_major = false;
  int pad = 0;  // of cache rows, bytes
  int gap = 0;  // of input rows, elements
  bool crowded = false;
  bool norm_correction = false;
  bool dense = false;    // compress
  bool strange = false;  // zero, NaN and huge rows
  int warps = 2, ctas = 1;
  int tile_buffers = 1;
};

// Which kernel, and whether Hadamard rotations reach it as signs.
enum class Way { kMatrix, kSigns, kRows, kWgmma };

// Checks one encoded row against x.
template <typename T>
void check_row(const T* x, int dim, const Rotation& rotation, const Codebook& book, bool correct,
               const uint8_t* codes, float norm) {
  double square = 0;
  for (int i = 0; i < dim; ++i) square += static_cast<double>(to_float(x[i])) * to_float(x[i]);
  const double n = std::sqrt(square);
  double decoded_square = 0;
  for (int i = 0; i < dim; ++i) {
    double y = 0;
    if (rotation.data() == nullptr) {
      y = to_float(x[i]);
    } else {
      for (int j = 0; j < dim; ++j) y += static_cast<double>(rotation.at(i, j)) * to_float(x[j]);
    }
    y /= n + 1e-10;
    const int index = i % 2 == 0 ? codes[i / 2] >> 4 : codes[i / 2] & 15;
    int low = 0, high = 0;
    for (float b : book.boundaries) {
      low += b < y - 1e-5;
      high += b < y + 1e-5;
    }
    CHECK(low <= index && index <= high);
    decoded_square += static_cast<double>(book.centroids[index]) * book.centroids[index];
  }
  const double expected = correct ? n / std::sqrt(decoded_square) : n;
  CHECK(std::fabs(norm - expected) <= 1e-6 * expected);
}

template <typename T, int D>
void run(const Case& c, uint64_t seed) {
  Random random(seed);
  Dense<T> key(c.tokens, c.heads, D, c.gap, 0xff), value(c.tokens, c.heads, D, c.gap, 0xff);
  const auto fill = [&](Dense<T>& dense) {
    for (int i = 0; i < c.tokens * c.heads; ++i) {
      T* row = dense.row(i / c.heads, i % c.heads);
      const double size = std::exp(2 * gaussian(&random));
      for (int d = 0; d < D; ++d)
        row[d] = from_float<T>(static_cast<float>(size * gaussian(&random)));
      row[random.range(0, D - 1)] = from_float<T>(static_cast<float>(30 * size));
      if (c.strange && i % 4 == 1) {
        const float odd[4] = {0.f, NAN, INFINITY, 0.f};
        for (int d = 0; d < D; ++d) row[d] = from_float<T>(odd[i / 4 % 4]);
      }
    }
  };
  fill(key);
  fill(value);
  const Rotation k_rotation = make_rotation(c.k_turn, D, &random);
  const Rotation v_rotation = make_rotation(c.v_turn, D, &random);
  const Codebook book = c.crowded ? crowded_codebook(D) : gaussian_codebook(D);
  Codebook v_book = book;
  for (float& x : v_book.centroids) x *= 1.25f;
  for (float& x : v_book.boundaries) x *= 1.25f;
  // 16-byte aligned copies of the tables are not needed: they are read word by word.
  const int num_blocks = c.tokens / c.block_size + 3;
  std::vector<int64_t> slots(c.tokens);
  std::set<int64_t> used;
  for (int64_t& slot : slots) {
    do {
      slot = random.range(0, num_blocks * c.block_size - 1);
    } while (!used.insert(slot).second);
    if (random.range(0, 5) == 0) slot = -1;
  }
  // With a spare element behind each.
  using Packed = std::vector<uint32_t>;
  using Norms = std::vector<float>;

  const auto encode = [&](Way way, Cache& cache, Packed& packed, Norms& norms) {
    const bool k_signs = way != Way::kMatrix && k_rotation.signs() != nullptr;
    const bool v_signs = way != Way::kMatrix && v_rotation.signs() != nullptr;
    tq4::EncodeParams p;
    if (c.dense) {
      tq4::CompressParams s = {};
      s.x = key.data;
      s.x_token_stride = key.token_stride;
      s.x_head_stride = key.head_stride;
      s.dtype = dtype_of<T>();
      s.rotation = k_signs ? k_rotation.signs() : k_rotation.data();
      s.signs = k_signs;
      s.centroids = book.centroids;
      s.boundaries = book.boundaries;
      s.packed = reinterpret_cast<uint8_t*>(packed.data());
      s.norms = norms.data();
      s.num_tokens = c.tokens;
      s.num_heads = c.heads;
      s.head_dim = D;
      s.norm_correction = c.norm_correction;
      p = tq4::encode_params(s);
    } else {
      tq4::StoreParams s = {};
      s.key = key.data;
      s.value = value.data;
      s.key_token_stride = key.token_stride;
      s.key_head_stride = key.head_stride;
      s.value_token_stride = value.token_stride;
      s.value_head_stride = value.head_stride;
      s.dtype = dtype_of<T>();
      s.cache = cache.view;
      s.slot_mapping = slots.data();
      s.k_rotation = k_signs ? k_rotation.signs() : k_rotation.data();
      s.v_rotation = v_signs ? v_rotation.signs() : v_rotation.data();
      s.k_signs = k_signs;
      s.v_signs = v_signs;
      s.k_centroids = book.centroids;
      s.k_boundaries = book.boundaries;
      s.v_centroids = v_book.centroids;
      s.v_boundaries = v_book.boundaries;
      s.num_tokens = c.tokens;
      s.norm_correction = c.norm_correction;
      p = tq4::encode_params(s);
    }
    if (way == Way::kRows) {
      tq4::EncodeRowsParams rows;
      if (!tq4::make_encode_rows_params(rows, p, D)) return false;
      const emulation::Index grid = {static_cast<int>(tq4::encode_rows_ctas(rows)), p.num_sides, 1};
      emulation::launch_grid(tq4::encode_rows_kernel<T>, grid, tq4::kEncodeRowsThreads, rows);
      return true;
    }
    if (way == Way::kWgmma) {
      if constexpr (sizeof(T) == 2 && (D == 64 || D == 128)) {
        if (!tq4::encode_wgmma_takes(p, D)) return false;
        using Config = tq4::EncodeWgmmaConfig<T, D>;
        emulation::launch(tq4::encode_wgmma_kernel<Config>, c.ctas * p.num_sides, Config::kThreads,
                          p);
        return true;
      }
      return false;
    }
    p.tile_buffers = c.tile_buffers;
    using Config = tq4::EncodeConfig<T, D>;
    emulation::launch(tq4::encode_kernel<Config>, c.ctas * p.num_sides, 32 * c.warps, p);
    return true;
  };

  const bool has_signs = k_rotation.signs() != nullptr || v_rotation.signs() != nullptr;
  const bool has_matrix =
      (k_rotation.data() != nullptr && k_rotation.signs() == nullptr) ||
      (!c.dense && v_rotation.data() != nullptr && v_rotation.signs() == nullptr);
  const bool aligned = c.gap * sizeof(T) % 16 == 0;
  Packed first_packed;
  Norms first_norms;
  std::vector<uint4> first_storage;
  for (const Way way : {Way::kMatrix, Way::kSigns, Way::kRows, Way::kWgmma}) {
    if (way == Way::kSigns && !has_signs) continue;
    Cache cache(c.head_major, num_blocks, c.heads, c.block_size, D, c.pad, 0xa5);
    Packed packed(static_cast<size_t>(c.tokens) * c.heads * D / 8 + 1, 0xa5a5a5a5u);
    Norms norms(static_cast<size_t>(c.tokens) * c.heads + 1, -7.f);
    const bool done = encode(way, cache, packed, norms);
    const bool wide = c.dense || tq4::copy_width(cache.view) >= D / 8;
    const bool of_kernel = way == Way::kRows    ? D != 96
                           : way == Way::kWgmma ? sizeof(T) == 2 && (D == 64 || D == 128) && wide
                                                : true;
    CHECK(done == (of_kernel && (way < Way::kRows || (aligned && !has_matrix))));
    if (!done) continue;

    // Every row that was to be stored, and no other byte.
    std::vector<uint8_t> written(cache.storage.size() * 16, 0);
    for (int i = 0; i < c.tokens * c.heads; ++i) {
      const int token = i / c.heads, head = i % c.heads;
      const bool odd = c.strange && i % 4 == 1;
      const bool finite = !odd || i / 4 % 4 == 0 || i / 4 % 4 == 3;
      if (c.dense) {
        if (finite) {
          check_row(key.row(token, head), D, k_rotation, book, c.norm_correction,
                    reinterpret_cast<uint8_t*>(packed.data()) + i * D / 2, norms[i]);
        }
        continue;
      }
      if (slots[token] < 0) continue;
      for (int side = 0; side < 2; ++side) {
        uint8_t* codes = cache.codes(side, slots[token], head);
        float* norm = cache.norm(side, slots[token], head);
        std::memset(written.data() + (codes - cache.bytes()), 1, D / 2);
        std::memset(written.data() + (reinterpret_cast<uint8_t*>(norm) - cache.bytes()), 1, 4);
        if (finite) {
          check_row((side ? value : key).row(token, head), D, side ? v_rotation : k_rotation,
                    side ? v_book : book, c.norm_correction, codes, *norm);
        }
        if (finite && odd) CHECK(*norm == 0.f);
      }
    }
    if (c.dense) {
      CHECK(packed.back() == 0xa5a5a5a5u && norms.back() == -7.f);
    } else {
      bool untouched = true;
      for (size_t i = 0; i < written.size(); ++i) {
        untouched = untouched && (written[i] || cache.bytes()[i] == 0xa5);
      }
      CHECK(untouched);
    }
    // Signs give the bytes that their matrix gives.
    if (way == Way::kMatrix) {
      first_packed = packed, first_norms = norms, first_storage = cache.storage;
    } else if (way == Way::kSigns) {
      CHECK(packed == first_packed);
      CHECK(std::memcmp(norms.data(), first_norms.data(), norms.size() * sizeof(float)) == 0);
      CHECK(std::memcmp(cache.storage.data(), first_storage.data(),
                        cache.storage.size() * sizeof(uint4)) == 0);
    }
  }
}

template <int D>
void run_dim(uint64_t seed) {
  Case plain;
  run<__half, D>(plain, ++seed);
  run<__nv_bfloat16, D>(plain, ++seed);
  run<float, D>(plain, ++seed);

  Case swapped;  // every kind of rotation on either side
  swapped.k_turn = Turn::kOrthogonal;
  swapped.v_turn = Turn::kNone;
  swapped.head_major = true;
  swapped.heads = 3;
  swapped.pad = 4;
  run<__half, D>(swapped, ++seed);
  run<__nv_bfloat16, D>(swapped, ++seed);
  run<float, D>(swapped, ++seed);

  Case views;  // strided input, narrow writes, odd block size, several rounds of tiles
  views.k_turn = Turn::kNone;
  views.v_turn = D == 96 ? Turn::kNone : Turn::kHadamard;
  views.tokens = 70;
  views.heads = 1;
  views.block_size = 48;
  views.pad = 8;
  views.gap = 8;
  run<__half, D>(views, ++seed);
  views.tile_buffers = 2;
  run<__half, D>(views, ++seed);
  views.gap = 3;
  views.norm_correction = true;
  run<__nv_bfloat16, D>(views, ++seed);
  run<float, D>(views, ++seed);

  Case strange;
  strange.tokens = 40;
  strange.strange = true;
  strange.k_turn = D == 96 ? Turn::kNone : Turn::kHadamard;
  strange.v_turn = Turn::kNone;
  strange.ctas = 2;
  run<__half, D>(strange, ++seed);
  strange.tile_buffers = 2;
  run<float, D>(strange, ++seed);

  Case crowded;
  crowded.crowded = true;
  crowded.v_turn = Turn::kNone;
  crowded.norm_correction = true;
  run<__half, D>(crowded, ++seed);

  Case dense;
  dense.dense = true;
  dense.tokens = 21;
  dense.heads = 5;
  dense.k_turn = D == 96 ? Turn::kOrthogonal : Turn::kAlmostHadamard;
  dense.gap = 5;
  run<__half, D>(dense, ++seed);
  dense.gap = 0;
  dense.k_turn = D == 96 ? Turn::kNone : Turn::kHadamard;
  dense.norm_correction = true;
  run<__nv_bfloat16, D>(dense, ++seed);
  run<float, D>(dense, ++seed);

  Case both;  // as in a model: signs on both sides
  both.k_turn = both.v_turn = D == 96 ? Turn::kNone : Turn::kHadamard;
  both.tokens = 37;
  both.heads = 3;
  run<__half, D>(both, ++seed);
  both.head_major = true;
  both.pad = 4;
  run<__nv_bfloat16, D>(both, ++seed);
  run<float, D>(both, ++seed);
  both.heads = 8;  // wide rows, as wgmma takes them: several rounds of tiles, and odd rows
  both.head_major = false;
  both.tokens = 167;
  both.pad = 0;
  run<__half, D>(both, ++seed);
  both.heads = 6;
  both.tokens = 141;
  both.strange = true;
  both.v_turn = Turn::kNone;
  both.gap = 8;
  both.ctas = 2;
  run<__nv_bfloat16, D>(both, ++seed);
  both.strange = false;
  both.tokens = 1;
  both.norm_correction = true;
  both.gap = 8;
  run<__half, D>(both, ++seed);
}

}  // namespace

int main() {
  run_dim<64>(100);
  run_dim<96>(200);
  run_dim<128>(300);
  run_dim<256>(400);
  return tq4::test::report("test_store_emulated");
}
