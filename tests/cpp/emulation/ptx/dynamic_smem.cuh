// CPU version of csrc/ptx/dynamic_smem.cuh: in smem.cuh.
#pragma once
#include "smem.cuh"
