// The arithmetic of decode: one warp, one KV head, one tile of 16 tokens.
//
//   S  [rows, 16 tokens] = Q K^T           rows are M: Q is the A operand, K the B operand
//   P' = fp16(2^(s - m) n_v)
//   O^T[D, rows] += V^T P'^T               dims are M: V is the A operand, P' the B operand
//
// With the second product transposed, the C fragment of S is the B fragment of P'^T as it stands
// (lane 4 g + t: row g, tokens 2t, 2t + 1 of each n-tile), nothing is shuffled, and 8 rows of O
// cost D / 16 MMAs a tile instead of D / 8.
//
// Rows.  With up to 8 rows, the other 8 rows of A hold what quantisation left over,
//   q_rot / s_q = q8 + r8 / 256,
// so c0,c1 is q8 . k8 and c2,c3 of the same lane is r8 . k8: the error of quantising q is gone for
// one IMAD a score.  In kInt8x2Rows8 keys have a residual as well (decode_codes.h) and scores a
// second accumulator; the product of both residuals comes with it.  In fp16 mode the other rows
// hold q - fp16(q).
//
// Scales.  The K norm multiplies the score's column.  The V norm multiplies P, which is 8 times
// cheaper than multiplying V, but norms have any magnitude and fp16 has not.  So the exponent
// reference m of a row is not the maximum of s but follows s + log2 n_v, the exponent of P': the
// largest P' seen lies between 2^6 and 2^14, O and l are both in units of 2^-m, and m cancels in O
// / l.  Norms below 2^-80 count as 2^-80 for that purpose, which bounds l.  m is an integer:
// rescaling is exact.
#pragma once
#include <cstdint>
#include <type_traits>

#include "../ptx/arith.cuh"
#include "../ptx/mma.cuh"
#include "../ptx/smem.cuh"
#include "common.cuh"
#include "decode_key_codes.cuh"
#include "decode_map.h"
#include "decode_plan.h"
#include "decode_table.cuh"
#include "pinned.cuh"

namespace tq4 {

template <int D_, DecodeMode kMode_, bool kBulk_, bool kWide_>
struct DecodeConfig {
  static constexpr int D = D_;
  static constexpr DecodeMode kMode = kMode_;
  static constexpr bool kBulk = kBulk_;  // bulk copies (sm_90a), else cp.async
  static constexpr bool kWide = kWide_;  // the lane's codes lie aligned for vector loads

  static constexpr bool kInt8 = has_int8_query(kMode);
  static constexpr int kOctets = decode_octets(kMode);  // groups of 8 query rows of a warp
  static constexpr bool kResidual = kOctets == 1;
  static constexpr int kRowTiles = (kOctets + 1) / 2;  // A operands
  static constexpr bool kSplitKeys = kMode == DecodeMode::kInt8x2Rows8;
  static constexpr int kRows = 8 * kOctets;
  using Map = DecodeMap<D>;
  static constexpr int kKeySteps = kInt8 ? D / 32 : D / 16;  // MMAs along the head dimension

  // 16 k-steps of 4 registers would not leave enough for O: read again for each tile.
  static constexpr bool kHoldsQuery = kKeySteps < 16 && kOctets < 4;
  // 32 rows: their A fragments are in shared memory, those of O take the registers.
  static constexpr bool kSharesQuery = kOctets == 4;
  // Words of V that are expanded before the softmax, which then hides that: where there are
  // registers for it, and few warps to hide it otherwise.
  static constexpr int kWordsAhead = kBulk_ && kOctets == 2 ? 1 : 0;

