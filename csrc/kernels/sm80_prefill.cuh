// TQ4 prefill by mma.sync: sm_80 and up.
//
//   q_rot = q R^T;  q8 = round(q_rot / s_q)            once a CTA
//   S = s_q s_c sm_scale n_k (q8 . k8)                 INT8 tensor cores, K unpacked once a CTA
//   O = softmax(S) V',  V' = fp16(c) n_v               FP16 tensor cores
//   out = (O / l) R
//
// A CTA owns kRows packed rows (row = token * G + head of the group) of one sequence and KV head,
// and walks the visible keys in tiles.  Roles: 8 warps, all alike; warp w owns rows
// [16 kMTiles w, 16 kMTiles (w + 1)) for both products, so S and P never leave its registers.
//
//   global pages --cp.async--> raw ring (3 stages of codes and norms, one slice a thread)
//        raw slice --PRMT--> K tile int8 and V tile fp16 (2 buffers), by the thread that copied it
//            K tile --LDS.128--> B fragments;  V tile --LDSM.T--> B fragments
//
// One barrier a tile: it orders the unpacking of tile i + 1 (during the products of tile i) before
// the products of tile i + 1, and the products of tile i before the unpacking of tile i + 2 into
// the same buffer.  Raw slices need no barrier: each thread unpacks what it copied itself; the V
// norm comes from another lane of the same warp.
//
// Of the two warps on each scheduler (w and w + 4) one unpacks before its products, the other
// after: the tensor core always has a warp to serve.
//
// Shared memory: raw ring | 2 x {K tile, V tile, column scales} | tables.  A panel of the rotation
// matrix takes the tiles' place before the first and after the last tile.
#pragma once
#include <cmath>
#include <cstdint>

#include "../device/codebook.cuh"
#include "../device/prefill_schedule.cuh"
#include "../device/rotate.cuh"
#include "../device/swizzle.cuh"
#include "../device/unpack4.cuh"
#include "../params.h"
#include "../ptx/arith.cuh"
#include "../ptx/mma.cuh"
#include "../ptx/smem.cuh"

namespace tq4::sm80 {

template <int D_, bool kInt8_>
struct PrefillConfig {
  static constexpr int D = D_;
  static constexpr bool kInt8 = kInt8_;
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  // 32-row warps halve the shared-memory reads a row; beyond D = 128, and with fp16 q fragments,
  // the accumulators of 32 rows do not fit in registers.
  static constexpr int kMTiles = (D <= 128 && kInt8) ? 2 : 1;
  static constexpr int kWarpRows = 16 * kMTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kTile = D <= 128 ? 64 : 32;  // tokens unpacked at once
  static constexpr int kInner = 32;                 // tokens a softmax step; 64 spills
  static constexpr int kStages = 3;

  static constexpr int kThreadsPerToken = kThreads / kTile;
  static constexpr int kCodeBytes = D / 2;
  static constexpr int kSlice = kCodeBytes / kThreadsPerToken;  // bytes copied by a thread
  static constexpr int kSliceWords = kSlice / 4;
  static constexpr int kKeyChunksPerSlice = kInt8 ? kSliceWords / 2 : kSliceWords;
  static constexpr int kKeySteps = kInt8 ? D / 32 : D / 16;  // MMAs along the head dimension

  using Key = KeyTile<D, kInt8 ? 1 : 2>;
  using Value = HalfTile<D>;

  // Byte offsets in shared memory.
  static constexpr int kRawBytes = kTile * (2 * kCodeBytes + 8);
  static constexpr int kKeyBytes = kTile * Key::kRowBytes;
  static constexpr int kValueBytes = kTile * Value::kRowBytes;
  static constexpr int kAlign = 512;  // longest row: the swizzles XOR addresses within a row
  static constexpr int kBufferBytes = round_up(kKeyBytes + kValueBytes + kTile * 8, kAlign);
  static constexpr int kTables = 0;                                    // CodebookTables
  static constexpr int kInfo = 96;                                     // TileInfo
  static constexpr int kPageInfo = 128;                                // PageInfo
  static constexpr int kWarpKeys = 160;                                // WarpKeys [kWarps]
  static constexpr int kRowTokens = 288;                               // int [kRows]
  static constexpr int kRowScales = kRowTokens + 4 * kRows;            // float [kRows]
  static constexpr int kSlots = round_up(kRowScales + 4 * kRows, 16);  // ThreadSlot [kThreads]
  static constexpr int kPages = kSlots + 16 * kThreads;                // int [kPageSlots][kTile]
  static constexpr int kPageSlots = kStages + 1;
  static constexpr int kRaw = kPages + 4 * kPageSlots * kTile;
  static constexpr int kBuffers = round_up(kRaw + kStages * kRawBytes, kAlign);
  static constexpr int kOverlay =
      2 * kBufferBytes > RotationPanel<D>::kBytes ? 2 * kBufferBytes : RotationPanel<D>::kBytes;
  static constexpr int kSmemBytes = kBuffers + kOverlay;
  static_assert(kSmemBytes <= 99 * 1024, "sm_86 and sm_89 offer 99 KB a CTA");
  static_assert(kKeyBytes % kAlign == 0, "the V tile starts aligned");
};

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
// Finite floor of the running maximum: (-inf) - (-inf) never occurs.
constexpr float kMinusHuge = -1e30f;
// The maximum is only moved when it grows by more than this (log2): P <= 2^8 in fp16 is as exact
// as P <= 1, and most rescales of O disappear.
constexpr float kLazyRescale = 8.f;
// An int32 accumulator that starts at the bits of 1.5 * 2^23 reads as the float 12582912 + score:
// no conversion.  |score| <= 127 * 127 * 256 < 2^22 keeps it exact.
constexpr int32_t kMagicBits = 0x4B400000;
constexpr float kMagic = 12582912.f;

// What the page loader needs, kept in shared memory: loop invariants that would otherwise push the
// accumulators out of their registers.
struct alignas(16) PageInfo {
  const int32_t* table;  // the sequence's row of block_table
  int key_begin;         // first key of tile 0
  int key_end;           // keys from here on are not loaded
};
static_assert(sizeof(PageInfo) == 16, "read as one vector");

// Where one thread copies and unpacks its slice of every tile: byte offsets that never change, made
// once and read back as one vector.
struct alignas(16) ThreadSlot {
  uint32_t source;  // of the K codes in a block, KV head and (where fixed) token included
  uint32_t norm;    // of the norm in a block; slice 0 copies K's, slice 1 V's
  uint32_t raw;     // of the K codes in a stage
  uint32_t tiles;   // low half: chunk 0 in the K tile; high half: chunk 0 in the V tile
};

// [1/7] pages -> raw ring.
//
// Page ids travel in the same groups, kStages tiles ahead of the codes they lead to, so that no
// thread ever waits for (or holds in a register) an entry of the block table.
template <typename Config>
struct PageLoader {
  uint32_t smem;
  int copy_bytes;   // widest aligned copy: 16, 8 or 4
  int block_shift;  // log2(block_size), or -1

