#include "binding.h"

#include <limits>
#include <stdexcept>
#include <string>

#include "../layout.h"

// Lives in libtorch_cuda.so.  Weak, so that a CPU-only torch can load this library too (and then
// never calls it: there are no CUDA tensors).
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace tq4::ops {
namespace {

int32_t cuda_device(const Tensor& tensor, const char* name) {
  if (!tensor.is_cuda()) fail(name, "a CUDA tensor", "a tensor of another device");
  return tensor.get_device_index();
}

Stream current_stream(int32_t device) {
  if (aoti_torch_get_current_cuda_stream == nullptr) {
    throw std::runtime_error("tq4: this torch has no CUDA");
  }
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream) != 0) {
    throw std::runtime_error("tq4: torch gave no current CUDA stream");
  }
  return static_cast<Stream>(stream);
}

std::string sizes_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + "]";
}

std::string strides_of(const Tensor& tensor) {
  std::string text = "strides [";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i ? ", " : "") + std::to_string(tensor.stride(i));
  }
  return text + "]";
}

}  // namespace

void fail(const char* name, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(std::string(name) + ": expected " + expected + ", got " + got);
}

DeviceScope::DeviceScope(const Tensor& tensor, const char* name)
    : device_(cuda_device(tensor, name)), guard_(device_), stream_(current_stream(device_)) {}

void check_tensor(const DeviceScope& scope, const Tensor& tensor, const char* name,
                  ScalarType dtype, int64_t rank) {
  if (cuda_device(tensor, name) != scope.device()) {
    fail(name, "CUDA device " + std::to_string(scope.device()),
         "device " + std::to_string(tensor.get_device_index()));
  }
  if (tensor.scalar_type() != dtype) {
    fail(name, std::string("dtype ") + torch::headeronly::toString(dtype),
         torch::headeronly::toString(tensor.scalar_type()));
  }
  if (tensor.dim() != rank) {
    fail(name, std::to_string(rank) + " dimensions", "shape " + sizes_of(tensor));
  }
}

void check_sizes(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  std::string expected = "shape [";
  for (const int64_t size : sizes) {
    same = same && (size < 0 || tensor.size(i) == size);
    expected += (i++ ? ", " : "") + (size < 0 ? std::string("any") : std::to_string(size));
  }
  if (!same) fail(name, expected + "]", sizes_of(tensor));
}

void check_rows(const Tensor& tensor, const char* name) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.size(last) > 1 && tensor.stride(last) != 1) {
    fail(name, "a contiguous last dimension", strides_of(tensor));
  }
}

void check_contiguous(const Tensor& tensor, const char* name) {
  if (!tensor.is_contiguous()) fail(name, "a contiguous tensor", strides_of(tensor));
}

DType float_dtype(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Float:
      return DType::kFloat32;
    default:
      fail(name, "dtype Half, BFloat16 or Float",
           torch::headeronly::toString(tensor.scalar_type()));
  }
}

void check_vectors(const DeviceScope& scope, const Tensor& tensor, const char* name,
                   ScalarType dtype) {
  check_tensor(scope, tensor, name, dtype, 3);
  check_rows(tensor, name);
  if (!is_supported_head_dim(tensor.size(2))) {
    fail(name, "a head_dim of 64, 96, 128 or 256", std::to_string(tensor.size(2)));
  }
  if (tensor.size(1) < 1) fail(name, "at least one head", "shape " + sizes_of(tensor));
}

const float* float_table(const DeviceScope& scope, const Tensor& tensor, const char* name,
                         int64_t count) {
  check_tensor(scope, tensor, name, ScalarType::Float, 1);
  check_sizes(tensor, name, {count});
  check_contiguous(tensor, name);
  return static_cast<const float*>(data(tensor));
}

const float* rotation(const DeviceScope& scope, const OptionalTensor& tensor, const char* name,
                      int64_t head_dim) {
  if (!tensor.has_value()) return nullptr;
  check_tensor(scope, *tensor, name, ScalarType::Float, 2);
  check_sizes(*tensor, name, {head_dim, head_dim});
  check_contiguous(*tensor, name);
  const void* p = data(*tensor);
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) {
    fail(name, "memory aligned to 16 bytes", "an unaligned view");
  }
  return static_cast<const float*>(p);
}