  static constexpr int kWarps = decode_warps(D, kMode, kBulk);  // consumers
  // The copy engine takes one lane to feed, cp.async as many warps as there are registers for.
  static constexpr int kProducers = kBulk ? 1 : kDecodeProducers;
  // Registers move between whole groups of 4 warps.  The CTA cannot hold more than it was launched
  // with: 96 for each of 20 warps, 168 for each of 12.
  static constexpr bool kMovesRegisters = kWarps == 16 || kOctets == 4;
  static constexpr int kConsumerRegisters = kWarps == 16 ? 112 : 232, kProducerRegisters = 32;
  static_assert(kWarps * kConsumerRegisters + 4 * kProducerRegisters <=
                    (kWarps + 4) * (kWarps == 16 ? 96 : 168),
                "or setmaxnreg hangs");
  static constexpr int kThreads = (kWarps + (kMovesRegisters ? 4 : kProducers)) * kWarpSize;
};

// Floor of the exponent reference; finite, so that differences are never NaN.
constexpr float kNoReference = -1e30f;
// Exponent of the largest P' when the reference is set, and the sum of a lane's P' that sets it
// anew.
constexpr float kTargetExponent = 6.f;
constexpr float kLargestWeight = 16384.f;
// Norms below this do not lower the reference any further, and l stays below 2^96.
constexpr float kSmallestNorm = 0x1p-80f;
constexpr float kDenominatorScale = 0x1p-76f;
// Of keys that a row may not see; scales are positive.
constexpr float kHiddenScore = -INFINITY;
// The least scale of a row: times a hidden score it is not NaN.
constexpr float kSmallestScale = 0x1p-120f;

// Units of the residuals of q and of keys.  Sums of products stay below 2^22 (127 * 126 * 256): 256
// of them and a residual's fit in 31 bits, and they are exact as floats.
constexpr int kQueryRestUnits = 256;
constexpr float kQueryRest = 1.f / kQueryRestUnits;
constexpr float kKeyRest = 1.f / kKeyRestUnits;

template <typename Config>
using KeyCodes = std::conditional_t<Config::kSplitKeys, SplitKeyCodes, PlainKeyCodes>;

// What a lane knows of its rows 8 i + g, for one segment: A fragments of q, and by octet the
// log2 units of one unit of norm * score, a score being kScoreUnits (q . k).
template <typename Config>
struct DecodeRows {
  static constexpr int kHeld = Config::kHoldsQuery ? Config::kKeySteps : 1;
  static constexpr int kScoreUnits =
      has_given_codes(Config::kMode) && Config::kResidual ? kQueryRestUnits : 1;
  uint32_t q[kHeld][Config::kRowTiles][4];
  const uint8_t* source;  // of row g in the workspace, where q is not held
  uint32_t fragments;  // shared address of the lane's, where they are there: 512 bytes to the next
  float scale[Config::kOctets];
};

// DecodeRows::scale of a row: log2 units of one unit of norm * (q . key code), units of the key
// codes. NaN stays.
template <typename Config>
__device__ __forceinline__ float score_scale(float row_scale, float key_unit) {
  const float scale = row_scale * (key_unit / DecodeRows<Config>::kScoreUnits);
  return scale < kSmallestScale ? kSmallestScale : scale;
}

// Steps k and k + 1 in fp16 mode, else step k, from the workspace rows behind A rows g and g + 8.
template <typename Config>
__device__ __forceinline__ void load_query(const uint8_t* first, const uint8_t* second, int k,
                                           uint32_t (&a)[Config::kInt8 ? 1 : 2][4]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint8_t* source = i == 0 ? first : second;
    if constexpr (Config::kInt8) {
      const uint2 w = *reinterpret_cast<const uint2*>(source + Config::Map::key_dim(t, k));
      a[0][i] = w.x, a[0][2 + i] = w.y;
    } else {
      const uint4 w = *reinterpret_cast<const uint4*>(source + 2 * Config::Map::key_dim(t, k / 2));
      a[0][i] = w.x, a[0][2 + i] = w.y;
      a[1][i] = w.z, a[1][2 + i] = w.w;
    }
  }
}

