// The prefill kernels themselves, run on the CPU (cuda_cpu.h), against attention in double
// precision: by mma.sync from pages and from unpacked tiles, by wgmma; head dimensions, modes,
// layouts, chunks, windows, soft cap, sinks, poisoned tails and garbage in the block table.
#include "emulated_cache.h"
// What the kernel includes must come after the emulation.
#include "device/page_copy.h"
#include "kernels/sm80_prefill.cuh"
#include "kernels/sm80_prefill_tiles.cuh"

// Code of sm_90a, without the instructions that only the order of others needs.
#define __CUDA_ARCH_FEAT_SM90_ALL
#define asm
#define volatile(...)
#include "device/prefill_prepare.cuh"
#include "device/wgmma_prefill.cuh"
#undef asm
#undef volatile

namespace {

using tq4::test::Random;
using tq4::test::Turn;

struct Case {
  int head_dim = 128;
  bool int8 = true;
  int num_kv_heads = 1, group = 4;
  std::vector<int> lengths{70};
  std::vector<int> queries{20};
  bool head_major = false;
  int block_size = 16;
  Turn turn = Turn::kNone;
  bool bf16 = false;
  int window_left = -1, window_right = 0;
  float softcap = 0.f;
  bool sinks = false;
  float sm_scale = 0.f;        // 0: 1 / sqrt(D)
  int gap = 8;                 // elements between rows of q and out
  int64_t limit_tiles = 1000;  // of the workspace, where the kernel has one
  int short_query_len = 0;     // sequences of up to so many query tokens are not prefill's
};

constexpr int kCodes[16] = {-104, -79, -62, -48, -36, -25, -15, -5, 5, 15, 25, 36, 48, 62, 79, 104};

template <int D, bool kInt8>
void launch_pages(const tq4::AttentionParams& p) {
  using Config = tq4::sm80::PrefillConfig<D, kInt8>;
  const int group = p.num_q_heads / p.cache.num_kv_heads;
  const int64_t slots = tq4::prefill_slots(p.num_tokens, group, Config::kRows, p.num_seqs);
  emulation::launch(tq4::sm80::prefill_kernel<Config>,
                    static_cast<int>(slots * p.cache.num_kv_heads), Config::kThreads, p,
                    tq4::copy_width(p.cache), tq4::block_shift(p.cache));
}

// As csrc/kernels/sm80_prefill_tiles.cu does: with one ring of 8 warps a CTA, or one or two of 4.
template <int D, int kWarps>
void launch_tiles(const tq4::AttentionParams& p, int64_t limit_tiles, int rings) {
  using Config = tq4::sm80::PrefillConfig<D, true, true, kWarps>;
  using Image = tq4::sm80::PrefillImage<Config>;
  using Unit = tq4::sm80::QueryUnit<D>;
  const int group = p.num_q_heads / p.cache.num_kv_heads, heads = p.cache.num_kv_heads;
  tq4::TileWorkspace w = tq4::make_tile_workspace(
      p.num_seqs, heads, static_cast<int64_t>(p.max_blocks) * p.cache.block_size, Config::kTile,
      Image::kBytes, limit_tiles * Image::kBytes);
  CHECK(w.num_passes >= 1);
  tq4::sm80::QueryBuffers queries{};
  queries.num_units =
      static_cast<int>(tq4::prefill_slots(p.num_tokens, group, Unit::kRows, p.num_seqs) * heads);
  queries.num_works =
      static_cast<int>(tq4::prefill_slots(p.num_tokens, group, Config::kRows, p.num_seqs) * heads);
  std::vector<uint4> storage(w.capacity * Image::kBytes / 16);
  std::vector<uint4> units(queries.num_units * Unit::kBytes / 16);
  std::vector<uint4> rotation(tq4::sm80::RotationImage<Config>::kBytes / 16);
  for (auto* memory : {&units, &rotation}) {
    std::memset(static_cast<void*>(memory->data()), 0xff, memory->size() * 16);
  }
  w.tiles = reinterpret_cast<uint8_t*>(storage.data());
  queries.units = reinterpret_cast<uint8_t*>(units.data());
  if (p.out_rotation != nullptr) queries.rotation = reinterpret_cast<uint8_t*>(rotation.data());
  const bool resident = kWarps == 8;  // so that both ways are compared
  emulation::launch(tq4::sm80::rotate_queries_kernel<Config>, 2,
                    tq4::sm80::QueryConfig<D>::kThreads, p, queries, resident);
  for (int pass = 0; pass < w.num_passes; ++pass) {
    // NaN: what no tile of this pass holds must not be used.
    std::memset(static_cast<void*>(storage.data()), 0xff, storage.size() * 16);
    emulation::launch(tq4::expand_tiles_kernel<Image>, 2, Image::kExpandThreads, p, w, pass);
    emulation::launch_rows(tq4::sm80::prefill_tiles_kernel<Config>,
                           tq4::ceil_div(queries.num_works, rings), Config::kThreads, rings, p, w,
                           queries, pass);
  }
}

// As csrc/kernels/sm90_prefill.cu does.
template <int D>
void launch_wgmma(tq4::AttentionParams p, int64_t limit_tiles) {
  using Config = tq4::sm90::PrefillConfig<D>;
  using Prepare = tq4::sm90::PrepareConfig<D>;
  using Image = tq4::WgmmaImage<D>;
  using Query = tq4::QueryImage<D>;
  const int group = p.num_q_heads / p.cache.num_kv_heads;
  const int64_t slots = tq4::prefill_slots(p.num_tokens, group, Query::kRows, p.num_seqs);
  const int images = static_cast<int>(slots) * p.cache.num_kv_heads;
  tq4::TileWorkspace w = tq4::make_tile_workspace(
      p.num_seqs, p.cache.num_kv_heads, static_cast<int64_t>(p.max_blocks) * p.cache.block_size,
      Image::kTileTokens, Image::kBytes, limit_tiles * Image::kBytes);
  CHECK(w.num_passes >= 1);
  tq4::sm90::PrefillBuffers buffers{};
  buffers.num_slots = static_cast<int32_t>(slots);
  buffers.queries = tq4::round_up<int64_t>(4 * w.num_passes, Config::kAlign);
  buffers.rotation =
      tq4::round_up<int64_t>(buffers.queries + int64_t{images} * Query::kBytes, Config::kAlign);
  const int64_t tiles = buffers.rotation + int64_t{Image::kRotationTiles} * Image::Value::kBytes;
  std::vector<uint4> storage((tiles + w.capacity * Image::kBytes) / 16);
  auto* const workspace = reinterpret_cast<uint8_t*>(storage.data());
  std::memset(workspace, 0xff, storage.size() * 16);
  p.workspace = workspace;
  w.tiles = workspace + tiles;
  emulation::launch(tq4::sm90::prepare_queries_kernel<D>, 3, Prepare::kThreads, p,
                    workspace + buffers.queries, images, workspace + buffers.rotation,
                    reinterpret_cast<int32_t*>(workspace + buffers.counters), w.num_passes);
  for (int pass = 0; pass < w.num_passes; ++pass) {
    // NaN: what no tile of this pass holds must not be used.
    std::memset(w.tiles, 0xff, w.capacity * Image::kBytes);
    emulation::launch(tq4::expand_tiles_kernel<Image>, 2, Image::kExpandThreads, p, w, pass);
    emulation::launch(tq4::sm90::wgmma_prefill_kernel<D>, std::min(images, 2), Config::kThreads, p,
                      w, buffers, pass);
  }
}

enum class Kernel { kPages, kTiles, kOneRing, kTwoRings, kWgmma };

template <int D>
void launch(const tq4::AttentionParams& p, Kernel kernel, int64_t limit_tiles) {
  if (kernel == Kernel::kWgmma) return launch_wgmma<D>(p, limit_tiles);
  if (kernel == Kernel::kTiles) return launch_tiles<D, 8>(p, limit_tiles, 1);
  if (kernel == Kernel::kOneRing) return launch_tiles<D, 4>(p, limit_tiles, 1);
  if (kernel == Kernel::kTwoRings) return launch_tiles<D, 4>(p, limit_tiles, 2);
  if (p.int8) return launch_pages<D, true>(p);
  launch_pages<D, false>(p);
}

void launch(const tq4::AttentionParams& p, Kernel kernel, int64_t limit_tiles) {
  switch (p.cache.head_dim) {
    case 64:
      return launch<64>(p, kernel, limit_tiles);
    case 96:
      return launch<96>(p, kernel, limit_tiles);
    case 128:
      return launch<128>(p, kernel, limit_tiles);
    default:
      return launch<256>(p, kernel, limit_tiles);
  }
}

// Returns the bytes of the output and of the LSE.
template <typename T>
std::vector<uint8_t> run(const char* name, const Case& c, Kernel kernel, uint64_t seed) {
  Random random(seed);
  const int D = c.head_dim, hkv = c.num_kv_heads, hq = hkv * c.group;
  const int num_seqs = static_cast<int>(c.lengths.size());
  std::vector<int32_t> starts{0};
  for (int t : c.queries) starts.push_back(starts.back() + t);
  const int num_tokens = starts.back() + 1;  // one padding row

  // Pages in random order; what is not written stays 0xff: NaN norms, block ids far outside.
  int used = 0, max_blocks = 2;
  for (int length : c.lengths) {
    used += tq4::ceil_div(length, c.block_size);
    max_blocks = std::max(max_blocks, tq4::ceil_div(length, c.block_size) + 1);
  }
  tq4::test::Cache cache(c.head_major, used + 1, hkv, c.block_size, D, 0, 0xff);
  std::vector<int> blocks(used + 1);
  for (int i = 0; i <= used; ++i) blocks[i] = i;
  for (int i = used; i > 0; --i) std::swap(blocks[i], blocks[random.range(0, i)]);
  std::vector<int32_t> table(static_cast<size_t>(num_seqs) * max_blocks, 0x7ffffff0);
  const auto book = tq4::test::gaussian_codebook(D);
  for (int s = 0; s < num_seqs; ++s) {
    for (int b = 0; b < tq4::ceil_div(c.lengths[s], c.block_size); ++b) {
      table[s * max_blocks + b] = blocks.back();
      blocks.pop_back();
    }
    for (int j = 0; j < c.lengths[s]; ++j) {
      const int64_t slot =
          static_cast<int64_t>(table[s * max_blocks + j / c.block_size]) * c.block_size +
          j % c.block_size;
      for (int h = 0; h < hkv; ++h) {
        for (bool value : {false, true}) {
          for (int i = 0; i < D / 2; ++i) {
            cache.codes(value, slot, h)[i] = static_cast<uint8_t>(random.next());
          }
          *cache.norm(value, slot, h) = std::sqrt(static_cast<float>(D)) *
                                        static_cast<float>(1 + 0.2 * tq4::test::gaussian(&random));
        }
      }
    }
  }

  tq4::test::Dense<T> q(num_tokens, hq, D, c.gap, 0), out(num_tokens, hq, D, c.gap, 0xff);
  for (int t = 0; t < num_tokens; ++t) {
    for (int h = 0; h < hq; ++h) {
      for (int d = 0; d < D; ++d) {
        q.row(t, h)[d] = tq4::test::from_float<T>(static_cast<float>(tq4::test::gaussian(&random)));
      }
    }
  }
  const auto q_rotation = tq4::test::make_rotation(c.turn, D, &random);
  const auto out_rotation = tq4::test::make_rotation(c.turn, D, &random);
  std::vector<float> lse(static_cast<size_t>(hq) * num_tokens, 7.f), sinks(hq);
  for (float& x : sinks) x = static_cast<float>(tq4::test::gaussian(&random));
  int8_t codes[16];
  for (int i = 0; i < 16; ++i) codes[i] = static_cast<int8_t>(kCodes[i]);
  const float code_unit = book.centroids[15] / 104.f;

  tq4::AttentionParams p = {};
  p.q = q.data;
  p.out = out.data;
  p.lse = lse.data();
  p.q_token_stride = q.token_stride, p.q_head_stride = q.head_stride;
  p.out_token_stride = out.token_stride, p.out_head_stride = out.head_stride;
  p.dtype = tq4::test::dtype_of<T>();
  p.cache = cache.view;
  p.block_table = table.data();
  p.block_table_stride = max_blocks;
  p.max_blocks = max_blocks;
  p.seq_lens = c.lengths.data();
  p.query_start_loc = starts.data();
  p.q_rotation = q_rotation.data();
  p.out_rotation = out_rotation.data();
  p.k_centroids = p.v_centroids = book.centroids;
  p.k_codes = codes;
  p.k_code_scale = code_unit;
  p.sinks = c.sinks ? sinks.data() : nullptr;
  p.sm_scale = c.sm_scale != 0.f ? c.sm_scale : 1.f / std::sqrt(static_cast<float>(D));
  p.softcap = c.softcap;
  p.window_left = c.window_left, p.window_right = c.window_right;
  p.int8 = c.int8;
  p.num_seqs = num_seqs, p.num_tokens = num_tokens, p.num_q_heads = hq;
  p.max_query_len = num_tokens;
  p.short_query_len = c.short_query_len;
  p.num_sms = 2, p.arch = 80;
  launch(p, kernel, c.limit_tiles);

  double error = 0, norm = 0, worst_lse = 0;
  for (int s = 0; s < num_seqs; ++s) {
    const int length = c.lengths[s], count = c.queries[s];
    for (int t = 0; t < count; ++t) {
      for (int h = 0; h < hq; ++h) {
        const int token = starts[s] + t, kv = h / c.group;
        if (count <= c.short_query_len) {
          bool untouched = lse[static_cast<size_t>(h) * num_tokens + token] == 7.f;
          const auto* bytes = reinterpret_cast<const uint8_t*>(out.row(token, h));
          for (size_t i = 0; i < D * sizeof(T); ++i) untouched = untouched && bytes[i] == 0xff;
          CHECK(untouched);
          continue;
        }
        std::vector<double> rotated(D);
        for (int i = 0; i < D; ++i) {
          rotated[i] = tq4::test::to_float(q.row(token, h)[i]);
          if (p.q_rotation == nullptr) continue;
          rotated[i] = 0;
          for (int k = 0; k < D; ++k) {
            rotated[i] +=
                static_cast<double>(q_rotation.at(i, k)) * tq4::test::to_float(q.row(token, h)[k]);
          }
        }
        if (c.int8) {
          float largest = 0;
          for (double x : rotated) largest = std::max(largest, std::fabs(static_cast<float>(x)));
          const float unit = largest / 127.f;
          for (double& x : rotated) x = std::nearbyint(static_cast<float>(x) / unit) * unit;
        }
        const auto element = [&](bool value, int j, int i, double* factor) {
          const int64_t slot =
              static_cast<int64_t>(table[s * max_blocks + j / c.block_size]) * c.block_size +
              j % c.block_size;
          const uint8_t byte = cache.codes(value, slot, kv)[i / 2];
          *factor = *cache.norm(value, slot, kv);
          return i % 2 ? byte & 15 : byte >> 4;
        };
        const int position = length - count + t;
        std::vector<double> score(length, -INFINITY);
        double top = c.sinks ? sinks[h] : -INFINITY;
        for (int j = 0; j < length; ++j) {
          if (c.window_right >= 0 && j > position + c.window_right) continue;
          if (c.window_left >= 0 && j < position - c.window_left) continue;
          double dot = 0, key_norm = 0;
          for (int i = 0; i < D; ++i) {
            const int code = element(false, j, i, &key_norm);
            dot += rotated[i] *
                   (c.int8 ? kCodes[code] * static_cast<double>(code_unit) : book.centroids[code]);
          }
          score[j] = dot * key_norm * p.sm_scale;
          if (c.softcap > 0) score[j] = c.softcap * std::tanh(score[j] / c.softcap);
          top = std::max(top, score[j]);
        }
        double sum = c.sinks ? std::exp(sinks[h] - top) : 0;
        std::vector<double> o(D), expected(D);
        for (int j = 0; j < length; ++j) {
          if (score[j] == -INFINITY) continue;
          const double weight = std::exp(score[j] - top);
          sum += weight;
          for (int i = 0; i < D; ++i) {
            double value_norm = 0;
            const int code = element(true, j, i, &value_norm);
            o[i] += weight * book.centroids[code] * value_norm;
          }
        }
        for (double& x : o) x = sum > 0 ? x / sum : 0;
        expected = o;
        if (p.out_rotation != nullptr) {
          for (int i = 0; i < D; ++i) {
            expected[i] = 0;
            for (int k = 0; k < D; ++k) expected[i] += o[k] * out_rotation.at(k, i);
          }
        }
        for (int i = 0; i < D; ++i) {
          const double difference = tq4::test::to_float(out.row(token, h)[i]) - expected[i];
          error += difference * difference;
          norm += expected[i] * expected[i];
        }
        const float got = lse[static_cast<size_t>(h) * num_tokens + token];
        if (sum > 0) {
          const double off = std::fabs(got - (top + std::log(sum)));
          worst_lse = off > worst_lse || off != off ? off : worst_lse;
        } else {
          CHECK(got == -INFINITY);
        }
      }
    }
  }
  // The padding row is nobody's.
  CHECK(lse[num_tokens - 1] == 7.f);
  const double relative = norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
  const double bound = (c.bf16 ? 3.5e-3 : 2e-3) + (c.int8 && c.turn != Turn::kNone ? 1e-3 : 0);
  CHECK(relative < bound);
  CHECK(worst_lse < (c.int8 && c.turn != Turn::kNone ? 2e-2 : 2e-3));
  if (!(relative < bound) || !(worst_lse < 2e-2)) {
    const char* const where[] = {"pages", "tiles", "tiles, one ring", "tiles, two rings",
                                 "tiles by wgmma"};
    std::printf("%s from %s: error %.2e, LSE %.2e\n", name, where[static_cast<int>(kernel)],
                relative, worst_lse);
  }
  std::vector<uint8_t> bytes(out.storage.size() * 16 + lse.size() * 4);
  std::memcpy(bytes.data(), out.storage.data(), out.storage.size() * 16);
  std::memcpy(bytes.data() + out.storage.size() * 16, lse.data(), lse.size() * 4);
  return bytes;
}

void run(const char* name, const Case& c) {
  static int number = 0;
  const Kernel rings = number++ % 2 == 0 ? Kernel::kTwoRings : Kernel::kOneRing;
  std::vector<uint8_t> from_tiles;
  for (const Kernel kernel : {Kernel::kPages, Kernel::kTiles, rings, Kernel::kWgmma}) {
    if (kernel != Kernel::kPages && !c.int8) continue;
    if (kernel == Kernel::kWgmma && c.gap % 8 != 0) continue;  // wants rows of 16-byte chunks
    const auto bytes =
        c.bf16 ? run<__nv_bfloat16>(name, c, kernel, 1) : run<__half>(name, c, kernel, 1);
    if (kernel == Kernel::kTiles) from_tiles = bytes;
    if (kernel == rings) CHECK(bytes == from_tiles);  // how rows are shared out changes no bit
  }
}

template <typename Change>
Case but(Change&& change) {
  Case c;
  change(c);
  return c;
}

}  // namespace

