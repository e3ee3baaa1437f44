// What the emulated tests of store and gather share: rotations, codebooks, dense arrays and caches.
#pragma once
#include <cmath>
#include <set>
#include <string>
#include <type_traits>
#include <vector>

#include "check.h"
#include "intrinsics.h"
#include "layout.h"

namespace tq4::test {

inline double gaussian(Random* random) {
  const double u = (random->next() >> 11) * 0x1p-53 + 1e-18, v = (random->next() >> 11) * 0x1p-53;
  return std::sqrt(-2 * std::log(u)) * std::cos(6.283185307179586 * v);
}

enum class Turn { kNone, kHadamard, kOrthogonal, kAlmostHadamard };

// fp32 [D, D] in 16-byte aligned memory, or nothing.
struct Rotation {
  std::vector<uint4> storage;
  std::vector<float4> sign_storage;  // of a Hadamard rotation
  int dim = 0;

  const float* signs() const {
    return sign_storage.empty() ? nullptr : reinterpret_cast<const float*>(sign_storage.data());
  }

  const float* data() const {
    return storage.empty() ? nullptr : reinterpret_cast<const float*>(storage.data());
  }
  float at(int i, int j) const { return data()[i * dim + j]; }
};

inline Rotation make_rotation(Turn turn, int dim, Random* random) {
  Rotation rotation;
  rotation.dim = dim;
  if (turn == Turn::kNone) return rotation;
  rotation.storage.resize(dim * dim / 4);
  float* r = reinterpret_cast<float*>(rotation.storage.data());
  if (turn == Turn::kOrthogonal) {  // Gram-Schmidt
    std::vector<std::vector<double>> rows(dim, std::vector<double>(dim));
    for (int i = 0; i < dim; ++i) {
      for (double& x : rows[i]) x = gaussian(random);
      for (int pass = 0; pass < 2; ++pass) {
        for (int j = 0; j < i; ++j) {
          double dot = 0;
          for (int k = 0; k < dim; ++k) dot += rows[i][k] * rows[j][k];
          for (int k = 0; k < dim; ++k) rows[i][k] -= dot * rows[j][k];
        }
      }
      double square = 0;
      for (double x : rows[i]) square += x * x;
      for (int k = 0; k < dim; ++k)
        r[i * dim + k] = static_cast<float>(rows[i][k] /= std::sqrt(square));
    }
    return rotation;
  }
  const float magnitude = static_cast<float>(1 / std::sqrt(static_cast<double>(dim)));
  std::vector<float> signs(dim);
  for (float& s : signs) s = random->range(0, 1) ? magnitude : -magnitude;
  for (int i = 0; i < dim; ++i) {
    for (int j = 0; j < dim; ++j)
      r[i * dim + j] = __builtin_popcount(i & j) % 2 ? -signs[j] : signs[j];
  }
  if (turn == Turn::kHadamard && (dim & (dim - 1)) == 0) {
    rotation.sign_storage.resize(dim / 4);
    float* s = reinterpret_cast<float*>(rotation.sign_storage.data());
    for (int j = 0; j < dim; ++j) s[j] = signs[j] < 0 ? -1.f : 1.f;
  }
  if (turn == Turn::kAlmostHadamard) {  // one entry differs in its last bit
    float& entry = r[(dim - 1) * dim + dim - 2];
    entry = std::nextafter(entry, 1.f);
  }
  return rotation;
}

// The 16-level Gaussian quantiser for unit vectors of the given dimension, rounded.
struct Codebook {
  float centroids[16], boundaries[15];
};

inline Codebook gaussian_codebook(int dim) {
  constexpr float kHalf[8] = {0.128f, 0.388f, 0.657f, 0.942f, 1.256f, 1.618f, 2.069f, 2.733f};
  Codebook book;
  for (int i = 0; i < 8; ++i) {
    book.centroids[8 + i] = kHalf[i] / std::sqrt(static_cast<float>(dim));
    book.centroids[7 - i] = -book.centroids[8 + i];
  }
  for (int i = 0; i < 15; ++i) book.boundaries[i] = (book.centroids[i] + book.centroids[i + 1]) / 2;
  return book;
}

// A codebook that no table of cells can serve: two boundaries almost touch.
inline Codebook crowded_codebook(int dim) {
  Codebook book = gaussian_codebook(dim);
  book.centroids[9] = book.centroids[8] + 1e-4f;
  for (int i = 0; i < 15; ++i) book.boundaries[i] = (book.centroids[i] + book.centroids[i + 1]) / 2;
  return book;
}

template <typename T>
T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return {emulation::float_to_half(x)};
  } else {
    return {emulation::float_to_bfloat(x)};
  }
}

template <typename T>
float to_float(T x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return emulation::half_to_float(x.x);
  } else {
    return emulation::from_bits<float>(static_cast<uint32_t>(x.x) << 16);
  }
}

template <typename T>
constexpr DType dtype_of() {
  return sizeof(T) == 4              ? DType::kFloat32
         : std::is_same_v<T, __half> ? DType::kFloat16
                                     : DType::kBFloat16;
}

// [tokens, heads, dim] inside a larger block, with gaps between tokens and heads of `gap` elements.
// A gap of 8 elements keeps rows 16-byte aligned, an odd one does not.
template <typename T>
struct Dense {
  std::vector<uint4> storage;
  int64_t token_stride, head_stride;
  T* data;

  Dense(int tokens, int heads, int dim, int gap, uint8_t fill)
      : token_stride(static_cast<int64_t>(heads) * (dim + gap) + gap), head_stride(dim + gap) {
    storage.resize((static_cast<size_t>(tokens) * token_stride + 2 * gap + 16) * sizeof(T) / 16 +
                   1);
    std::memset(static_cast<void*>(storage.data()), fill, storage.size() * 16);
    data = reinterpret_cast<T*>(storage.data()) + gap;
  }
  T* row(int token, int head) { return data + token * token_stride + head * head_stride; }
};

// A cache of either layout whose bytes all start as `fill`.
struct Cache {
  std::vector<uint4> storage;
  PageView view;

  Cache(bool head_major, int num_blocks, int heads, int block_size, int dim, int pad,
        uint8_t fill) {
    const int64_t inner =
        head_major ? head_page_bytes(block_size, dim) + pad : token_bytes(heads, dim) + pad;
    const int64_t block = inner * (head_major ? heads : block_size) + pad;
    storage.resize((num_blocks * block + 64) / 16 + 1);
    std::memset(static_cast<void*>(storage.data()), fill, storage.size() * 16);
    uint8_t* base = bytes() + pad % 16;
    view = head_major ? head_major_view(base, num_blocks, heads, block_size, dim, block, inner)
                      : token_major_view(base, num_blocks, heads, block_size, dim, block, inner);
  }
  uint8_t* bytes() { return reinterpret_cast<uint8_t*>(storage.data()); }

  uint8_t* codes(bool value, int64_t slot, int head) {
    const int64_t block = slot / view.block_size, token = slot % view.block_size;
    return view.base + block * view.block_stride + (value ? view.v_codes : view.k_codes) +
           token * view.code_token_stride + static_cast<int64_t>(head) * view.code_head_stride;
  }
  float* norm(bool value, int64_t slot, int head) {
    const int64_t block = slot / view.block_size, token = slot % view.block_size;
    return reinterpret_cast<float*>(
        view.base + block * view.block_stride + (value ? view.v_norms : view.k_norms) +
        token * view.norm_token_stride + static_cast<int64_t>(head) * view.norm_head_stride);
  }
};

}  // namespace tq4::test