// The running result.  o[m][i] is the C fragment of m-tile m, octet i: dims value_dim(g, m) and + 1
// (c0,c1 and c2,c3) of rows 8 i + 2 t and + 1.  Row state belongs to row 8 i + g, shared by the
// quad.
template <typename Config>
struct DecodeState {
  float o[Config::Map::kValueTiles][Config::kOctets][4];
  float m[Config::kOctets];
  float l[Config::kOctets];  // this lane's part

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < Config::kOctets; ++i) {
      m[i] = kNoReference;
      l[i] = 0.f;
#pragma unroll
      for (int tile = 0; tile < Config::Map::kValueTiles; ++tile) {
        o[tile][i][0] = o[tile][i][1] = o[tile][i][2] = o[tile][i][3] = 0.f;
      }
    }
  }

  // O *= factor of its row; the factors arrive by row, one a quad.
  __device__ __forceinline__ void scale_output(const float (&factor)[Config::kOctets]) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < Config::kOctets; ++i) {
      const float even = __shfl_sync(kFullWarp, factor[i], 8 * t);
      const float odd = __shfl_sync(kFullWarp, factor[i], 8 * t + 4);
#pragma unroll
      for (int tile = 0; tile < Config::Map::kValueTiles; ++tile) {
        o[tile][i][0] *= even;
        o[tile][i][1] *= odd;
        o[tile][i][2] *= even;
        o[tile][i][3] *= odd;
      }
    }
  }
};

// Byte offsets of a lane's data inside a stage, for n-tile 0; n-tile 1 lies plan.code_step and
// plan.norm_step further.
struct LaneOffsets {
  uint32_t key;       // token of column g
  uint32_t value[2];  // tokens of columns 2 t and 2 t + 1
  uint32_t norm[2];   // K norms of the same tokens
};

template <typename Config>
__device__ __forceinline__ LaneOffsets make_lane_offsets(const StageView& stage,
                                                         const TokenMap& map, int head) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  LaneOffsets at;
  const int codes = head * stage.code_head_stride, norms = head * stage.norm_head_stride;
  at.key = pinned(stage.k_codes + codes + map.token(0, g) * stage.code_token_stride +
                  Config::Map::key_byte(t, 0));
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    const int token = map.token(0, 2 * t + b);
    at.value[b] = pinned(stage.v_codes + codes + token * stage.code_token_stride +
                         Config::Map::value_byte(g, 0));
    at.norm[b] = pinned(stage.k_norms + norms + token * stage.norm_token_stride);
  }
  return at;
}

// The lane's words of one token's K codes.  `address` is that of word 0.
template <int D, bool kWide>
__device__ __forceinline__ void load_key_words(uint32_t address,
                                               uint32_t (&w)[DecodeMap<D>::kKeyWords]) {
  const int t = threadIdx.x % 4;
  if constexpr (!kWide) {
#pragma unroll
    for (int j = 0; j < DecodeMap<D>::kKeyWords; ++j) {
      // Relative to word 0; for D = 96 that depends on t.
      w[j] =
          ptx::ld_shared_u32(address + DecodeMap<D>::key_byte(t, j) - DecodeMap<D>::key_byte(t, 0));
    }
  } else if constexpr (D >= 128) {
#pragma unroll
    for (int j = 0; j < DecodeMap<D>::kKeyWords; j += 4) {
      const uint4 v = ptx::ld_shared_v4(address + 16 * j);
      w[j] = v.x, w[j + 1] = v.y, w[j + 2] = v.z, w[j + 3] = v.w;
    }
  } else {
    const uint2 v = ptx::ld_shared_v2(address);
    w[0] = v.x, w[1] = v.y;
    if constexpr (D == 96) w[2] = ptx::ld_shared_u32(address + 32 - 4 * t);
  }
}