int main() {
  run("plain", Case{});
  run("hadamard", but([](Case& c) { c.turn = Turn::kHadamard; }));
  run("orthogonal", but([](Case& c) {
        c.turn = Turn::kOrthogonal;
        c.bf16 = true;
      }));
  run("lengths", but([](Case& c) {
        c.lengths = {0, 1, 16, 33, 130};
        c.queries = {1, 1, 3, 33, 2};
        c.num_kv_heads = 2;
        c.head_major = true;
      }));
  run("more queries than keys", but([](Case& c) { c.lengths = {5}, c.queries = {9}; }));
  run("more tiles than stages", but([](Case& c) {
        c.lengths = {700, 70};
        c.queries = {3, 60};
        c.turn = Turn::kHadamard;
      }));
  run("almost a Hadamard matrix", but([](Case& c) { c.turn = Turn::kAlmostHadamard; }));
  run("window", but([](Case& c) { c.window_left = 10, c.lengths = {150}; }));
  run("two-sided window", but([](Case& c) { c.window_left = 9, c.window_right = 4; }));
  run("not causal", but([](Case& c) { c.window_right = -1, c.group = 7; }));
  run("soft cap and sinks", but([](Case& c) { c.softcap = 3.f, c.sinks = true; }));
  run("negative scale", but([](Case& c) { c.sm_scale = -0.1f; }));
  run("page of 48", but([](Case& c) { c.block_size = 48; }));
  run("several passes", but([](Case& c) {
        c.lengths = {0, 200, 16, 70, 130};
        c.queries = {1, 3, 16, 70, 2};
        c.num_kv_heads = 3;
        c.limit_tiles = 7;
      }));
  run("several passes, window", but([](Case& c) {
        c.lengths = {300, 1, 150};
        c.queries = {80, 1, 150};
        c.num_kv_heads = 2;
        c.window_left = 33;
        c.limit_tiles = 9;
      }));
  for (const bool int8 : {true, false}) {
    run("beside short sequences", but([int8](Case& c) {
          c.lengths = {33, 200, 16, 0, 70, 130, 5};
          c.queries = {1, 9, 4, 2, 5, 3, 0};
          c.num_kv_heads = 2;
          c.short_query_len = 4;
          c.sinks = true;
          c.int8 = int8;
          c.limit_tiles = 7;
        }));
  }
  run("short sequences only", but([](Case& c) {
        c.lengths = {33, 20};
        c.queries = {1, 4};
        c.short_query_len = 4;
      }));
  for (const int d : {64, 96, 256}) {
    run("head dim", but([d](Case& c) { c.head_dim = d, c.turn = Turn::kOrthogonal; }));
  }
  for (const int d : {64, 96, 128, 256}) {
    run("fp16 scores", but([d](Case& c) { c.head_dim = d, c.int8 = false; }));
  }
  run("fp16 scores, rotated",
      but([](Case& c) { c.head_dim = 256, c.int8 = false, c.turn = Turn::kHadamard; }));
  return tq4::test::report("test_prefill_emulated");
}
