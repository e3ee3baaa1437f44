// The decode kernels themselves, run on the CPU (cuda_cpu.h), against attention in double
// precision: all modes, layouts and head dimensions, windows, soft cap, sinks, several query
// tokens, poisoned tails and garbage in the block table.  Compiled against a copy of csrc/device
// beside the ptx/ directory here.
#include <bitset>
#include <string>

#include "check.h"
#include "cluster_room.h"
#include "cuda_cpu.h"
#include "device/decode_cluster.cuh"
#include "device/decode_combine.cuh"
#include "device/decode_kernel.cuh"
#include "device/decode_plan.h"
#include "device/decode_prepare.cuh"
#include "device/decode_prepare_light.cuh"
#include "intrinsics.h"
#include "layout.h"

namespace {

using tq4::test::Random;

enum class Layout { kTokenMajor, kPaddedRows, kHeadMajor, kHeadMajorApart };

struct Case {
  int head_dim = 128;
  int num_kv_heads = 2, group = 4;
  std::vector<int> lengths{40};
  std::vector<int> queries;  // empty: one each, no query_start_loc
  int max_query_len = 1;
  bool short_only = false;  // longer sequences than max_query_len are not decode's
  Layout layout = Layout::kTokenMajor;
  int block_size = 16;
  bool int8 = true;
  bool bulk = true;
  int arch = 90;
  int num_sms = 2;
  bool rotate = false;
  enum { kReflections, kHadamard, kAlmostHadamard, kSigns } rotation = kReflections;
  bool cluster = false;  // the plan is to choose the cluster kernel
  bool bf16 = false;
  int window_left = -1, window_right = 0;
  float softcap = 0.f;
  bool sinks = false;
  float norm_scale = 1.f;  // of V
  float wild_norms = 0.f;  // spread of the norms, in powers of two
  float codebook_scale = 1.f;
  float codebook_shift = 0.f;  // makes it lopsided
  bool outliers = false;       // every third query row x20, one channel of q x10
  bool nan_row = false;
  bool zero_values = false;  // some V norms are zero, their keys dominate
};

double gaussian(Random* random) {
  const double u = (random->next() >> 11) * 0x1p-53 + 1e-18, v = (random->next() >> 11) * 0x1p-53;
  return std::sqrt(-2 * std::log(u)) * std::cos(6.283185307179586 * v);
}

// The 16-level Gaussian quantiser, rounded; any values would do.
constexpr float kCentroids[16] = {-2.733f, -2.069f, -1.618f, -1.256f, -0.942f, -0.657f,
                                  -0.388f, -0.128f, 0.128f,  0.388f,  0.657f,  0.942f,
                                  1.256f,  1.618f,  2.069f,  2.733f};
constexpr int kCodes[16] = {-104, -79, -62, -48, -36, -25, -15, -5, 5, 15, 25, 36, 48, 62, 79, 104};
constexpr float kCodeUnit = 2.733f / 104.f;

tq4::PageMaps make_page_maps(const tq4::PageView& view, const tq4::StageView& stage) {
  const auto map = [&](int k, int v, int bytes, int box_bytes) {
    return tq4::ptx::emulated_tensor_map(
        view.base + k,
        {static_cast<uint64_t>(bytes), static_cast<uint64_t>(view.block_size), 2,
         static_cast<uint64_t>(view.num_blocks)},
        {static_cast<uint64_t>(view.code_token_stride), static_cast<uint64_t>(v - k),
         static_cast<uint64_t>(view.block_stride)},
        {static_cast<uint64_t>(box_bytes), tq4::kTileTokens, 2});
  };
  return {map(view.k_codes, view.v_codes, view.num_kv_heads * view.head_dim / 2,
              stage.code_token_stride),
          map(view.k_norms, view.v_norms, view.num_kv_heads * 4, stage.norm_token_stride)};
}

template <int D, tq4::DecodeMode kMode, bool kBulk>
void run_mode(const tq4::AttentionParams& p, const tq4::DecodePlan& plan) {
  const auto go = [&](auto config) {
    using Config = decltype(config);
    typename tq4::DecodePipeline<Config>::Maps maps{};
    if constexpr (kBulk) {
      if (plan.boxes) maps = make_page_maps(p.cache, plan.copy.stage);
    }
    emulation::launch(tq4::decode_kernel<Config>, plan.grid, Config::kThreads, p, plan, maps);
  };
  if (plan.wide) return go(tq4::DecodeConfig<D, kMode, kBulk, true>{});
  go(tq4::DecodeConfig<D, kMode, kBulk, false>{});
}

template <int D>
void run_main(const tq4::AttentionParams& p, const tq4::DecodePlan& plan) {
  using tq4::DecodeMode;
  if (plan.mode == DecodeMode::kFp16Rows8) {
    return run_mode<D, DecodeMode::kFp16Rows8, false>(p, plan);
  }
  if (plan.mode == DecodeMode::kInt8x2Rows8) {
    return run_mode<D, DecodeMode::kInt8x2Rows8, true>(p, plan);
  }
  if constexpr (D != 256) {
    if (plan.mode == DecodeMode::kInt8Rows32) {
      return run_mode<D, DecodeMode::kInt8Rows32, true>(p, plan);
    }
    if (plan.mode == DecodeMode::kInt8Rows16) {
      if (plan.bulk) return run_mode<D, DecodeMode::kInt8Rows16, true>(p, plan);
      return run_mode<D, DecodeMode::kInt8Rows16, false>(p, plan);
    }
  }
  if (plan.bulk) return run_mode<D, DecodeMode::kInt8Rows8, true>(p, plan);
  run_mode<D, DecodeMode::kInt8Rows8, false>(p, plan);
}

template <int D>
void run_all(const tq4::AttentionParams& p, const tq4::DecodePlan& plan, int rows_per_block) {
  if (plan.cluster > 0) {
    if constexpr (D == 64 || D == 128) {
      tq4::DecodePlan one = plan;
      one.cluster = 1;
      const auto go = [&](auto config, const tq4::PageMaps& maps) {
        using Config = decltype(config);
        emulation::launch(tq4::decode_cluster_kernel<Config>, p.num_seqs * p.cache.num_kv_heads,
                          Config::kThreads, p, one, maps);
      };
      if (plan.cluster_copy == tq4::ClusterCopy::kBoxes) {
        go(tq4::ClusterConfig<D, true>{}, make_page_maps(p.cache, plan.copy.stage));
      } else {
        go(tq4::ClusterConfig<D, false>{}, {});
      }
    }
    return;
  }
  const int blocks = static_cast<int>(tq4::ceil_div<int64_t>(plan.query_rows, tq4::kPrepareRows));
  const int out_rows = p.num_seqs * p.max_query_len * p.num_q_heads;
  if constexpr (tq4::is_power_of_two(D)) {
    if (plan.light_prepare) {
      emulation::launch(tq4::decode_prepare_light_kernel<D>, std::min(2, blocks),
                        tq4::kPrepareRows * tq4::kWarpSize, p, plan);
    }
  }
  if (!plan.light_prepare) {
    emulation::launch(tq4::decode_prepare_kernel<D>, std::min(2, blocks),
                      tq4::PrepareConfig<D>::kThreads, p, plan);
  }
  run_main<D>(p, plan);
  emulation::launch(tq4::decode_combine_kernel<D>,
                    std::min(3, tq4::ceil_div(out_rows, rows_per_block)), tq4::kCombineThreads, p,
                    plan, rows_per_block);
}

void run(const std::string& name, const Case& c, uint64_t seed) {
  Random random(seed);
  const int D = c.head_dim, hkv = c.num_kv_heads, hq = hkv * c.group;
  const int num_seqs = static_cast<int>(c.lengths.size());
  std::vector<int32_t> query_start_loc{0};
  for (int s = 0; s < num_seqs; ++s) {
    query_start_loc.push_back(query_start_loc.back() + (c.queries.empty() ? 1 : c.queries[s]));
  }
  const int num_tokens = query_start_loc.back() + (c.queries.empty() ? 0 : 1);  // one padding row

  // Pages, handed out in random order; everything not written stays 0xff.
  int max_blocks = 1, used_blocks = 0;
  for (int length : c.lengths) {
    const int blocks = tq4::ceil_div(length, c.block_size);
    max_blocks = std::max(max_blocks, blocks + 1);
    used_blocks += blocks;
  }
  const int num_blocks = used_blocks + 2;
  std::vector<int> free_blocks(num_blocks);
  for (int i = 0; i < num_blocks; ++i) free_blocks[i] = i;
  for (int i = num_blocks - 1; i > 0; --i)
    std::swap(free_blocks[i], free_blocks[random.range(0, i)]);
  std::vector<int32_t> block_table(static_cast<size_t>(num_seqs) * max_blocks, 0x7ffffff0);
  for (int s = 0; s < num_seqs; ++s) {
    for (int b = 0; b < tq4::ceil_div(c.lengths[s], c.block_size); ++b) {
      block_table[s * max_blocks + b] = free_blocks.back();
      free_blocks.pop_back();
    }
  }
  const int64_t page = tq4::head_page_bytes(c.block_size, D);
  const int64_t row_bytes = tq4::token_bytes(hkv, D) + (c.layout == Layout::kPaddedRows ? 20 : 0);
  const int64_t cache_bytes =
      static_cast<int64_t>(num_blocks) * std::max<int64_t>(page * hkv, row_bytes * c.block_size);
  std::vector<uint8_t> storage(cache_bytes + 64, 0xff);
  uint8_t* base = storage.data() + (64 - reinterpret_cast<uintptr_t>(storage.data()) % 64) % 64;
  tq4::PageView view;
  switch (c.layout) {
    case Layout::kTokenMajor:
    case Layout::kPaddedRows:
      view = tq4::token_major_view(base, num_blocks, hkv, c.block_size, D, row_bytes * c.block_size,
                                   row_bytes);
      break;
    case Layout::kHeadMajor:
      view = tq4::head_major_view(base, num_blocks, hkv, c.block_size, D, page * hkv, page);
      break;
    case Layout::kHeadMajorApart:
      view = tq4::head_major_view(base, num_blocks, hkv, c.block_size, D, page, page * num_blocks);
      break;
  }

  tq4::AttentionParams p{};
  p.cache = view;
  p.int8 = c.int8;
  p.num_seqs = num_seqs;
  p.num_tokens = num_tokens;
  p.num_q_heads = hq;
  p.max_query_len = c.max_query_len;
  p.short_query_len = c.short_only ? c.max_query_len : 0;
  p.num_sms = c.num_sms;
  p.arch = c.arch;
  p.path = c.bulk ? tq4::Path::kAuto : tq4::Path::kPortable;
  p.max_blocks = max_blocks;
  p.window_left = c.window_left;
  std::vector<float> rotation(static_cast<size_t>(D) * D), rotation_signs(D);
  const bool has_signs = c.rotation == Case::kSigns;
  if (c.rotate) p.q_rotation = p.out_rotation = (has_signs ? rotation_signs : rotation).data();
  p.q_signs = p.out_signs = c.rotate && has_signs;
  const tq4::DecodePlan plan =
      tq4::make_decode_plan(p, true, c.cluster ? h200_cluster_room() : tq4::ClusterRoom{});
  CHECK((plan.cluster > 0) == c.cluster);
  const bool has_residual = tq4::decode_octets(plan.mode) == 1;
  const bool int8x2 = plan.mode == tq4::DecodeMode::kInt8x2Rows8;
  CHECK(!c.int8 || !int8x2);
  CHECK(c.int8 || int8x2 == plan.bulk);

  // Keys and values in rotated space: as the kernels should see them, but exact for kInt8x2Rows8,
  // whose error against exact attention is what it is judged by.
  float centroids[16];
  int8_t codes[16];
  double key_entry[16], value_entry[16];
  for (int i = 0; i < 16; ++i) {
    const float centroid = kCentroids[i] + c.codebook_shift;
    centroids[i] = centroid * c.codebook_scale;
    codes[i] = static_cast<int8_t>(kCodes[i]);
    // fp16 of the centroid in a power-of-two unit: rounding does not depend on the unit.
    const double half = emulation::half_to_float(emulation::float_to_half(centroid)) *
                        static_cast<double>(c.codebook_scale);
    value_entry[i] = int8x2 ? centroids[i] : half;
    key_entry[i] = int8x2   ? centroids[i]
                   : c.int8 ? codes[i] * static_cast<double>(kCodeUnit) * c.codebook_scale
                            : half;
  }
  std::vector<std::vector<double>> keys(num_seqs), values(num_seqs);
  for (int s = 0; s < num_seqs; ++s) {
    keys[s].resize(static_cast<size_t>(c.lengths[s]) * hkv * D);
    values[s].resize(keys[s].size());
    for (int token = 0; token < c.lengths[s]; ++token) {
      uint8_t* block =
          base + block_table[s * max_blocks + token / c.block_size] * view.block_stride;
      const int in_block = token % c.block_size;
      for (int h = 0; h < hkv; ++h) {
        for (int which = 0; which < 2; ++which) {
          const double spread = std::exp2(c.wild_norms * (random.range(-100, 100) / 100.0));
          float norm = static_cast<float>((0.5 + random.range(0, 100) / 100.0) *
                                          (which ? c.norm_scale * spread : 1.0));
          if (c.zero_values) {
            if (which == 1 && token % 3 == 0) norm = 0.f;
            if (which == 0 && token % 3 == 0) norm *= 40.f;
          }
          uint8_t* packed = block + (which ? view.v_codes : view.k_codes) +
                            in_block * view.code_token_stride + h * view.code_head_stride;
          std::memcpy(block + (which ? view.v_norms : view.k_norms) +
                          in_block * view.norm_token_stride + h * view.norm_head_stride,
                      &norm, 4);
          auto& target = which ? values[s] : keys[s];
          for (int d = 0; d < D; ++d) {
            const int index = random.range(0, 15);
            uint8_t& byte = packed[d / 2];
            byte = d % 2 == 0 ? static_cast<uint8_t>(index << 4 | (byte & 15))
                              : static_cast<uint8_t>((byte & 0xf0) | index);
            const double entry = which == 1 ? value_entry[index] : key_entry[index];
            target[(static_cast<size_t>(token) * hkv + h) * D + d] = entry * norm;
          }
        }
      }
    }
  }

  // Queries: 16-bit values, strided.
  const int64_t head_stride = D + 8, token_stride = hq * head_stride + 24;
  std::vector<uint16_t> q(num_tokens * token_stride), out(num_tokens * token_stride, 0x7e7e);
  std::vector<double> q_exact(static_cast<size_t>(num_tokens) * hq * D);
  for (int token = 0; token < num_tokens; ++token) {
    for (int h = 0; h < hq; ++h) {
      for (int d = 0; d < D; ++d) {
        float x =
            static_cast<float>(gaussian(&random)) * (h % 3 == 1 ? 4.f : 1.f) / c.codebook_scale;
        if (c.outliers) x *= (token * hq + h) % 3 == 0 ? 20.f : 1.f;
        if (c.outliers && d == 5) x *= 10.f;
        if (c.nan_row && token == 0 && h == 1 && d == 5) x = NAN;
        uint16_t bits = c.bf16 ? emulation::float_to_bfloat(x) : emulation::float_to_half(x);
        q[token * token_stride + h * head_stride + d] = bits;
        q_exact[(static_cast<size_t>(token) * hq + h) * D + d] =
            c.bf16 ? emulation::from_bits<float>(static_cast<uint32_t>(bits) << 16)
                   : emulation::half_to_float(bits);
      }
    }
  }
  // A rotation: a random orthogonal matrix as a product of reflections, or a Hadamard matrix with
  // random signs, or one with an entry that is not quite right.
  {
    std::vector<double> r(static_cast<size_t>(D) * D, 0.0), v(D);
    for (int i = 0; i < D; ++i) r[i * D + i] = 1;
    for (int round = 0; round < 3; ++round) {
      double norm = 0;
      for (double& x : v) x = gaussian(&random), norm += x * x;
      for (int i = 0; i < D; ++i) {
        double dot = 0;
        for (int j = 0; j < D; ++j) dot += r[i * D + j] * v[j];
        for (int j = 0; j < D; ++j) r[i * D + j] -= 2 * dot * v[j] / norm;
      }
    }
    if (c.rotation != Case::kReflections) {
      std::vector<double> signs(D);
      for (double& sign : signs) sign = random.range(0, 1) == 0 ? -1 : 1;
      for (int i = 0; i < D; ++i) {
        for (int j = 0; j < D; ++j) {
          const bool negative = std::bitset<8>(i & j).count() % 2 != 0;
          r[i * D + j] = (negative ? -1 : 1) * signs[j] / std::sqrt(D);
        }
        rotation_signs[i] = static_cast<float>(signs[i]);
      }
      if (c.rotation == Case::kAlmostHadamard) r[random.range(0, D * D - 1)] *= -3;
    }
    for (size_t i = 0; i < r.size(); ++i) rotation[i] = static_cast<float>(r[i]);
  }
  std::vector<float> sinks(hq);
  for (float& sink : sinks) sink = static_cast<float>(gaussian(&random));
  std::vector<float> lse(static_cast<size_t>(hq) * num_tokens, -77.f);

  p.q = q.data();
  p.out = out.data();
  p.lse = lse.data();
  p.q_token_stride = p.out_token_stride = token_stride;
  p.q_head_stride = p.out_head_stride = head_stride;
  p.dtype = c.bf16 ? tq4::DType::kBFloat16 : tq4::DType::kFloat16;
  p.block_table = block_table.data();
  p.block_table_stride = max_blocks;
  p.seq_lens = c.lengths.data();
  p.query_start_loc = c.queries.empty() ? nullptr : query_start_loc.data();
  p.k_centroids = p.v_centroids = centroids;
  p.k_codes = codes;
  p.k_code_scale = kCodeUnit * c.codebook_scale;
  p.sinks = c.sinks ? sinks.data() : nullptr;
  // Scores of one unit for a row of ones where there are outliers, as in a model.
  p.sm_scale = (c.outliers ? 0.6f : 0.3f) / std::sqrt(static_cast<float>(D));
  p.softcap = c.softcap;
  p.window_right = c.window_right;
  std::vector<uint8_t> workspace(plan.workspace_bytes + 256, 0xff);
  p.workspace =
      workspace.data() + (256 - reinterpret_cast<uintptr_t>(workspace.data()) % 256) % 256;

  const int rows_per_block = 1 << (seed % 5);
  switch (D) {
    case 64:
      run_all<64>(p, plan, rows_per_block);
      break;
    case 96:
      run_all<96>(p, plan, rows_per_block);
      break;
    case 128:
      run_all<128>(p, plan, rows_per_block);
      break;
    default:
      run_all<256>(p, plan, rows_per_block);
      break;
  }

  // The same in double precision.
  const auto multiply = [&](const double* x, bool transposed, double* y) {  // x R^T or x R
    for (int i = 0; i < D; ++i) {
      y[i] = 0;
      for (int j = 0; j < D; ++j) y[i] += x[j] * rotation[transposed ? i * D + j : j * D + i];
    }
  };
  // Codes of queries that come rotated: the recipe's fp32 quotient, rounded half to even.  16-bit
  // values hit exact ties.
  int64_t wrong_codes = 0;
  if (plan.cluster == 0 && tq4::has_int8_query(plan.mode) && !c.rotate && !c.nan_row &&
      !c.short_only) {
    const auto* query_codes =
        reinterpret_cast<const int8_t*>(static_cast<uint8_t*>(p.workspace) + plan.query_codes);
    for (int64_t row = 0; row < int64_t{query_start_loc[num_seqs]} * hq; ++row) {
      float largest = 0;
      for (int d = 0; d < D; ++d) {
        largest = std::max(largest, std::fabs(static_cast<float>(q_exact[row * D + d])));
      }
      const float unit = largest / 127.f;
      for (int d = 0; d < D; ++d) {
        const float quotient = static_cast<float>(q_exact[row * D + d]) / unit;
        wrong_codes += query_codes[row * D + (d ^ 1)] != std::nearbyint(quotient);
      }
    }
  }
  CHECK(wrong_codes == 0);

  double error = 0, size = 0, worst_lse = 0;
  bool others_untouched = true, right_specials = true;
  std::vector<double> row(D), expected(D), rotated(D);
  for (int s = 0; s < num_seqs; ++s) {
    const int length = c.lengths[s], queries = query_start_loc[s + 1] - query_start_loc[s];
    for (int t = 0; t < queries; ++t) {
      const int token = query_start_loc[s] + t;
      const int64_t position = length - queries + t;
      for (int h = 0; h < hq; ++h) {
        if (c.short_only && queries > c.max_query_len) {
          for (int d = 0; d < head_stride; ++d) {
            others_untouched =
                others_untouched && out[token * token_stride + h * head_stride + d] == 0x7e7e;
          }
          others_untouched =
              others_untouched && lse[static_cast<size_t>(h) * num_tokens + token] == -77.f;
          continue;
        }
        const double* query = &q_exact[(static_cast<size_t>(token) * hq + h) * D];
        std::copy(query, query + D, row.begin());
        if (c.rotate) multiply(query, true, row.data());
        if (!has_residual) {
          double largest = 0;
          for (double x : row) largest = std::max(largest, std::fabs(x));
          for (double& x : row) x = std::nearbyint(x * 127 / largest) * largest / 127;
        }
        std::fill(expected.begin(), expected.end(), 0.0);
        std::vector<double> scores;
        std::vector<int> seen;
        double top = c.sinks ? sinks[h] : -1e300;
        for (int key = 0; key < length; ++key) {
          if (c.window_left >= 0 && key < position - c.window_left) continue;
          if (c.window_right >= 0 && key > position + c.window_right) continue;
          const double* k = &keys[s][(static_cast<size_t>(key) * hkv + h / c.group) * D];
          double score = 0;
          for (int d = 0; d < D; ++d) score += row[d] * k[d];
          score *= p.sm_scale;
          if (c.softcap != 0) score = c.softcap * std::tanh(score / c.softcap);
          scores.push_back(score);
          seen.push_back(key);
          top = std::max(top, score);
        }
        double sum = c.sinks ? std::exp(sinks[h] - top) : 0;
        for (size_t i = 0; i < seen.size(); ++i) {
          const double weight = std::exp(scores[i] - top);
          sum += weight;
          const double* v = &values[s][(static_cast<size_t>(seen[i]) * hkv + h / c.group) * D];
          for (int d = 0; d < D; ++d) expected[d] += weight * v[d];
        }
        for (double& x : expected) x = sum > 0 ? x / sum : 0.0;
        if (c.rotate) {
          multiply(expected.data(), false, rotated.data());
          expected = rotated;
        }
        const float got_lse = lse[static_cast<size_t>(h) * num_tokens + token];
        const bool nan_row = (c.nan_row && token == 0 && h == 1) || t >= c.max_query_len;
        if (nan_row) {
          right_specials = right_specials && got_lse != got_lse;
        } else if (sum == 0) {
          right_specials = right_specials && got_lse == -INFINITY;
        } else {
          const double want = top + std::log(sum);
          const double difference = std::fabs(got_lse - want) / std::max(1.0, std::fabs(want));
          worst_lse = difference <= worst_lse ? worst_lse : difference;
        }
        for (int d = 0; d < D; ++d) {
          const uint16_t bits = out[token * token_stride + h * head_stride + d];
          const double got = c.bf16 ? emulation::from_bits<float>(static_cast<uint32_t>(bits) << 16)
                                    : emulation::half_to_float(bits);
          if (nan_row) {
            right_specials = right_specials && got != got;
          } else if (seen.empty()) {
            right_specials = right_specials && got == 0;
          } else {
            error += (got - expected[d]) * (got - expected[d]);
            size += expected[d] * expected[d];
          }
        }
        for (int d = D; d < head_stride; ++d) {
          others_untouched =
              others_untouched && out[token * token_stride + h * head_stride + d] == 0x7e7e;
        }
      }
    }
  }
  for (int64_t i = query_start_loc.back() * token_stride; i < num_tokens * token_stride; ++i) {
    others_untouched = others_untouched && out[i] == 0x7e7e;
  }
  const double relative = size > 0 ? std::sqrt(error / size) : 0;
  const double bound = c.bf16 ? 4e-3 : 8e-4;
  std::printf(
      "%-28s error %.1e  lse %.1e  (%d x %d warps, %d chunks, %d runs x %d, width %d, %s%s)\n",
      name.c_str(), relative, worst_lse, plan.teams, plan.slots, plan.num_chunks,
      plan.copy.num_runs, plan.copy.reps, plan.copy.width,
      plan.boxes  ? "boxes"
      : plan.bulk ? "bulk"
                  : "cp.async",
      int8x2 ? ", int8x2" : "");
  if (!(relative < bound)) {
    std::printf(
        "  D %d, %d x %d heads, max_query_len %d, block %d, layout %d, int8 %d, %d SMs, window %d "
        "%d\n",
        D, hkv, c.group, c.max_query_len, c.block_size, static_cast<int>(c.layout), c.int8,
        c.num_sms, c.window_left, c.window_right);
    for (int s = 0; s < num_seqs; ++s) {
      std::printf("  %d keys, %d queries\n", c.lengths[s],
                  query_start_loc[s + 1] - query_start_loc[s]);
    }
  }
  CHECK(relative < bound);
  // Without the residual a tie may round the other way in double precision.
  CHECK(worst_lse < (tq4::decode_octets(plan.mode) > 1 ? 5e-3 : 1e-3));
  CHECK(others_untouched);
  CHECK(right_specials);
}

// Both halves of the split tables add up to the entries, and code + rest to the centroid.
void check_key_terms() {
  const auto sign = [](int x) { return x < 0 ? -1 : 0; };
  for (int a = -tq4::kLargestSplit; a <= tq4::kLargestSplit; ++a) {
    for (int b = -tq4::kLargestSplit; b <= tq4::kLargestSplit; ++b) {
      const tq4::SplitPair pair = tq4::split_pair(a, b);
      CHECK(pair.low + sign(pair.high) == a && pair.high + sign(pair.low) == b);
    }
  }
  for (int step = -12600; step <= 12600; ++step) {
    const float ratio = 0.01f * static_cast<float>(step);
    const tq4::KeyTerms terms = tq4::key_terms(ratio);
    CHECK(std::abs(terms.code) <= tq4::kLargestSplit);
    CHECK(2 * std::abs(terms.rest) <= tq4::kKeyRestUnits);
    const float sum =
        static_cast<float>(terms.code) + static_cast<float>(terms.rest) / tq4::kKeyRestUnits;
    CHECK(std::fabs(sum - ratio) <= 0.5f / tq4::kKeyRestUnits);
  }
  CHECK(tq4::key_unit(0.f) == 1.f && std::isnan(tq4::key_unit(NAN)));
}

Case random_case(Random* random) {
  const auto pick = [&](auto... choices) {
    const int all[] = {choices...};
    return all[random->range(0, static_cast<int>(sizeof...(choices)) - 1)];
  };
  Case c;
  c.head_dim = pick(64, 96, 128, 128, 256);
  c.num_kv_heads = pick(1, 2, 3, 4, 5, 8, 8, 20);
  c.group = c.num_kv_heads == 20 ? pick(1, 2) : pick(1, 2, 4, 7, 8);
  c.max_query_len = pick(1, 1, 1, 2, 3, 8);
  while (c.group * c.max_query_len > 64) c.max_query_len /= 2;
  c.lengths.clear();
  const int num_seqs = random->range(1, 6);
  const bool listed = c.max_query_len > 1 || random->range(0, 1) == 1;
  for (int s = 0; s < num_seqs; ++s) {
    c.lengths.push_back(pick(0, 1, 15, 16, 17, random->range(1, 90), random->range(1, 250)));
    if (listed) c.queries.push_back(random->range(0, c.max_query_len));
  }
  const Layout layouts[] = {Layout::kTokenMajor, Layout::kPaddedRows, Layout::kHeadMajor,
                            Layout::kHeadMajorApart};
  c.layout = layouts[random->range(0, 3)];
  c.block_size = pick(16, 16, 32, 48, 128);
  c.int8 = pick(1, 1, 1, 0) == 1;
  c.bulk = pick(1, 1, 0) == 1;
  c.arch = c.bulk ? 90 : pick(80, 86, 90, 120);
  c.num_sms = random->range(1, 4);
  c.rotate = pick(1, 0, 0) == 1;
  c.rotation = pick(0, 1) == 1 && c.head_dim != 96 ? Case::kHadamard : Case::kReflections;
  c.bf16 = pick(1, 0) == 1;
  c.window_left = pick(-1, -1, 0, 5, 40);
  c.window_right = pick(0, 0, -1, 3);
  c.softcap = pick(0, 0, 3) * 1.f;
  c.sinks = pick(0, 1) == 1;
  c.wild_norms = pick(0, 0, 10) * 1.f;
  return c;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string only = argc > 1 ? argv[1] : "";
  uint64_t seed = 1;
  const auto test = [&](const char* name, auto&& change) {
    Case c;
    change(c);
    ++seed;
    if (only.empty() || std::string(name).find(only) != std::string::npos) run(name, c, seed);
  };

  check_key_terms();
  test("two heads", [](Case&) {});
  test("one token", [](Case& c) { c.lengths = {1, 16, 17, 0, 15}; });
  test("rotation", [](Case& c) { c.rotate = true, c.bf16 = true; });
  test("rotation 256", [](Case& c) { c.rotate = true, c.head_dim = 256, c.num_kv_heads = 1; });
  test("rotation 96", [](Case& c) { c.rotate = true, c.head_dim = 96, c.lengths = {33}; });
  test("rotation 64", [](Case& c) { c.rotate = true, c.head_dim = 64, c.lengths = {33}; });
  for (int head_dim : {64, 128, 256}) {
    for (const auto rotation : {Case::kHadamard, Case::kAlmostHadamard}) {
      test("hadamard", [&](Case& c) {
        c.rotate = true, c.rotation = rotation, c.head_dim = head_dim, c.lengths = {33, 0, 7, 90};
        c.num_kv_heads = head_dim == 256 ? 1 : 2, c.num_sms = 3, c.sinks = true;
      });
    }
  }
  test("8 heads", [](Case& c) { c.num_kv_heads = 8, c.lengths = {100, 3, 50}, c.num_sms = 3; });
  test("one head, 1 row",
       [](Case& c) { c.num_kv_heads = 1, c.group = 1, c.lengths = {333}, c.num_sms = 1; });
  test("one head, odd rows",
       [](Case& c) { c.num_kv_heads = 1, c.group = 7, c.lengths = {70, 20}; });
  test("3 heads, 5 rows", [](Case& c) { c.num_kv_heads = 3, c.group = 5, c.lengths = {50}; });
  test("18 heads",
       [](Case& c) { c.num_kv_heads = 18, c.group = 1, c.lengths = {20, 30}, c.num_sms = 5; });
  test("20 heads apart", [](Case& c) {
    c.num_kv_heads = 20, c.group = 1, c.lengths = {20, 30}, c.layout = Layout::kHeadMajorApart;
  });
  test("padded rows", [](Case& c) { c.layout = Layout::kPaddedRows, c.lengths = {45}; });
  test("head-major", [](Case& c) { c.layout = Layout::kHeadMajor, c.lengths = {45, 70}; });
  test("head-major, 64", [](Case& c) {
    c.layout = Layout::kHeadMajor, c.block_size = 64, c.lengths = {145, 70}, c.num_kv_heads = 8;
  });
  test("heads apart, 48", [](Case& c) {
    c.layout = Layout::kHeadMajorApart, c.block_size = 48, c.lengths = {145, 70};
  });
  test("token-major, 128", [](Case& c) { c.block_size = 128, c.lengths = {145, 70, 128}; });
  test("portable", [](Case& c) { c.bulk = false, c.lengths = {145, 70, 128}, c.num_kv_heads = 4; });
  test("portable, one head",
       [](Case& c) { c.bulk = false, c.num_kv_heads = 1, c.lengths = {145}; });
  test("portable, padded", [](Case& c) { c.bulk = false, c.layout = Layout::kPaddedRows; });
  test("portable, sm_86", [](Case& c) {
    c.bulk = false, c.arch = 86, c.num_kv_heads = 8, c.lengths = {60, 90},
    c.layout = Layout::kHeadMajor, c.block_size = 32;
  });
  for (int head_dim : {64, 96, 128, 256}) {
    const std::string suffix = " D " + std::to_string(head_dim);
    test(("rows 16" + suffix).c_str(), [&](Case& c) {
      c.head_dim = head_dim, c.group = 4, c.queries = {4, 0, 2}, c.lengths = {60, 20, 1},
      c.max_query_len = 4;
    });
    test(("rows 16 portable" + suffix).c_str(), [&](Case& c) {
      c.head_dim = head_dim, c.group = 16, c.lengths = {60, 20}, c.bulk = false;
    });
    test(("fp16" + suffix).c_str(), [&](Case& c) {
      c.head_dim = head_dim, c.int8 = false, c.lengths = {60, 20}, c.rotate = head_dim == 128;
      c.bulk = false;
    });
    test(("int8x2" + suffix).c_str(), [&](Case& c) {
      c.head_dim = head_dim, c.int8 = false, c.lengths = {60, 20}, c.rotate = head_dim == 128;
    });
    test(("int8x2, rows 16" + suffix).c_str(), [&](Case& c) {
      c.head_dim = head_dim, c.int8 = false, c.group = 4, c.queries = {4, 0, 2};
      c.lengths = {60, 20, 1}, c.max_query_len = 4;
    });
    test(("int8x2, outliers" + suffix).c_str(), [&](Case& c) {
      c.head_dim = head_dim, c.int8 = false, c.outliers = true, c.lengths = {130, 90};
    });
    test(("int8x2, rotated outliers" + suffix).c_str(), [&](Case& c) {
      c.head_dim = head_dim, c.int8 = false, c.outliers = true, c.lengths = {90}, c.rotate = true;
    });
    test(("one row" + suffix).c_str(), [&](Case& c) { c.head_dim = head_dim, c.group = 1; });
  }
  for (int head_dim : {64, 128, 256}) {
    const std::string suffix = " D " + std::to_string(head_dim);
    const auto signs = [&](const char* name, auto&& change) {
      test((name + suffix).c_str(), [&](Case& c) {
        c.head_dim = head_dim, c.rotate = true, c.rotation = Case::kSigns;
        change(c);
      });
    };
    signs("signs", [](Case& c) { c.lengths = {70, 0, 33}; });
    signs("signs, portable, bf16", [](Case& c) { c.bulk = false, c.bf16 = true; });
    signs("signs, rows 16",
          [](Case& c) { c.queries = {4, 0, 2}, c.lengths = {60, 20, 1}, c.max_query_len = 4; });
    signs("signs, exact", [](Case& c) { c.int8 = false, c.outliers = true, c.lengths = {90}; });
    signs("signs, exact, portable", [](Case& c) { c.int8 = false, c.bulk = false; });
    signs("signs, NaN row", [](Case& c) { c.nan_row = true, c.lengths = {60, 30}; });
    signs("signs, beside long sequences",
          [](Case& c) { c.queries = {3, 1, 1}, c.lengths = {30, 60, 100}, c.short_only = true; });
  }
  for (int head_dim : {64, 128}) {
    const std::string suffix = " D " + std::to_string(head_dim);
    const auto cluster = [&](const char* name, auto&& change) {
      test((name + suffix).c_str(), [&](Case& c) {
        c.head_dim = head_dim, c.cluster = true, c.rotate = true, c.num_kv_heads = 4;
        c.rotation = Case::kSigns;
        change(c);
      });
    };
    cluster("cluster", [](Case& c) { c.lengths = {700}, c.num_kv_heads = 8; });
    cluster("cluster, short", [](Case& c) { c.lengths = {1, 0, 17, 255}; });
    cluster("cluster, several queries", [](Case& c) {
      c.queries = {2, 0, 1}, c.lengths = {300, 20, 1}, c.max_query_len = 2, c.sinks = true;
    });
    cluster("cluster, not rotated", [](Case& c) { c.rotate = false, c.lengths = {90, 40}; });
    cluster("cluster, seven query heads",
            [](Case& c) { c.group = 7, c.lengths = {300, 40}, c.bf16 = true; });
    cluster("cluster, padded rows", [](Case& c) {
      c.layout = Layout::kPaddedRows, c.block_size = 32, c.lengths = {300, 40};
    });
    cluster("cluster, one head", [](Case& c) {
      c.num_kv_heads = 1, c.group = 7, c.lengths = {300, 40, 900}, c.bf16 = true;
    });
    cluster("cluster, head-major", [](Case& c) {
      c.layout = Layout::kHeadMajor, c.block_size = 64, c.lengths = {600, 40}, c.window_left = 100;
    });
    cluster("cluster, heads apart", [](Case& c) {
      c.layout = Layout::kHeadMajorApart, c.block_size = 48, c.lengths = {100, 40}, c.softcap = 2.f,
      c.window_right = 1, c.queries = {2, 1}, c.max_query_len = 2;
    });
    cluster("cluster, rings used again", [](Case& c) { c.group = 1, c.lengths = {4000}; });
    cluster("cluster, head-major rings used again", [](Case& c) {
      c.layout = Layout::kHeadMajor, c.num_kv_heads = 1, c.group = 1, c.lengths = {2100};
    });
    cluster("cluster, twelve heads", [](Case& c) { c.num_kv_heads = 12, c.lengths = {90}; });
    cluster("cluster, six heads", [](Case& c) { c.num_kv_heads = 6, c.lengths = {90}; });
    cluster("cluster, wild norms", [](Case& c) {
      c.wild_norms = 20.f, c.norm_scale = 1e-3f, c.lengths = {500}, c.bf16 = true;
    });
    cluster("cluster, zero values",
            [](Case& c) { c.zero_values = true, c.bf16 = true, c.lengths = {290}; });
    cluster("cluster, NaN row", [](Case& c) { c.nan_row = true, c.lengths = {60, 30}; });
    cluster("cluster, outliers", [](Case& c) { c.outliers = true, c.lengths = {290}; });
    cluster("cluster, max_query_len broken",
            [](Case& c) { c.queries = {1, 4, 2}, c.lengths = {30, 20, 9}, c.max_query_len = 2; });
    cluster("cluster, beside long sequences",
            [](Case& c) { c.queries = {3, 1, 1}, c.lengths = {30, 60, 100}, c.short_only = true; });
  }
  test("48 rows", [](Case& c) {
    c.group = 6, c.queries = {8, 3}, c.lengths = {60, 20}, c.max_query_len = 8, c.num_kv_heads = 2;
  });
  test("64 rows, D 256", [](Case& c) {
    c.head_dim = 256, c.group = 4, c.queries = {16, 16}, c.lengths = {40, 20}, c.max_query_len = 16,
    c.num_kv_heads = 1;
  });
  test("queries without keys", [](Case& c) {
    c.queries = {3, 8, 5}, c.lengths = {64, 0, 0}, c.max_query_len = 8, c.group = 7,
    c.num_kv_heads = 4, c.layout = Layout::kHeadMajor, c.block_size = 64, c.sinks = true,
    c.bf16 = true, c.num_sms = 9;
  });
  test("more queries than keys",
       [](Case& c) { c.queries = {5, 3}, c.lengths = {3, 0}, c.max_query_len = 5, c.group = 3; });
  test("not causal", [](Case& c) {
    c.queries = {3}, c.lengths = {50}, c.max_query_len = 3, c.window_right = -1;
  });
  test("window left", [](Case& c) { c.lengths = {150, 20}, c.window_left = 37; });
  test("window left, 3 queries", [](Case& c) {
    c.queries = {3, 1}, c.lengths = {150, 20}, c.max_query_len = 3, c.window_left = 20;
  });
  test("window right", [](Case& c) {
    c.queries = {4}, c.lengths = {60}, c.max_query_len = 4, c.window_left = 9, c.window_right = 1;
  });
  test("soft cap", [](Case& c) { c.softcap = 2.f; });
  test("sinks", [](Case& c) { c.sinks = true, c.lengths = {50, 0, 3}; });
  test("small norms", [](Case& c) { c.norm_scale = 1e-4f, c.wild_norms = 3.f, c.bf16 = true; });
  test("wild norms", [](Case& c) {
    c.wild_norms = 20.f, c.norm_scale = 1e-3f, c.lengths = {200}, c.bf16 = true;
  });
  test("huge norms", [](Case& c) { c.norm_scale = 1e6f, c.wild_norms = 10.f, c.bf16 = true; });
  test("zero values", [](Case& c) { c.zero_values = true, c.bf16 = true, c.lengths = {90}; });
  test("tiny codebook", [](Case& c) { c.codebook_scale = 1e-5f, c.bf16 = true; });
  for (const bool bulk : {false, true}) {
    const std::string suffix = bulk ? " int8x2" : " fp16";
    test(("tiny codebook" + suffix).c_str(),
         [&](Case& c) { c.codebook_scale = 1e-5f, c.bf16 = true, c.int8 = false, c.bulk = bulk; });
    test(("lopsided codebook" + suffix).c_str(),
         [&](Case& c) { c.codebook_shift = 1.5f, c.int8 = false, c.bulk = bulk; });
    test(("negative codebook" + suffix).c_str(),
         [&](Case& c) { c.codebook_shift = -3.f, c.int8 = false, c.bulk = bulk; });
    test(("NaN row" + suffix).c_str(),
         [&](Case& c) { c.nan_row = true, c.lengths = {60, 30}, c.int8 = false, c.bulk = bulk; });
    test(("masks" + suffix).c_str(), [&](Case& c) {
      c.queries = {3, 1}, c.lengths = {150, 20}, c.max_query_len = 3, c.window_left = 20;
      c.softcap = 2.f, c.sinks = true, c.group = 7, c.int8 = false, c.bulk = bulk;
    });
    test(("wild norms" + suffix).c_str(), [&](Case& c) {
      c.wild_norms = 20.f, c.norm_scale = 1e-3f, c.lengths = {200}, c.bf16 = true;
      c.int8 = false, c.bulk = bulk;
    });
  }
  test("fp16, padded rows",
       [](Case& c) { c.layout = Layout::kPaddedRows, c.lengths = {45}, c.int8 = false; });
  test("int8x2, one head, odd rows",
       [](Case& c) { c.num_kv_heads = 1, c.group = 7, c.lengths = {70, 20}, c.int8 = false; });
  test("int8x2, head-major, 64", [](Case& c) {
    c.layout = Layout::kHeadMajor, c.block_size = 64, c.lengths = {145, 70}, c.num_kv_heads = 8;
    c.int8 = false;
  });
  test("int8x2, 64 rows", [](Case& c) {
    c.group = 4, c.queries = {16, 16}, c.lengths = {40, 20}, c.max_query_len = 16,
    c.num_kv_heads = 1, c.int8 = false;
  });
  test("max_query_len broken",
       [](Case& c) { c.queries = {1, 4, 2}, c.lengths = {30, 20, 9}, c.max_query_len = 2; });
  for (const bool bulk : {true, false}) {
    test("beside long sequences", [&](Case& c) {
      c.queries = {1, 40, 2, 0, 3, 1, 4}, c.lengths = {30, 60, 0, 20, 9, 150, 17};
      c.max_query_len = 2, c.short_only = true, c.bulk = bulk, c.sinks = true, c.rotate = bulk;
    });
    test("beside long sequences, rows 16", [&](Case& c) {
      c.queries = {7, 4, 1, 5, 3}, c.lengths = {30, 60, 100, 20, 40}, c.max_query_len = 4;
      c.short_only = true, c.bulk = bulk, c.window_left = 33, c.layout = Layout::kHeadMajor;
    });
  }
  test("beside long sequences, fp16", [](Case& c) {
    c.queries = {3, 1, 1}, c.lengths = {30, 60, 100}, c.short_only = true, c.int8 = false;
  });
  test("beside long sequences, odd heads", [](Case& c) {
    c.queries = {6, 5, 0, 2, 9}, c.lengths = {30, 60, 100, 5, 12}, c.max_query_len = 5;
    c.short_only = true, c.num_kv_heads = 1, c.group = 3;
  });
  test("long sequences only",
       [](Case& c) { c.queries = {3, 2}, c.lengths = {30, 60}, c.short_only = true; });
  test("NaN row", [](Case& c) { c.nan_row = true, c.lengths = {60, 30}; });
  test("many sequences", [](Case& c) {
    c.lengths.clear();
    for (int i = 0; i < 700; ++i) c.lengths.push_back(i % 97 == 0 ? 17 : 0);
    c.num_sms = 3, c.num_kv_heads = 1, c.group = 1, c.head_dim = 64;
  });

  // Cases are numbered for their seeds: new ones at the end.
  for (int head_dim : {64, 96, 128, 256}) {
    test("32 heads", [&](Case& c) {
      c.head_dim = head_dim, c.num_kv_heads = 32, c.group = 1, c.lengths = {20, 70};
      c.num_sms = 5, c.queries = {2, 1}, c.max_query_len = 2;
    });
  }
  test("40 heads, 48", [](Case& c) {
    c.num_kv_heads = 40, c.group = 1, c.lengths = {50, 3, 100}, c.num_sms = 3, c.block_size = 48;
  });
  test("16 heads, exact",
       [](Case& c) { c.num_kv_heads = 16, c.group = 12, c.int8 = false, c.lengths = {50, 3}; });
  for (int head_dim : {64, 96, 128, 256}) {
    const std::string suffix = " D " + std::to_string(head_dim);
    test(("rows in chunks" + suffix).c_str(), [&](Case& c) {
      c.head_dim = head_dim, c.num_kv_heads = 8, c.group = 4, c.queries = {8, 0, 3, 5};
      c.lengths = {60, 20, 3, 40}, c.max_query_len = 8, c.sinks = true;
    });
    test(("int8x2, rows in chunks" + suffix).c_str(), [&](Case& c) {
      c.head_dim = head_dim, c.int8 = false, c.num_kv_heads = 8, c.group = 5;
      c.queries = {4, 1, 5}, c.lengths = {60, 20, 3}, c.max_query_len = 5;
    });
  }

  // test_decode_emulated fuzz [rounds] [seed] [first round]: random cases, on request.
  if (only == "fuzz") {
    const int rounds = argc > 2 ? std::atoi(argv[2]) : 20;
    Random random(argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 1);
    const int first = argc > 4 ? std::atoi(argv[4]) : 0;
    for (int round = 0; round < rounds; ++round) {
      const Case c = random_case(&random);
      const uint64_t case_seed = random.next();
      if (round >= first) run("fuzz " + std::to_string(round), c, case_seed);
    }
  }
  return tq4::test::report("test_decode_emulated");
}
