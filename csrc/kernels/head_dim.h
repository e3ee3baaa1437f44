// From a head dimension known at run time to one known at compile time.
#pragma once
#include <stdexcept>
#include <string>
#include <type_traits>

namespace tq4 {

// Calls function(std::integral_constant<int, D>) and returns what it returns.
template <typename Function>
auto dispatch_head_dim(int head_dim, Function&& function) {
  switch (head_dim) {
    case 64:
      return function(std::integral_constant<int, 64>{});
    case 96:
      return function(std::integral_constant<int, 96>{});
    case 128:
      return function(std::integral_constant<int, 128>{});
    case 256:
      return function(std::integral_constant<int, 256>{});
    default:
      throw std::invalid_argument("head_dim: expected 64, 96, 128 or 256, got " +
                                  std::to_string(head_dim));
  }
}

}  // namespace tq4