  __device__ __forceinline__ int block_of(int token, const PageView& view) const {
    return block_shift >= 0 ? token >> block_shift : token / view.block_size;
  }

  // Tiles start at multiples of kTile: where block_size divides it, a thread always copies the same
  // token of a block.
  __device__ __forceinline__ bool fixed_token() const {
    return block_shift >= 0 && 1 << block_shift <= Config::kTile;
  }

  __device__ __forceinline__ void write_slot(const PageView& view, int kv_head) const {
    const int row = threadIdx.x / Config::kThreadsPerToken;
    const int slice = threadIdx.x % Config::kThreadsPerToken;
    const int in_block = fixed_token() ? row & ((1 << block_shift) - 1) : 0;
    // A slice lies inside one quarter of the head dimension; the V tile takes the slices of a token
    // as neighbouring chunks, which keeps the stores free of conflicts (undone by value_dim).
    constexpr int kSlicesPerQuarter = Config::kThreadsPerToken / 4;
    const int chunk = slice % kSlicesPerQuarter * Config::kKeyChunksPerSlice;
    ThreadSlot slot;
    slot.source = view.k_codes + kv_head * view.code_head_stride +
                  in_block * view.code_token_stride + slice * Config::kSlice;
    slot.norm = (slice == 0 ? view.k_norms : view.v_norms) + kv_head * view.norm_head_stride +
                in_block * view.norm_token_stride;
    slot.raw = row * Config::kCodeBytes + slice * Config::kSlice;
    slot.tiles = Config::Key::offset(row, slice / kSlicesPerQuarter, chunk) |
                 Config::Value::offset(row, slice) << 16;
    ptx::st_shared_v4(smem + Config::kSlots + 16 * threadIdx.x, slot.source, slot.norm, slot.raw,
                      slot.tiles);
  }

  __device__ __forceinline__ uint32_t page_slot(int tile, unsigned row) const {
    return smem + Config::kPages + 4 * (tile % Config::kPageSlots * Config::kTile + row);
  }

  // Entries past the last page of a sequence are garbage: never read, let alone followed.
  __device__ __forceinline__ void copy_page_id(int tile, unsigned row, const PageView& view) const {
    const uint4 info = ptx::ld_shared_v4(smem + Config::kPageInfo);
    const int token = info.z + tile * Config::kTile + row;
    if (token >= static_cast<int>(info.w)) return;
    const auto* table =
        reinterpret_cast<const int32_t*>(static_cast<uint64_t>(info.y) << 32 | info.x);
    ptx::cp_async<4>(page_slot(tile, row), table + block_of(token, view));
  }

  template <int kBytes>
  __device__ __forceinline__ void copy_slice(uint32_t dst, const uint8_t* src) const {
#pragma unroll
    for (int i = 0; i < Config::kSlice; i += kBytes) ptx::cp_async<kBytes>(dst + i, src + i);
  }

  __device__ __forceinline__ void copy_codes(uint32_t dst, const uint8_t* src) const {
    if constexpr (Config::kSlice % 16 == 0) {
      if (copy_bytes == 16) return copy_slice<16>(dst, src);
    }
    if constexpr (Config::kSlice % 8 == 0) {
      if (copy_bytes >= 8) return copy_slice<8>(dst, src);
    }
    copy_slice<4>(dst, src);
  }

