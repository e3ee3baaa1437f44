// Python view of the host-compilable device headers, for tests/test_host_maps.py (pybind11).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "cell_quantiser.h"
#include "device/decode_plan.h"
#include "device/fragment_map.cuh"
#include "device/prefill_schedule.cuh"
#include "device/swizzle.cuh"
#include "device/unpack4.cuh"
#include "device/wgmma_image.cuh"
#include "kernels/head_dim.h"
#include "layout.h"
#include "segment_walk.h"

namespace py = pybind11;

namespace {

py::dict view_to_dict(const tq4::PageView& view) {
  py::dict fields;
  fields["block_stride"] = view.block_stride;
  fields["k_codes"] = view.k_codes;
  fields["k_norms"] = view.k_norms;
  fields["v_codes"] = view.v_codes;
  fields["v_norms"] = view.v_norms;
  fields["code_token_stride"] = view.code_token_stride;
  fields["code_head_stride"] = view.code_head_stride;
  fields["norm_token_stride"] = view.norm_token_stride;
  fields["norm_head_stride"] = view.norm_head_stride;
  fields["num_blocks"] = view.num_blocks;
  fields["block_size"] = view.block_size;
  fields["num_kv_heads"] = view.num_kv_heads;
  fields["head_dim"] = view.head_dim;
  return fields;
}

tq4::ByteTable make_table(const std::array<uint8_t, 16>& entries) {
  uint32_t words[4] = {};
  for (int i = 0; i < 16; ++i) words[i / 4] |= static_cast<uint32_t>(entries[i]) << (8 * (i % 4));
  return {words[0], words[1], words[2], words[3]};
}

// (bytes of a row, offset of every [row][chunk])
std::pair<int, std::vector<std::vector<int>>> half_tile(int head_dim, int rows) {
  return tq4::dispatch_head_dim(head_dim, [&](auto d) {
    using Tile = tq4::HalfTile<d>;
    std::vector<std::vector<int>> offsets(rows);
    for (int row = 0; row < rows; ++row) {
      for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
        offsets[row].push_back(Tile::offset(row, chunk));
      }
    }
    return std::make_pair(Tile::kRowBytes, offsets);
  });
}

// (bytes of a row, used bytes of a quarter, offset of every [row][quarter][chunk])
template <int kElementBytes>
std::tuple<int, int, std::vector<std::vector<std::vector<int>>>> key_tile(int head_dim, int rows) {
  return tq4::dispatch_head_dim(head_dim, [&](auto d) {
    using Tile = tq4::KeyTile<d, kElementBytes>;
    std::vector<std::vector<std::vector<int>>> offsets(rows, std::vector<std::vector<int>>(4));
    for (int row = 0; row < rows; ++row) {
      for (int quarter = 0; quarter < 4; ++quarter) {
        for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
          offsets[row][quarter].push_back(Tile::offset(row, quarter, chunk));
        }
      }
    }
    return std::make_tuple(Tile::kRowBytes, Tile::kUsedBytes, offsets);
  });
}