// The lane's bytes of one token's V codes, in words of 4.
template <int D, bool kWide>
__device__ __forceinline__ void load_value_words(uint32_t address,
                                                 uint32_t (&w)[DecodeMap<D>::kValueWords]) {
  if constexpr (D >= 128) {
#pragma unroll
    for (int j = 0; j < DecodeMap<D>::kValueWords; j += 2) {
      const uint32_t at = address + 32 * j;  // bytes 8 j / 2 of a lane lie 64 bytes further
      if constexpr (kWide) {
        const uint2 v = ptx::ld_shared_v2(at);
        w[j] = v.x, w[j + 1] = v.y;
      } else {
        w[j] = ptx::ld_shared_u32(at);
        w[j + 1] = ptx::ld_shared_u32(at + 4);
      }
    }
  } else {
    w[0] = ptx::ld_shared_u32(address);
    if constexpr (D == 96) {
      const int g = threadIdx.x % kWarpSize / 4;
      w[1] = ptx::ld_shared_u16(address + 32 - 2 * g);
    }
  }
}

// [1/4] Scores of the tile without any scale: s[i][2 j + b] is row 8 i + g, column 2 t + b of
// n-tile j, in units of DecodeRows::kScoreUnits.
template <typename Config>
__device__ __forceinline__ void compute_scores(
    uint32_t key_address, int code_step, uint32_t lane_table, const KeyCodes<Config>& key_codes,
    const DecodeRows<Config>& rows, int64_t residual_offset, float (&s)[Config::kOctets][4]) {
  constexpr int kWords = Config::Map::kKeyWords;
  // One n-tile after the other: the codes of both would crowd registers.
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    uint32_t words[kWords];
    if constexpr (Config::kHoldsQuery) {
      load_key_words<Config::D, Config::kWide>(key_address + j * code_step, words);
    }
    if constexpr (Config::kSplitKeys) {
      int32_t acc[1][4] = {}, rest[1][4] = {};
#pragma unroll
      for (int k = 0; k < kWords; ++k) key_codes.multiply(rows.q[k], words[k], acc, rest);
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        // (q8 + r8 / 256) . (code + rest / 128)
        const auto rounded = [](int32_t sum) { return static_cast<float>(sum); };
        const float codes = fmaf(rounded(acc[0][2 + b]), kQueryRest, rounded(acc[0][b]));
        s[0][2 * j + b] = fmaf(rounded(rest[0][2 + b]), kQueryRest * kKeyRest,
                               fmaf(rounded(rest[0][b]), kKeyRest, codes));
      }
    } else if constexpr (Config::kSharesQuery) {
      int32_t acc[Config::kRowTiles][4] = {};
      load_key_words<Config::D, Config::kWide>(key_address + j * code_step, words);
#pragma unroll
      for (int k = 0; k < kWords; ++k) {
        uint32_t q[Config::kRowTiles][4];
#pragma unroll
        for (int tile = 0; tile < Config::kRowTiles; ++tile) {
          const uint4 w = ptx::ld_shared_v4(rows.fragments + 512 * (k * Config::kRowTiles + tile));
          q[tile][0] = w.x, q[tile][1] = w.y, q[tile][2] = w.z, q[tile][3] = w.w;
        }
        key_codes.multiply(q, words[k], acc);
      }
#pragma unroll
      for (int i = 0; i < Config::kOctets; ++i) {
        s[i][2 * j] = static_cast<float>(acc[i / 2][i % 2 * 2]);
        s[i][2 * j + 1] = static_cast<float>(acc[i / 2][i % 2 * 2 + 1]);
      }
    } else if constexpr (Config::kInt8) {
      int32_t acc[Config::kRowTiles][4] = {};
#pragma unroll
      for (int k = 0; k < kWords; ++k) key_codes.multiply(rows.q[k], words[k], acc);
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        if constexpr (Config::kResidual) {
          // As an integer: one conversion, and the same rounding.
          s[0][2 * j + b] = static_cast<float>(acc[0][b] * kQueryRestUnits + acc[0][2 + b]);
        } else {
#pragma unroll
          for (int i = 0; i < Config::kOctets; ++i) {
            s[i][2 * j + b] = static_cast<float>(acc[i / 2][i % 2 * 2 + b]);
          }
        }
      }
    } else {
      static_assert(Config::kInt8 || Config::kResidual, "fp16 mode has one kernel");
      const uint32_t key_table = lane_table + kPairTableBytes;
      float acc[4] = {};
      const auto multiply = [&](uint32_t word, const uint32_t (&q0)[4], const uint32_t (&q1)[4]) {
        const uint32_t b0 = lookup_pair<0>(key_table, word);
        const uint32_t b1 = lookup_pair<1>(key_table, word);
        const uint32_t b2 = lookup_pair<2>(key_table, word);
        const uint32_t b3 = lookup_pair<3>(key_table, word);
        ptx::mma_m16n8k16_f16f16f32(acc, q0, b0, b1);
        ptx::mma_m16n8k16_f16f16f32(acc, q1, b2, b3);
      };
      if constexpr (Config::kHoldsQuery) {
#pragma unroll
        for (int k = 0; k < kWords; ++k) multiply(words[k], rows.q[2 * k][0], rows.q[2 * k + 1][0]);
      } else {
        // A loop: unrolled, it would be filled with loads ahead of their use until registers run
        // out.
#pragma unroll 1
        for (int k = 0; k < kWords; ++k) {
          uint32_t q[2][4];
          load_query<Config>(rows.source, rows.source + residual_offset, 2 * k, q);
          const int byte = Config::Map::key_byte(0, k);
          multiply(ptx::ld_shared_u32(key_address + j * code_step + byte), q[0], q[1]);
        }
      }
#pragma unroll
      for (int b = 0; b < 2; ++b) s[0][2 * j + b] = acc[b] + acc[2 + b];
    }
  }
}