  __device__ __forceinline__ void copy(int tile, const PageView& view) const {
    const unsigned thread = ptx::thread_idx_volatile();
    const unsigned row = thread / Config::kThreadsPerToken;
    const unsigned slice = thread % Config::kThreadsPerToken;
    const uint2 range = ptx::ld_shared_v2(smem + Config::kPageInfo + offsetof(PageInfo, key_begin));
    const int token = range.x + tile * Config::kTile + row;
    if (slice == 2) copy_page_id(tile + Config::kStages, row, view);
    if (token >= static_cast<int>(range.y)) return;
    uint4 slot = ptx::ld_shared_v4(smem + Config::kSlots + 16 * thread);  // ThreadSlot
    if (!fixed_token()) {
      const int in_block = token - block_of(token, view) * view.block_size;
      slot.x += in_block * view.code_token_stride;
      slot.y += in_block * view.norm_token_stride;
    }
    const int page = ptx::ld_shared_u32(page_slot(tile, row));
    const uint8_t* block = view.base + page * view.block_stride;
    const uint32_t stage = smem + Config::kRaw + tile % Config::kStages * Config::kRawBytes;
    const uint8_t* codes = block + slot.x;
    copy_codes(stage + slot.z, codes);
    copy_codes(stage + slot.z + Config::kTile * Config::kCodeBytes,
               codes + (view.v_codes - view.k_codes));
    if (slice < 2) {
      ptx::cp_async<4>(
          stage + Config::kTile * 2 * Config::kCodeBytes + 4 * (slice * Config::kTile + row),
          block + slot.y);
    }
  }
};

// [2/7] raw slice -> K tile, V tile and column scales of one buffer.
//
// Rejected: unpacking in small pieces between the HMMAs of P V, to use their free issue slots. Both
// warps of a scheduler then unpack at the same time and the tensor core waits: 315 instead of 331
// TFLOPS (docs/tuning.md).
template <typename Config>
__device__ __forceinline__ void unpack_tile(uint32_t smem, int tile) {
  const unsigned thread = ptx::thread_idx_volatile();
  const int row = thread / Config::kThreadsPerToken;
  const uint2 range = ptx::ld_shared_v2(smem + Config::kPageInfo + offsetof(PageInfo, key_begin));
  const bool valid =
      static_cast<int>(range.x) + tile * Config::kTile + row < static_cast<int>(range.y);
  const uint32_t stage = smem + Config::kRaw + tile % Config::kStages * Config::kRawBytes;
  const uint32_t buffer = smem + Config::kBuffers + tile % 2 * Config::kBufferBytes;
  const uint2 slot = ptx::ld_shared_v2(smem + Config::kSlots + 16 * thread + 8);  // raw, tiles
  const uint32_t table = smem + Config::kTables;

  const auto read_words = [](uint32_t address, uint32_t (&w)[Config::kSliceWords]) {
    if constexpr (Config::kSliceWords == 4) {
      const uint4 v = ptx::ld_shared_v4(address);
      w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
    } else {
#pragma unroll
      for (int i = 0; i < Config::kSliceWords; ++i) w[i] = ptx::ld_shared_u32(address + 4 * i);
    }
  };
  const auto read_table = [&](int offset) {
    const uint4 w = ptx::ld_shared_v4(table + offset);
    return ByteTable{w.x, w.y, w.z, w.w};
  };

  // Keys, in B-fragment order.  Chunk c of a lane's quarter is chunk 0's address ^ (c << 4).
  const uint32_t key = buffer + (slot.y & 0xffffu);
  uint32_t words[Config::kSliceWords];
  read_words(stage + slot.x, words);
  if constexpr (Config::kInt8) {
    const ByteTable k8 = read_table(offsetof(CodebookTables, k_codes));
#pragma unroll
    for (int i = 0; i < Config::kSliceWords; i += 2) {
      const uint32_t dst = key ^ (i / 2 << 4);
      uint32_t x0, x1;
      unpack_int8(words[i], k8, x0, x1);
      if (i + 1 < Config::kSliceWords) {
        uint32_t x2, x3;
        unpack_int8(words[i + 1 < Config::kSliceWords ? i + 1 : i], k8, x2, x3);
        ptx::st_shared_v4(dst, x0, x1, x2, x3);
      } else {
        ptx::st_shared_v2(dst, x0, x1);
      }
    }
  } else {
    const ByteTable high = read_table(offsetof(CodebookTables, k_high));
    const ByteTable low = read_table(offsetof(CodebookTables, k_low));
#pragma unroll
    for (int i = 0; i < Config::kSliceWords; ++i) {
      uint32_t x[4];
      unpack_fp16(words[i], high, low, x);
      ptx::st_shared_v4(key ^ (i << 4), x[0], x[1], x[2], x[3]);
    }
  }

  // Values.  The norm of a token that is not there is garbage (NaN as likely as not): select.
  const uint32_t norms = stage + Config::kTile * 2 * Config::kCodeBytes + 4 * row;
  const float v_unit = ptx::ld_shared_f32(table + offsetof(CodebookTables, v_unit));
  const float v_norm = valid ? ptx::ld_shared_f32(norms + 4 * Config::kTile) * v_unit : 0.f;
  const uint32_t v_norm2 = ptx::pack_f16x2(v_norm, v_norm);
  const uint32_t value = buffer + Config::kKeyBytes + (slot.y >> 16);
  read_words(stage + slot.x + Config::kTile * Config::kCodeBytes, words);
  const ByteTable high = read_table(offsetof(CodebookTables, v_high));
  const ByteTable low = read_table(offsetof(CodebookTables, v_low));
#pragma unroll
  for (int i = 0; i < Config::kSliceWords; ++i) {
    uint32_t x[4];
    unpack_fp16(words[i], high, low, x);
    ptx::st_shared_v4(value ^ (i * Config::kThreadsPerToken << 4), ptx::mul_f16x2(x[0], v_norm2),
                      ptx::mul_f16x2(x[1], v_norm2), ptx::mul_f16x2(x[2], v_norm2),
                      ptx::mul_f16x2(x[3], v_norm2));
  }

  if (thread % Config::kThreadsPerToken == 0) {
    // Two mantissa bits fewer (2^-21 relative): kMagic = 3 * 2^22, so kMagic * norm is then exact
    // and the subtraction inside the FMA leaves no error in the score.
    const float k_norm = valid ? __uint_as_float(ptx::ld_shared_u32(norms) & ~3u) : 0.f;
    const uint32_t scales = buffer + Config::kKeyBytes + Config::kValueBytes + 8 * row;
    ptx::st_shared_v2(scales, __float_as_uint(k_norm), __float_as_uint(-kMagic * k_norm));
  }
}

// First dim of chunk `chunk` of the V tile (and of O): the inverse of unpack_tile's chunk order.
template <typename Config>
TQ4_HOST_DEVICE constexpr int value_dim(int chunk) {
  return chunk % Config::kThreadsPerToken * (Config::D / Config::kThreadsPerToken) +
         chunk / Config::kThreadsPerToken * 8;
}

// What a CTA works on, kept in shared memory: needed before, after and on the edges of the main
// loop only, whose registers are all taken.
struct TileInfo {
  int num_keys;    // L
  int pos0;        // position of the sequence's first query token: L - T
  int num_rows;    // packed rows of the sequence
  int first_row;   // first packed row of this tile
  int q_begin;     // first query token of the sequence
  int group;       // query heads of a KV head
  int first_head;  // first query head of the KV head
  int num_tiles;   // key tiles to visit
};
static_assert(sizeof(TileInfo) == 32, "fits its place in shared memory");

// Keys of one warp's rows: steps outside [begin, end) are skipped, steps inside
// [full_begin, full_end) are seen whole by every row.
struct WarpKeys {
  int begin, end, full_begin, full_end;
};

// The rows a lane sees: index 2 mt + i is row 16 mt + 8 i + lane / 4 of the warp.
template <typename Config>
struct LaneRows {
  int first;  // packed row of index 0 in the sequence
  int count;  // packed rows of the sequence
  int group;
  uint32_t tokens;  // shared address of index 0's token

