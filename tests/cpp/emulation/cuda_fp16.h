// Stands in for the toolkit's header: see cuda_cpu.h.
#pragma once
#include "cuda_cpu.h"

struct __half2 {
  uint16_t x, y;
};
inline float2 __half22float2(__half2 h) {
  return {emulation::half_to_float(h.x), emulation::half_to_float(h.y)};
}
