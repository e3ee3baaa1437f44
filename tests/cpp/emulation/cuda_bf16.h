// Stands in for the toolkit's header: see cuda_cpu.h.
#pragma once