  __device__ __forceinline__ int row(int index) const { return first + 8 * index; }
  __device__ __forceinline__ bool valid(int index) const { return row(index) < count; }
  // From a table: four integer divisions at once would not fit in the main loop's registers.
  __device__ __forceinline__ int token(int index) const {
    return ptx::ld_shared_u32(tokens + 32 * index);
  }
  // Query head, counted from the first of the group.
  __device__ __forceinline__ int head(int index, int token) const {
    return row(index) - token * group;
  }
};

// Read where needed (the loads are volatile), never carried through the main loop in registers.
template <typename Config>
__device__ __forceinline__ int tile_info(uint32_t smem, size_t field) {
  return ptx::ld_shared_volatile(smem + Config::kInfo + field);
}

template <typename Config>
__device__ __forceinline__ LaneRows<Config> lane_rows(uint32_t smem) {
  const unsigned thread = ptx::thread_idx_volatile();
  const int row = thread / 32 * Config::kWarpRows + thread % 32 / 4;
  return {tile_info<Config>(smem, offsetof(TileInfo, first_row)) + row,
          tile_info<Config>(smem, offsetof(TileInfo, num_rows)),
          tile_info<Config>(smem, offsetof(TileInfo, group)), smem + Config::kRowTokens + 4 * row};
}

// [3/7] q -> rotated, scaled, quantised A fragments.  In fp16 mode the "quantisation" is a power of
// two and a rounding to fp16.
template <typename Config>
struct QueryFragments {
  uint32_t a[Config::kMTiles][Config::kKeySteps][4];
  float scale[2 * Config::kMTiles];  // score = scale * norm * (integer product)
};

template <typename Config>
__device__ __forceinline__ void quantise_rows(float (&c)[Config::kMTiles][Config::D / 8][4],
                                              float sign, QueryFragments<Config>& q) {
#pragma unroll
  for (int mt = 0; mt < Config::kMTiles; ++mt) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float largest = 0.f;
#pragma unroll
      for (int j = 0; j < Config::D / 8; ++j) {
        largest =
            ptx::max_nan(largest, ptx::max_nan(fabsf(c[mt][j][2 * i]), fabsf(c[mt][j][2 * i + 1])));
      }
      largest = quad_max_nan(largest);
      // Rows of zeros (or of nothing representable) get codes 0 and any unit; NaN stays.
      float unit, inv;
      if constexpr (Config::kInt8) {
        unit = largest < 1e-30f ? 1.f : __fdiv_rn(largest, 127.f);
        inv = largest < 1e-30f ? 0.f : __frcp_rn(unit);
      } else {
        const float row_scale = fp16_row_scale(largest);  // a power of two
        unit = largest != largest ? largest : __fdiv_rn(1.f, row_scale);
        inv = row_scale;
      }
      q.scale[2 * mt + i] = unit;
#pragma unroll
      for (int s = 0; s < Config::D / 32; ++s) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int j = 4 * s + 2 * h;
          const float v[4] = {c[mt][j][2 * i], c[mt][j][2 * i + 1], c[mt][j + 1][2 * i],
                              c[mt][j + 1][2 * i + 1]};
          if constexpr (Config::kInt8) {
            uint32_t packed = 0;
#pragma unroll
            for (int b = 0; b < 4; ++b) {
              // v / unit, correctly rounded but for a few cases in a million: fp16 inputs hit
              // exact ties, which a plain product with the reciprocal would break either way.
              const float estimate = v[b] * inv;
              const float quotient = fmaf(fmaf(-estimate, unit, v[b]), inv, estimate);
              const int code = max(-127, min(127, __float2int_rn(quotient * sign)));
              packed |= static_cast<uint32_t>(code & 0xff) << (8 * b);
            }
            q.a[mt][s][2 * h + i] = packed;
          } else {
            q.a[mt][2 * s + h][i] = ptx::pack_f16x2(v[0] * inv * sign, v[1] * inv * sign);
            q.a[mt][2 * s + h][2 + i] = ptx::pack_f16x2(v[2] * inv * sign, v[3] * inv * sign);
          }
        }
      }
    }
  }
}

// Dim held at column 2t + e of "n-tile" j = 4 s + 2 h + u of the rotated q: the order in which
// unpack_tile leaves the keys.  INT8 words hold their dims pairwise swapped.
template <typename Config>
TQ4_HOST_DEVICE constexpr int query_dim(int quarter, int j, int e) {
  return quarter * (Config::D / 4) + 8 * (j / 4) + 4 * (j / 2 % 2) + 2 * (j % 2) +
         (Config::kInt8 ? 1 - e : e);
}