// Sizes, the offset of every chunk of 16 bytes and the dims of the rotation's columns of the images
// that the wgmma prefill kernel reads.
py::dict wgmma_image(int head_dim) {
  return tq4::dispatch_head_dim(head_dim, [](auto d) {
    using Image = tq4::WgmmaImage<d>;
    using Query = tq4::QueryImage<d>;
    using Offsets = std::vector<std::vector<int>>;
    const auto table = [](int rows, int chunks, auto&& offset) {
      Offsets offsets(rows);
      for (int row = 0; row < rows; ++row) {
        for (int chunk = 0; chunk < chunks; ++chunk) offsets[row].push_back(offset(row, chunk));
      }
      return offsets;
    };
    py::dict fields;
    fields["tokens"] = static_cast<int>(Image::kTileTokens);
    fields["bytes"] = static_cast<int>(Image::kBytes);
    fields["values"] = static_cast<int>(Image::kValues);
    fields["value_bytes"] = static_cast<int>(Image::Value::kBytes);
    fields["norms"] = static_cast<int>(Image::kNorms);
    fields["rotation_tiles"] = static_cast<int>(Image::kRotationTiles);
    fields["query_rows"] = static_cast<int>(Query::kRows);
    fields["query_bytes"] = static_cast<int>(Query::kBytes);
    fields["query_scales"] = static_cast<int>(Query::kScales);
    fields["key_offsets"] = table(Image::kTileTokens, Image::kKeyChunks, Image::key_offset);
    fields["value_offsets"] = table(Image::kTileTokens, d / 8, Image::value_offset);
    fields["rotation_offsets"] = table(d, d / 8, Image::rotation_offset);
    fields["rotation_dims"] = table(d / 8, 4, Image::rotation_dim);
    fields["query_offsets"] = table(Query::kRows, d / 16, Query::Codes::offset);
    std::vector<uint8_t> image(Image::kBytes, 0);
    for (int token = 0; token < Image::kTileTokens; ++token) {
      Image::write_scale(image.data(), token, static_cast<float>(1 + token));
    }
    fields["scaled"] = py::bytes(reinterpret_cast<const char*>(image.data()), image.size());
    return fields;
  });
}

// Dims behind the fragment elements of store and gather: (inputs [step][16], codes [tile][8],
// outputs [tile][8]); within a fragment the order is (high, t, odd) or (t, odd).
std::tuple<std::vector<std::vector<int>>, std::vector<std::vector<int>>,
           std::vector<std::vector<int>>>
fragment_map(int head_dim) {
  return tq4::dispatch_head_dim(head_dim, [](auto d) {
    using Map = tq4::FragmentMap<d>;
    std::vector<std::vector<int>> inputs(Map::kSteps), codes(Map::kTiles), outputs(Map::kTiles);
    for (int step = 0; step < Map::kSteps; ++step) {
      for (int i = 0; i < 16; ++i) {
        inputs[step].push_back(Map::input_dim(step, i >> 3, i >> 1 & 3, i & 1));
      }
    }
    for (int tile = 0; tile < Map::kTiles; ++tile) {
      for (int i = 0; i < 8; ++i) {
        codes[tile].push_back(Map::code_dim(tile, i >> 1, i & 1));
        outputs[tile].push_back(Map::output_dim(tile, i >> 1, i & 1));
      }
    }
    return std::make_tuple(inputs, codes, outputs);
  });
}

// Indices of values among 15 boundaries by the cell table: (usable, as even dims, as odd dims).
std::tuple<bool, std::vector<int>, std::vector<int>> cell_indices(
    const std::array<float, 15>& boundaries, const std::vector<float>& values) {
  const tq4::test::CellQuantiser quantiser(boundaries.data());
  std::vector<int> even, odd;
  for (float y : values) {
    even.push_back(quantiser.even(y));
    odd.push_back(quantiser.odd(y));
  }
  return {quantiser.usable(), even, odd};
}

// [(cta, seq, chunk, first tile, end tile)] of a decode batch over a grid.
std::vector<std::array<int, 5>> decode_segments(const std::vector<int32_t>& seq_lens,
                                                const std::vector<int32_t>& query_start_loc,
                                                int window_left, int num_chunks, int segment_cost,
                                                int grid) {
  tq4::DecodeBatch batch{};
  batch.seq_lens = seq_lens.data();
  batch.query_start_loc = query_start_loc.empty() ? nullptr : query_start_loc.data();
  batch.most_queries = INT32_MAX;
  batch.num_seqs = static_cast<int>(seq_lens.size());
  batch.window_left = window_left;
  batch.num_chunks = num_chunks;
  batch.segment_cost = segment_cost;
  std::vector<int32_t> prefix{0};
  for (int seq = 0; seq < batch.num_seqs; ++seq) {
    prefix.push_back(prefix.back() + batch.unit_cost(batch.tiles(seq)));
  }
  const int64_t total = static_cast<int64_t>(prefix.back()) * num_chunks;
  const tq4::DecodeShares shares{tq4::Divider::make(grid), grid, 0};
  std::vector<std::array<int, 5>> segments;
  for (int cta = 0; cta < grid && total > 0; ++cta) {
    const int64_t begin = tq4::share_of(total, cta, shares).begin;
    int seq = 0;
    while (seq + 1 < batch.num_seqs && int64_t{prefix[seq + 1]} * num_chunks <= begin) ++seq;
    auto walker = tq4::test::start_walk(batch, total, cta, shares, seq, prefix[seq]);
    tq4::DecodeSegment segment;
    while (tq4::test::next_segment(walker, batch, segment)) {
      segments.push_back({cta, segment.seq, segment.chunk, segment.tile_begin, segment.tile_end});
    }
  }
  return segments;
}

}  // namespace

