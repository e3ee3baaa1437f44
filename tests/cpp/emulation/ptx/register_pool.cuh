// CPU versions of csrc/ptx/register_pool.cuh.
#pragma once
#include "../cuda_cpu.h"

namespace tq4::ptx {

template <int kRegisters>
void take_registers() {
  emulation::exchange(emulation::kRegisters, 0);
}
template <int kRegisters>
void give_registers() {
  emulation::exchange(emulation::kRegisters, 0);
}

}  // namespace tq4::ptx