template <typename Config>
__device__ __forceinline__ void load_query(const AttentionParams& p, uint32_t smem,
                                           QueryFragments<Config>& q) {
  constexpr int D = Config::D;
  const LaneRows<Config> rows = lane_rows<Config>(smem);
  const int q_begin = tile_info<Config>(smem, offsetof(TileInfo, q_begin));
  const int first_head = tile_info<Config>(smem, offsetof(TileInfo, first_head));
  const uint32_t panel_smem = smem + Config::kBuffers;
  using Panel = RotationPanel<D>;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const auto* base = static_cast<const uint16_t*>(p.q);
  const bool aligned16 =
      (reinterpret_cast<uintptr_t>(p.q) | (p.q_token_stride * 2) | (p.q_head_stride * 2)) % 16 == 0;
  QueryRow row[2 * Config::kMTiles];
#pragma unroll
  for (int i = 0; i < 2 * Config::kMTiles; ++i) {
    row[i].p = nullptr;
    row[i].scale = 1.f;
    if (rows.valid(i)) {
      const int token = rows.token(i);
      const int head = first_head + rows.head(i, token);
      row[i].p = base + (q_begin + token) * p.q_token_stride + head * p.q_head_stride;
    }
  }

  float c[Config::kMTiles][D / 8][4] = {};
  float unit = 1.f;  // c holds q_rot * row.scale / unit
  if (p.q_rotation != nullptr) {
#pragma unroll
    for (int i = 0; i < 2 * Config::kMTiles; ++i) find_row_scale<D>(row[i], p.dtype, aligned16);
    unit = rotation_unit(p.q_rotation);
    const auto panel_rows = [](int panel) {
      return [panel](int r) { return Panel::by_quarter(panel, r); };
    };
#pragma unroll
    for (int panel = 0; panel < Panel::kPanels; ++panel) {
      const auto multiply = [&] {
#pragma unroll 1
        for (int kb = 0; kb < D / 32; ++kb) {
          uint32_t a[2 * Config::kMTiles][4];
#pragma unroll
          for (int i = 0; i < 2 * Config::kMTiles; ++i) {
            load_row_fp16(row[i], 32 * kb + 8 * t, p.dtype, aligned16, a[i]);
          }
#pragma unroll
          for (int jj = 0; jj < 4 * Panel::kSteps; ++jj) {
            // Column g of the product is quarter g / 2, e = g % 2.
            const int j = panel * 4 * Panel::kSteps + jj;
            const int local = g / 2 * (8 * Panel::kSteps) + query_dim<Config>(0, jj, 0);
            const int local_row = Config::kInt8 ? local - (g & 1) : local + (g & 1);
            const uint4 b =
                ptx::ld_shared_v4(panel_smem + HalfTile<D>::offset(local_row, 4 * kb + t));
#pragma unroll
            for (int mt = 0; mt < Config::kMTiles; ++mt) {
              const uint32_t a0[4] = {a[2 * mt][0], a[2 * mt + 1][0], a[2 * mt][1],
                                      a[2 * mt + 1][1]};
              const uint32_t a1[4] = {a[2 * mt][2], a[2 * mt + 1][2], a[2 * mt][3],
                                      a[2 * mt + 1][3]};
              ptx::mma_m16n8k16_f16f16f32(c[mt][j], a0, b.x, b.y);
              ptx::mma_m16n8k16_f16f16f32(c[mt][j], a1, b.z, b.w);
            }
          }
        }
      };
      if (panel > 0) __syncthreads();  // all warps are done with the previous panel
      const bool has_low = load_rotation_part<D, Config::kThreads, RotationPart::kHigh>(
          panel_smem, p.q_rotation, unit, panel_rows(panel));
      const bool any_low = __syncthreads_or(has_low);  // the panel is complete
      multiply();
      if (any_low) {
        __syncthreads();  // all warps are done with the high part
        load_rotation_part<D, Config::kThreads, RotationPart::kLow>(panel_smem, p.q_rotation, unit,
                                                                    panel_rows(panel));
        __syncthreads();  // the low part is complete
        multiply();
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2 * Config::kMTiles; ++i) {
#pragma unroll
      for (int s = 0; s < D / 32; ++s) {
        uint4 raw = make_uint4(0, 0, 0, 0);
        if (row[i].p != nullptr) raw = load_raw8(row[i].p + t * (D / 4) + 8 * s, aligned16);
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          const float2 v = unpack_pair(words[u], p.dtype);
          c[i / 2][4 * s + u][2 * (i % 2)] = Config::kInt8 ? v.y : v.x;
          c[i / 2][4 * s + u][2 * (i % 2) + 1] = Config::kInt8 ? v.x : v.y;
        }
      }
    }
  }

  // A negative sm_scale goes into the codes: the running maximum needs positive row scales.
  const float sign = p.sm_scale < 0.f ? -1.f : 1.f;
  quantise_rows<Config>(c, sign, q);
#pragma unroll
  for (int i = 0; i < 2 * Config::kMTiles; ++i)
    q.scale[i] = __fdiv_rn(q.scale[i] * unit, row[i].scale);
}

template <typename Config>
struct SoftmaxState {
  float m[2 * Config::kMTiles];  // running maximum, log2 units
  float l[2 * Config::kMTiles];  // this lane's part of the denominator
};

// Log2 units of one unit of t, for the rows of this lane.  They live in shared memory: four more
// registers would not fit beside the accumulators.
template <typename Config>
__device__ __forceinline__ void load_row_scales(uint32_t smem,
                                                float (&scale)[2 * Config::kMTiles]) {
  const unsigned thread = ptx::thread_idx_volatile();
  const uint32_t row = thread / 32 * Config::kWarpRows + thread % 32 / 4;
#pragma unroll
  for (int i = 0; i < 2 * Config::kMTiles; ++i) {
    scale[i] = ptx::ld_shared_f32(smem + Config::kRowScales + 4 * row + 32 * i);
  }
}

// [4/7] S of 32 tokens: t = norm * (q8 . k8), columns 8 j + 2 t'.. of n-tile j.
template <typename Config>
__device__ __forceinline__ void compute_qk(uint32_t buffer, int inner,
                                           const QueryFragments<Config>& q,
                                           float (&s)[Config::kMTiles][4][4]) {
  const unsigned lane = ptx::thread_idx_volatile() % 32;
  const int g = lane / 4, t = lane % 4;
  const int32_t start[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
  // Chunk c of this lane lies at key ^ (c << 4): tiles are aligned, so the XOR of the swizzle may
  // act on the address itself; n-tile j is 8 rows on, where the swizzle repeats.  Neither needs a
  // table of offsets carried through the loop.
  const uint32_t key =
      buffer + inner * (Config::kInner * Config::Key::kRowBytes) + Config::Key::offset(g, t, 0);
  const uint32_t column =
      buffer + Config::kKeyBytes + Config::kValueBytes + inner * (8 * Config::kInner) + 16 * t;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    int32_t acc[Config::kMTiles][4];
#pragma unroll
    for (int mt = 0; mt < Config::kMTiles; ++mt) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[mt][j][e] = 0.f;
    }
#pragma unroll
    for (int chunk = 0; chunk < (Config::kKeySteps + 1) / 2; ++chunk) {
      const uint4 b = ptx::ld_shared_v4((key ^ (chunk << 4)) + j * 8 * Config::Key::kRowBytes);
#pragma unroll
      for (int mt = 0; mt < Config::kMTiles; ++mt) {
        if constexpr (Config::kInt8) {
          if (chunk == 0) {
            ptx::mma_m16n8k32_s8s8s32(acc[mt], q.a[mt][0], b.x, b.y, start);
          } else {
            ptx::mma_m16n8k32_s8s8s32(acc[mt], q.a[mt][2 * chunk], b.x, b.y, acc[mt]);
          }
          if (2 * chunk + 1 < Config::kKeySteps) {
            ptx::mma_m16n8k32_s8s8s32(
                acc[mt], q.a[mt][2 * chunk + 1 < Config::kKeySteps ? 2 * chunk + 1 : 0], b.z, b.w,
                acc[mt]);
          }
        } else {
          ptx::mma_m16n8k16_f16f16f32(s[mt][j], q.a[mt][2 * chunk], b.x, b.y);
          ptx::mma_m16n8k16_f16f16f32(s[mt][j], q.a[mt][2 * chunk + 1], b.z, b.w);
        }
      }
    }
    // Columns 2t and 2t + 1: {norm, -magic * norm} each.
    const float4 scale = ptx::ld_shared_v4f(column + 64 * j);
#pragma unroll
    for (int mt = 0; mt < Config::kMTiles; ++mt) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float norm = e % 2 ? scale.z : scale.x;
        if constexpr (Config::kInt8) {
          s[mt][j][e] = fmaf(__int_as_float(acc[mt][e]), norm, e % 2 ? scale.w : scale.y);
        } else {
          s[mt][j][e] *= norm;
        }
      }
    }
  }
}