// P and P' of one row against reference m.  Returns the sum of P; `weight` holds P'.  With kSelect
// a hidden key weighs nothing whatever its norm: past the end that is garbage, which may be NaN.
template <bool kSelect>
__device__ __forceinline__ float exponentiate(const float (&s)[4], float scale, float m,
                                              const float (&value_norm)[4], float (&weight)[4]) {
  float p[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    p[c] = ptx::exp2_approx(fmaf(s[c], scale, -m));
    weight[c] = kSelect && s[c] == kHiddenScore ? 0.f : p[c] * value_norm[c];
  }
  return (p[0] + p[1]) + (p[2] + p[3]);
}

// Moves the reference of rows whose weights have outgrown fp16, and rescales l and O.  Rare: on the
// first tile and where exponents grow by 8 and more.
template <typename Config>
__device__ __forceinline__ void raise_reference(const float (&s)[Config::kOctets][4],
                                                const float (&scale)[Config::kOctets],
                                                const float (&value_norm)[4],
                                                DecodeState<Config>& state) {
  float factor[Config::kOctets];
#pragma unroll
  for (int i = 0; i < Config::kOctets; ++i) {
    float top = kNoReference;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      top = fmaxf(top, fmaf(s[i][c], scale[i], __log2f(fmaxf(value_norm[c], kSmallestNorm))));
    }
    top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 1));
    top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 2));
    const float m = fmaxf(state.m[i], ceilf(top) - kTargetExponent);
    factor[i] = ptx::exp2_approx(state.m[i] - m);
    state.m[i] = m;
    state.l[i] *= factor[i];
  }
  state.scale_output(factor);
}

// [2/4] and [3/4] Softmax: s -> P' packed as B fragments, l and, where needed, m and O.  Where
// `masked` (the warp alike), hidden() says which keys the lane's rows may not see: bit 4 i + c.
template <typename Config, typename Hidden>
__device__ __forceinline__ void update_softmax(
    float (&s)[Config::kOctets][4], const float (&key_norm)[4], const float (&value_norm)[4],
    const DecodeRows<Config>& rows, float softcap, bool masked, Hidden&& hidden,
    DecodeState<Config>& state, uint32_t (&weights)[Config::kOctets][2]) {
  float scale[Config::kOctets];
#pragma unroll
  for (int i = 0; i < Config::kOctets; ++i) {
    scale[i] = rows.scale[i];
#pragma unroll
    for (int c = 0; c < 4; ++c) s[i][c] *= key_norm[c];
  }
  if (softcap != 0.f) {
#pragma unroll
    for (int i = 0; i < Config::kOctets; ++i) {
      scale[i] = softcap * 1.4426950408889634f;
#pragma unroll
      for (int c = 0; c < 4; ++c) s[i][c] = ptx::tanh_accurate(s[i][c] * rows.scale[i]);
    }
  }

  if (masked) {
    const uint32_t bits = hidden();
#pragma unroll
    for (int i = 0; i < Config::kOctets; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (bits >> (4 * i + c) & 1) s[i][c] = kHiddenScore;
      }
    }
  }

  float sum[Config::kOctets];
  const auto pack = [&](int i, const float (&weight)[4]) {
    weights[i][0] = ptx::pack_f16x2(weight[0], weight[1]);
    weights[i][1] = ptx::pack_f16x2(weight[2], weight[3]);
  };
  bool fits = true;