PYBIND11_MODULE(host_maps, m) {
  m.attr("kClusterMostKeys") = tq4::kClusterMostKeys;
  m.def("token_major_view", [](int64_t num_blocks, int64_t heads, int64_t block_size,
                               int64_t head_dim, int64_t block_stride, int64_t row_stride) {
    return view_to_dict(tq4::token_major_view(nullptr, num_blocks, heads, block_size, head_dim,
                                              block_stride, row_stride));
  });
  m.def("head_major_view", [](int64_t num_blocks, int64_t heads, int64_t block_size,
                              int64_t head_dim, int64_t block_stride, int64_t head_stride) {
    return view_to_dict(tq4::head_major_view(nullptr, num_blocks, heads, block_size, head_dim,
                                             block_stride, head_stride));
  });
  m.def("unpack_int8", [](uint32_t word, const std::array<uint8_t, 16>& table) {
    uint32_t x[2];
    tq4::unpack_int8(word, make_table(table), x[0], x[1]);
    std::vector<int> bytes;
    for (int i = 0; i < 8; ++i) bytes.push_back(x[i / 4] >> (8 * (i % 4)) & 0xff);
    return bytes;
  });
  m.def("unpack_fp16",
        [](uint32_t word, const std::array<uint8_t, 16>& high, const std::array<uint8_t, 16>& low) {
          uint32_t words[4];
          tq4::unpack_fp16(word, make_table(high), make_table(low), words);
          std::vector<int> halves;
          for (int i = 0; i < 8; ++i) halves.push_back(words[i / 2] >> (16 * (i % 2)) & 0xffff);
          return halves;
        });
  m.def("half_tile", &half_tile);
  m.def("key_tile", [](int head_dim, int element_bytes, int rows) {
    if (element_bytes == 1) return key_tile<1>(head_dim, rows);
    if (element_bytes == 2) return key_tile<2>(head_dim, rows);
    throw std::invalid_argument("element_bytes must be 1 or 2");
  });
  m.def("wgmma_image", &wgmma_image);
  m.def("fragment_map", &fragment_map);
  m.def("cell_indices", &cell_indices);
  m.def("decode_segments", &decode_segments);
  m.def("prefill_slots", &tq4::prefill_slots);
  // One (seq, q_begin, q_len, first_row) per slot.
  m.def("prefill_tiles", [](const std::vector<int32_t>& query_start_loc, int group, int rows) {
    const int num_seqs = static_cast<int>(query_start_loc.size()) - 1;
    const int64_t slots = tq4::prefill_slots(query_start_loc.back(), group, rows, num_seqs);
    std::vector<std::tuple<int, int, int, int>> tiles;
    for (int64_t slot = 0; slot < slots; ++slot) {
      const tq4::PrefillTile tile =
          tq4::find_prefill_tile(query_start_loc.data(), num_seqs, group, rows, 0, slot);
      tiles.emplace_back(tile.seq, tile.q_begin, tile.q_len, tile.first_row);
    }
    return tiles;
  });
  m.def("visible_keys", [](int first, int last, int left, int right, int num_keys) {
    const tq4::KeyRange range = tq4::visible_keys(first, last, left, right, num_keys);
    return std::make_pair(range.begin, range.end);
  });
}