// t -> cap * tanh(score / cap), back in units of t.
template <typename Config>
__device__ __forceinline__ void apply_softcap(float softcap, uint32_t smem,
                                              float (&s)[Config::kMTiles][4][4]) {
  float scale[2 * Config::kMTiles];
  load_row_scales<Config>(smem, scale);
#pragma unroll
  for (int i = 0; i < 2 * Config::kMTiles; ++i) {
    const float unit = __fdividef(scale[i], softcap * kLog2e);  // score / cap = t * unit
    const float inv = __fdividef(softcap * kLog2e, scale[i]);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[i / 2][j][2 * (i % 2) + e];
        x = ptx::tanh_accurate(x * unit) * inv;
      }
    }
  }
}

// Keys outside [lo, hi] of their row become -inf.  Only tiles on an edge come here.
template <typename Config>
__device__ __forceinline__ void apply_mask(int first_key, uint32_t smem, int window_left,
                                           int window_right, float (&s)[Config::kMTiles][4][4]) {
  const int t = threadIdx.x % 4;
  const LaneRows<Config> rows = lane_rows<Config>(smem);
  const int pos0 = tile_info<Config>(smem, offsetof(TileInfo, pos0));
  const int num_keys = tile_info<Config>(smem, offsetof(TileInfo, num_keys));
#pragma unroll
  for (int i = 0; i < 2 * Config::kMTiles; ++i) {
    const int pos = pos0 + rows.token(i);
    const int hi = min(num_keys - 1, pos + window_or_max(window_right));
    const int lo = pos - window_or_max(window_left);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = first_key + 8 * j + 2 * t + e;
        if (key > hi || key < lo) s[i / 2][j][2 * (i % 2) + e] = -INFINITY;
      }
    }
  }
}

// [5/7] P = 2^(S - m), in place; O and l are rescaled when a maximum has moved.
template <typename Config>
__device__ __forceinline__ void update_softmax(uint32_t smem, float (&s)[Config::kMTiles][4][4],
                                               SoftmaxState<Config>& state,
                                               float (&o)[Config::kMTiles][Config::D / 8][4]) {
  float scale[2 * Config::kMTiles], top[2 * Config::kMTiles];
  load_row_scales<Config>(smem, scale);
  bool moved = false;
#pragma unroll
  for (int i = 0; i < 2 * Config::kMTiles; ++i) {
    float x = -INFINITY;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      x = fmaxf(x, fmaxf(s[i / 2][j][2 * (i % 2)], s[i / 2][j][2 * (i % 2) + 1]));
    }
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
    top[i] = x * scale[i];
    moved |= top[i] > state.m[i] + kLazyRescale;
  }
  if (__any_sync(0xffffffffu, moved)) {
#pragma unroll
    for (int i = 0; i < 2 * Config::kMTiles; ++i) {
      const float m = fmaxf(state.m[i], top[i]);
      const float alpha = ptx::exp2_approx(state.m[i] - m);
      state.m[i] = m;
      state.l[i] *= alpha;
#pragma unroll
      for (int j = 0; j < Config::D / 8; ++j) {
        o[i / 2][j][2 * (i % 2)] *= alpha;
        o[i / 2][j][2 * (i % 2) + 1] *= alpha;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2 * Config::kMTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[i / 2][j][2 * (i % 2) + e];
        x = ptx::exp2_approx(fmaf(x, scale[i], -state.m[i]));
        state.l[i] += x;
      }
    }
  }
}

// [6/7] O += P V.  The C fragment of S is the A fragment of P.
template <typename Config>
__device__ __forceinline__ void compute_pv(uint32_t buffer, int inner,
                                           const float (&s)[Config::kMTiles][4][4],
                                           float (&o)[Config::kMTiles][Config::D / 8][4]) {
  const unsigned lane = ptx::thread_idx_volatile() % 32;
  const uint32_t value = buffer + Config::kKeyBytes +
                         inner * (Config::kInner * Config::Value::kRowBytes) +
                         Config::Value::offset(lane % 16, lane / 16);
#pragma unroll
  for (int kk = 0; kk < 2; ++kk) {  // 16 tokens each
    uint32_t a[Config::kMTiles][4];
#pragma unroll
    for (int mt = 0; mt < Config::kMTiles; ++mt) {
      a[mt][0] = ptx::pack_f16x2(s[mt][2 * kk][0], s[mt][2 * kk][1]);
      a[mt][1] = ptx::pack_f16x2(s[mt][2 * kk][2], s[mt][2 * kk][3]);
      a[mt][2] = ptx::pack_f16x2(s[mt][2 * kk + 1][0], s[mt][2 * kk + 1][1]);
      a[mt][3] = ptx::pack_f16x2(s[mt][2 * kk + 1][2], s[mt][2 * kk + 1][3]);
    }
    // ldmatrix: matrices (tokens 0-7, chunk c), (8-15, c), (0-7, c + 1), (8-15, c + 1).
#pragma unroll
    for (int pair = 0; pair < Config::D / 16; ++pair) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, (value ^ (pair << 5)) + kk * 16 * Config::Value::kRowBytes);
#pragma unroll
      for (int mt = 0; mt < Config::kMTiles; ++mt) {
        ptx::mma_m16n8k16_f16f16f32(o[mt][2 * pair], a[mt], b[0], b[1]);
        ptx::mma_m16n8k16_f16f16f32(o[mt][2 * pair + 1], a[mt], b[2], b[3]);
      }
    }
  }
}

// Writes two neighbouring dims of a row.
__device__ __forceinline__ void store_pair(uint16_t* p, float x, float y, DType dtype,
                                           bool aligned4) {
  const uint32_t word = dtype == DType::kBFloat16 ? ptx::pack_bf16x2(x, y) : ptx::pack_f16x2(x, y);
  if (aligned4) {
    *reinterpret_cast<uint32_t*>(p) = word;
  } else {
    p[0] = static_cast<uint16_t>(word);
    p[1] = static_cast<uint16_t>(word >> 16);
  }
}