#pragma unroll
  for (int i = 0; i < Config::kOctets; ++i) {
    float weight[4];
    sum[i] = exponentiate<false>(s[i], scale[i], state.m[i], value_norm, weight);
    const float total = (weight[0] + weight[1]) + (weight[2] + weight[3]);
    pack(i, weight);
    // Sums, not maxima: additions run on a pipe with room to spare.  Written so that NaN fails: the
    // very first tile may meet inf * 0, and a hidden key a norm that is none.
    fits = fits && fmaf(sum[i], kDenominatorScale, total) <= kLargestWeight;
  }
  if (!__all_sync(kFullWarp, fits)) {
    raise_reference<Config>(s, scale, value_norm, state);
#pragma unroll
    for (int i = 0; i < Config::kOctets; ++i) {
      float weight[4];
      sum[i] = exponentiate<true>(s[i], scale[i], state.m[i], value_norm, weight);
      pack(i, weight);
    }
  }
#pragma unroll
  for (int i = 0; i < Config::kOctets; ++i) state.l[i] += sum[i];
}

// The A fragments of V of words [first, last), one m-tile after the other: use(tile, a).  a0,a1:
// even and odd dimension of tokens 2 t, 2 t + 1; a2,a3: of 8 + 2 t, ...
template <typename Config, typename Use>
__device__ __forceinline__ void expand_values(uint32_t lane_table,
                                              const uint32_t (&words)[4][Config::Map::kValueWords],
                                              int first_word, int last_word, Use&& use) {
  const auto expand = [&](auto byte, int tile, const TokenPairs& first, const TokenPairs& second) {
    constexpr int kByte = decltype(byte)::value;
    const uint32_t a[4] = {
        lookup_pair<kByte>(lane_table, first.even), lookup_pair<kByte>(lane_table, first.odd),
        lookup_pair<kByte>(lane_table, second.even), lookup_pair<kByte>(lane_table, second.odd)};
    use(tile, a);
  };
#pragma unroll
  for (int w = first_word; w < last_word; ++w) {
    const TokenPairs first = pair_tokens(words[0][w], words[1][w]);
    const TokenPairs second = pair_tokens(words[2][w], words[3][w]);
    expand(std::integral_constant<int, 0>{}, 4 * w, first, second);
    expand(std::integral_constant<int, 1>{}, 4 * w + 1, first, second);
    if (4 * w + 2 < Config::Map::kValueTiles) {  // D = 96 ends on half a word
      expand(std::integral_constant<int, 2>{}, 4 * w + 2, first, second);
      expand(std::integral_constant<int, 3>{}, 4 * w + 3, first, second);
    }
  }
}

// [4/4] O^T += V^T P'^T, of one m-tile.
template <typename Config>
__device__ __forceinline__ void accumulate_tile(const uint32_t (&a)[4], int tile,
                                                const uint32_t (&weights)[Config::kOctets][2],
                                                DecodeState<Config>& state) {
#pragma unroll
  for (int i = 0; i < Config::kOctets; ++i) {
    ptx::mma_m16n8k16_f16f16f32(state.o[tile][i], a, weights[i][0], weights[i][1]);
  }
}

}  // namespace tq4
