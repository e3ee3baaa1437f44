// ldmatrix without transposition (PTX ISA: ldmatrix.sync.aligned.m8n8.x4).
#pragma once
#include <cstdint>

namespace tq4::ptx {

// Four 8x8 b16 matrices: lane l supplies the address of row l % 8 of matrix l / 8, and receives
// elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

}  // namespace tq4::ptx
