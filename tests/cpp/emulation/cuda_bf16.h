// Stands in for the toolkit's header: see cuda_cpu.h and intrinsics.h.
#pragma once
#include "intrinsics.h"