// [7/7] out = (O / l) R, and the LSE.
template <typename Config>
__device__ __forceinline__ void write_output(const AttentionParams& p, uint32_t smem,
                                             SoftmaxState<Config>& state,
                                             float (&o)[Config::kMTiles][Config::D / 8][4]) {
  constexpr int D = Config::D;
  const LaneRows<Config> rows = lane_rows<Config>(smem);
  const int q_begin = tile_info<Config>(smem, offsetof(TileInfo, q_begin));
  const int first_head = tile_info<Config>(smem, offsetof(TileInfo, first_head));
  const uint32_t panel_smem = smem + Config::kBuffers;
  using Panel = RotationPanel<D>;
  const int lane = threadIdx.x % 32, t = threadIdx.x % 4;
  const bool aligned4 =
      (reinterpret_cast<uintptr_t>(p.out) | (p.out_token_stride * 2) | (p.out_head_stride * 2)) %
          4 ==
      0;
#pragma unroll
  for (int i = 0; i < 2 * Config::kMTiles; ++i) {
    float l = state.l[i];
    l += __shfl_xor_sync(0xffffffffu, l, 1);
    l += __shfl_xor_sync(0xffffffffu, l, 2);
    float factor = 1.f, m = state.m[i];
    if (rows.valid(i)) {
      const int token = rows.token(i);
      const int head = first_head + rows.head(i, token);
      if (p.sinks != nullptr) {  // one more term of the denominator, with no value
        const float sink = p.sinks[head] * kLog2e;
        m = fmaxf(m, sink);
        factor = ptx::exp2_approx(state.m[i] - m);
        l = l * factor + ptx::exp2_approx(sink - m);
      }
      if (p.lse != nullptr && t == 0) {
        // l = 0: no visible key.  NaN goes through.
        p.lse[static_cast<int64_t>(head) * p.num_tokens + q_begin + token] =
            l == 0.f ? -INFINITY : (m + log2f(l)) * kLn2;
      }
    }
    const float inv = l == 0.f ? 0.f : __fdiv_rn(factor, l);
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      o[i / 2][j][2 * (i % 2)] *= inv;
      o[i / 2][j][2 * (i % 2) + 1] *= inv;
    }
  }

  // Row pointers are made here, not above: their registers are needed by the rotation.
  const auto store_rows = [&](auto dim_of) {
#pragma unroll
    for (int i = 0; i < 2 * Config::kMTiles; ++i) {
      if (!rows.valid(i)) continue;
      const int token = rows.token(i);
      uint16_t* dst = static_cast<uint16_t*>(p.out) + (q_begin + token) * p.out_token_stride +
                      (first_head + rows.head(i, token)) * p.out_head_stride;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        store_pair(dst + dim_of(j) + 2 * t, o[i / 2][j][2 * (i % 2)], o[i / 2][j][2 * (i % 2) + 1],
                   p.dtype, aligned4);
      }
    }
  };
  if (p.out_rotation == nullptr) {
    store_rows([](int j) { return value_dim<Config>(j); });
    return;
  }

  // O / l is bounded by the largest |V'|, an fp16 number: it fits.
  uint32_t a[Config::kMTiles][D / 16][4];
#pragma unroll
  for (int mt = 0; mt < Config::kMTiles; ++mt) {
#pragma unroll
    for (int ks = 0; ks < D / 16; ++ks) {
      a[mt][ks][0] = ptx::pack_f16x2(o[mt][2 * ks][0], o[mt][2 * ks][1]);
      a[mt][ks][1] = ptx::pack_f16x2(o[mt][2 * ks][2], o[mt][2 * ks][3]);
      a[mt][ks][2] = ptx::pack_f16x2(o[mt][2 * ks + 1][0], o[mt][2 * ks + 1][1]);
      a[mt][ks][3] = ptx::pack_f16x2(o[mt][2 * ks + 1][2], o[mt][2 * ks + 1][3]);
    }
  }
#pragma unroll
  for (int mt = 0; mt < Config::kMTiles; ++mt) {
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) o[mt][j][e] = 0.f;
    }
  }