const float* rotation(const DeviceScope& scope, const OptionalTensor& tensor, const char* name,
                      int64_t head_dim, bool& signs) {
  signs = tensor.has_value() && tensor->dim() == 1;
  if (!signs) return rotation(scope, tensor, name, head_dim);
  if ((head_dim & (head_dim - 1)) != 0) {
    fail(name, "a matrix: there is no Hadamard rotation of this head_dim",
         std::to_string(head_dim) + " signs");
  }
  const float* p = float_table(scope, *tensor, name, head_dim);
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) {
    fail(name, "memory aligned to 16 bytes", "an unaligned view");
  }
  return p;
}

const int32_t* index_vector(const DeviceScope& scope, const Tensor& tensor, const char* name,
                            int64_t count) {
  check_tensor(scope, tensor, name, ScalarType::Int, 1);
  check_sizes(tensor, name, {count});
  check_contiguous(tensor, name);
  return static_cast<const int32_t*>(data(tensor));
}

PageView page_view(const DeviceScope& scope, const Tensor& cache, int64_t num_kv_heads,
                   int64_t head_dim) {
  const bool token_major = cache.dim() == 3;
  check_tensor(scope, cache, "cache", ScalarType::Byte, token_major ? 3 : 4);
  check_rows(cache, "cache");
  const int64_t num_blocks = cache.size(0);
  const int64_t block_size = cache.size(token_major ? 1 : 2);
  // Strides of dimensions of size one are arbitrary and unused: replaced by the packed ones.
  int64_t inner, extent;  // bytes between rows (token-major) or heads (head-major), and of a block
  if (token_major) {
    const int64_t used = token_bytes(num_kv_heads, head_dim);
    inner = cache.stride(1);
    if (cache.size(2) < used || inner < used) {
      fail("cache", "rows of at least " + std::to_string(used) + " bytes",
           sizes_of(cache) + ", " + strides_of(cache));
    }
    extent = block_size * inner;
  } else {
    check_sizes(cache, "cache", {-1, num_kv_heads, -1, vector_bytes(head_dim)});
    const int64_t packed = head_page_bytes(block_size, head_dim);
    inner = num_kv_heads > 1 ? cache.stride(1) : packed;
    if (cache.stride(2) != vector_bytes(head_dim) || inner < packed) {
      fail("cache", "contiguous (block, head) pages", strides_of(cache));
    }
    extent = num_kv_heads * inner;
  }
  const int64_t block_stride = num_blocks > 1 ? cache.stride(0) : extent;
  uint8_t* base = static_cast<uint8_t*>(mutable_data(cache));
  if (block_size <= 0 || block_size % kBlockSizeMultiple != 0) {
    fail("cache", "a block_size that is a multiple of " + std::to_string(kBlockSizeMultiple),
         std::to_string(block_size));
  }
  if (reinterpret_cast<uintptr_t>(base) % kCacheAlignment != 0 || inner % kCacheAlignment != 0 ||
      block_stride % kCacheAlignment != 0) {
    fail("cache", "address and strides that are multiples of " + std::to_string(kCacheAlignment),
         strides_of(cache));
  }
  if (extent > std::numeric_limits<int32_t>::max()) {
    fail("cache", "blocks of less than 2^31 bytes", strides_of(cache));
  }
  narrow(num_blocks, "cache");
  return token_major ? token_major_view(base, num_blocks, num_kv_heads, block_size, head_dim,
                                        block_stride, inner)
                     : head_major_view(base, num_blocks, num_kv_heads, block_size, head_dim,
                                       block_stride, inner);
}

BlockTable block_table(const DeviceScope& scope, const Tensor& tensor) {
  check_tensor(scope, tensor, "block_table", ScalarType::Int, 2);
  check_rows(tensor, "block_table");
  return {static_cast<const int32_t*>(data(tensor)), tensor.stride(0),
          narrow(tensor.size(0), "block_table"), narrow(tensor.size(1), "block_table")};
}

int32_t narrow(int64_t value, const char* name) {
  if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max()) {
    fail(name, "sizes below 2^31", std::to_string(value));
  }
  return static_cast<int32_t>(value);
}

}  // namespace tq4::ops
