// What the bindings share: reading tensors through the LibTorch stable ABI, and the few checks that
// memory safety needs.  Everything else (dtypes that make sense, finite scales, helpful hints) is
// checked once in tq4/checks.py, before this library is called.
//
// Every failed check throws std::invalid_argument, which Python sees as a ValueError.  Nothing here
// synchronises with the device.
#pragma once
// Torch's headers do not compile silently with -Wextra.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#pragma GCC diagnostic pop

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "../params.h"

namespace tq4::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Makes the device of `tensor` (CUDA, or ValueError) current for its lifetime, and gives the stream
// that torch currently uses there.
class DeviceScope {
 public:
  DeviceScope(const Tensor& tensor, const char* name);
  int32_t device() const { return device_; }
  Stream stream() const { return stream_; }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_;
};

[[noreturn]] void fail(const char* name, const std::string& expected, const std::string& got);

// The tensor is on the device, has the dtype and the rank.
void check_tensor(const DeviceScope& scope, const Tensor& tensor, const char* name,
                  ScalarType dtype, int64_t rank);
// ... and the sizes; -1 stands for any.
void check_sizes(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes);
// Elements of the last dimension are neighbours.
void check_rows(const Tensor& tensor, const char* name);
void check_contiguous(const Tensor& tensor, const char* name);

// fp16, bf16 or fp32 as DType.
DType float_dtype(const Tensor& tensor, const char* name);

// [tokens, heads, head_dim] with neighbouring elements in the last dimension.
void check_vectors(const DeviceScope& scope, const Tensor& tensor, const char* name,
                   ScalarType dtype);

// fp32 [count], contiguous.
const float* float_table(const DeviceScope& scope, const Tensor& tensor, const char* name,
                         int64_t count);
// fp32 [D, D], contiguous; null for none.
const float* rotation(const DeviceScope& scope, const OptionalTensor& tensor, const char* name,
                      int64_t head_dim);
// The same or, then `signs` is set, fp32 [D]: the signs of a Hadamard rotation.
const float* rotation(const DeviceScope& scope, const OptionalTensor& tensor, const char* name,
                      int64_t head_dim, bool& signs);
// int32 [count], contiguous.
const int32_t* index_vector(const DeviceScope& scope, const Tensor& tensor, const char* name,
                            int64_t count);

// uint8, 3-D token-major or 4-D head-major.
PageView page_view(const DeviceScope& scope, const Tensor& cache, int64_t num_kv_heads,
                   int64_t head_dim);

struct BlockTable {
  const int32_t* data;
  int64_t stride;
  int32_t num_seqs;
  int32_t max_blocks;
};
// int32 [num_seqs, max_blocks].
BlockTable block_table(const DeviceScope& scope, const Tensor& tensor);

// A size or count as int32, or ValueError.
int32_t narrow(int64_t value, const char* name);

inline const void* data(const Tensor& tensor) { return tensor.const_data_ptr(); }
inline void* mutable_data(const Tensor& tensor) { return tensor.mutable_data_ptr(); }

}  // namespace tq4::ops