#pragma unroll
  for (int panel = 0; panel < Panel::kPanels; ++panel) {
    __syncthreads();  // the tiles (or the previous panel) are no longer read
    load_rotation_panel<D, Config::kThreads>(panel_smem, p.out_rotation, [&](int r) {
      return value_dim<Config>(panel * (Panel::kRows / 8) + r / 8) + r % 8;
    });
    __syncthreads();  // the panel is complete
#pragma unroll
    for (int kk = 0; kk < Panel::kRows / 16; ++kk) {
      const int ks = panel * (Panel::kRows / 16) + kk;
      const int row = 16 * kk + lane % 16;
#pragma unroll
      for (int pair = 0; pair < D / 16; ++pair) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, panel_smem + HalfTile<D>::offset(row, 2 * pair + lane / 16));
#pragma unroll
        for (int mt = 0; mt < Config::kMTiles; ++mt) {
          ptx::mma_m16n8k16_f16f16f32(o[mt][2 * pair], a[mt][ks], b[0], b[1]);
          ptx::mma_m16n8k16_f16f16f32(o[mt][2 * pair + 1], a[mt][ks], b[2], b[3]);
        }
      }
    }
  }
  store_rows([](int j) { return 8 * j; });
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    prefill_kernel(const __grid_constant__ AttentionParams p, int copy_bytes, int block_shift) {
  constexpr int D = Config::D;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t smem = ptx::opaque(ptx::smem_address(shared));
  const int warp = threadIdx.x / 32;
  const int group = p.num_q_heads / p.cache.num_kv_heads;

  // KV heads innermost: CTAs that share a sequence's pages run side by side.
  const int kv_head = blockIdx.x % p.cache.num_kv_heads;
  const int64_t slots = gridDim.x / p.cache.num_kv_heads;
  const PrefillTile tile = find_prefill_tile(p.query_start_loc, p.num_seqs, group, Config::kRows,
                                             slots - 1 - blockIdx.x / p.cache.num_kv_heads);
  if (tile.seq < 0) return;
  TileInfo info;
  info.num_keys = p.seq_lens[tile.seq];
  info.pos0 = info.num_keys - tile.q_len;
  info.num_rows = tile.q_len * group;
  info.first_row = tile.first_row;
  info.q_begin = tile.q_begin;
  info.group = group;
  const int last_row = min(tile.first_row + Config::kRows, info.num_rows) - 1;
  const KeyRange keys =
      visible_keys(info.pos0 + tile.first_row / group, info.pos0 + last_row / group, p.window_left,
                   p.window_right, info.num_keys);
  const int key_begin = keys.begin / Config::kTile * Config::kTile;
  info.first_head = kv_head * group;
  info.num_tiles =
      keys.end > key_begin ? (keys.end - key_begin + Config::kTile - 1) / Config::kTile : 0;

  if (warp == 0) {
    write_codebook_tables(reinterpret_cast<CodebookTables*>(shared + Config::kTables), p.k_codes,
                          p.k_centroids, p.v_centroids);
  }
  if (threadIdx.x == 0) {
    *reinterpret_cast<TileInfo*>(shared + Config::kInfo) = info;
    *reinterpret_cast<PageInfo*>(shared + Config::kPageInfo) = {
        p.block_table + tile.seq * p.block_table_stride, key_begin, keys.end};
  }
  if (threadIdx.x < Config::kRows) {
    reinterpret_cast<int*>(shared + Config::kRowTokens)[threadIdx.x] =
        (tile.first_row + static_cast<int>(threadIdx.x)) / group;
  }
  {
    const int first = tile.first_row + warp * Config::kWarpRows;
    const int last = min(first + Config::kWarpRows, info.num_rows) - 1;
    const int pos_first = info.pos0 + first / group, pos_last = info.pos0 + last / group;
    const KeyRange seen =
        visible_keys(pos_first, pos_last, p.window_left, p.window_right, info.num_keys);
    const bool active = first < info.num_rows;
    ptx::st_shared_v4(
        smem + Config::kWarpKeys + 16 * warp, seen.begin, active ? seen.end : 0,
        pos_last - window_or_max(p.window_left),
        min(info.num_keys, pos_first + min(window_or_max(p.window_right), kMaxWindow - 1) + 1));
  }

  const PageLoader<Config> loader{smem, copy_bytes, block_shift};
  loader.write_slot(p.cache, kv_head);
  __syncthreads();  // tables, infos and row tokens are written

  // The first tiles travel while q is rotated.
  if (threadIdx.x % Config::kThreadsPerToken == 2) {
#pragma unroll
    for (int i = 0; i < Config::kStages; ++i) {
      loader.copy_page_id(i, threadIdx.x / Config::kThreadsPerToken, p.cache);
    }
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();  // page ids were fetched by a neighbouring lane
#pragma unroll
  for (int i = 0; i < Config::kStages; ++i) {
    loader.copy(i, p.cache);
    ptx::cp_async_commit();
  }

  QueryFragments<Config> q;
  load_query<Config>(p, smem, q);
  __syncthreads();  // the rotation panel has been read: tile 0 may take its place

  SoftmaxState<Config> state;
  const float k_unit =
      Config::kInt8 ? p.k_code_scale
                    : ptx::ld_shared_f32(smem + Config::kTables + offsetof(CodebookTables, k_unit));
#pragma unroll
  for (int i = 0; i < 2 * Config::kMTiles; ++i) {
    float scale = q.scale[i] * k_unit * fabsf(p.sm_scale) * kLog2e;
    if (scale == 0.f) scale = 1e-30f;  // 0 * (-inf) must not turn into NaN
    if (threadIdx.x % 4 == 0) {
      const int row = warp * Config::kWarpRows + threadIdx.x % 32 / 4 + 8 * i;
      ptx::st_shared_u32(smem + Config::kRowScales + 4 * row, __float_as_uint(scale));
    }
    state.m[i] = kMinusHuge;
    state.l[i] = 0.f;
  }
  float o[Config::kMTiles][D / 8][4] = {};

  const auto num_tiles = [&] { return tile_info<Config>(smem, offsetof(TileInfo, num_tiles)); };
  const auto key_begin_of = [&](int i) {
    return static_cast<int>(
        ptx::ld_shared_volatile(smem + Config::kPageInfo + offsetof(PageInfo, key_begin)) +
        i * Config::kTile);
  };
  if (num_tiles() > 0) {
    ptx::cp_async_wait<Config::kStages - 1>();
    __syncwarp();  // the V norm was copied by a neighbouring lane
    unpack_tile<Config>(smem, 0);
  }
  for (int i = 0; i < num_tiles(); ++i) {
    // Tile i is unpacked; buffer (i + 1) % 2 and raw stage i % 3 are free.
    __syncthreads();
    loader.copy(i + Config::kStages, p.cache);
    ptx::cp_async_commit();
    // Raw tile i + 1 and the page ids of tile i + 4 have landed, as far as this thread copied them;
    // the V norm and the page id come from neighbouring lanes.
    ptx::cp_async_wait<Config::kStages - 1>();
    __syncwarp();

    const auto unpacks_first = [] { return ptx::thread_idx_volatile() < Config::kThreads / 2; };
    if (unpacks_first() && i + 1 < num_tiles()) unpack_tile<Config>(smem, i + 1);

#pragma unroll 1
    for (int inner = 0; inner < Config::kTile / Config::kInner; ++inner) {
      // Opaque: what is derived from it is recomputed, not carried through the loop.
      const uint32_t buffer = ptx::opaque(smem + Config::kBuffers + i % 2 * Config::kBufferBytes);
      const int first_key = key_begin_of(i) + inner * Config::kInner;
      const int last_key = first_key + Config::kInner - 1;
      const uint4 seen =
          ptx::ld_shared_v4(smem + Config::kWarpKeys + 16 * (ptx::thread_idx_volatile() / 32));
      if (first_key >= static_cast<int>(seen.y) || last_key < static_cast<int>(seen.x)) continue;
      float s[Config::kMTiles][4][4];
      compute_qk<Config>(buffer, inner, q, s);
      if (p.softcap > 0.f) apply_softcap<Config>(p.softcap, smem, s);
      if (first_key < static_cast<int>(seen.z) || last_key >= static_cast<int>(seen.w)) {
        apply_mask<Config>(first_key, smem, p.window_left, p.window_right, s);
      }
      update_softmax<Config>(smem, s, state, o);
      compute_pv<Config>(buffer, inner, s, o);
    }
    if (!unpacks_first() && i + 1 < num_tiles()) unpack_tile<Config>(smem, i + 1);
  }
  ptx::cp_async_wait<0>();
  write_output<Config>(p, smem, state, o);
}

}  // namespace tq4::sm80
