// Which head dimension each MMA fragment element stands for, in store and gather.
//
// Both kernels multiply 16-row tiles by a [D, D] rotation with mma.m16n8k16.  The k index and the
// column index of that product may be permuted at will, so they are chosen for memory.  With
//     dim = quarter * D/4 + group * 8 + e          quarter 0..3, group 0..D/32 - 1, e 0..7
// (8 dims are 16 bytes of fp16 or one 32-bit word of codes; a quarter is D/8 bytes of codes):
//
//   store   k        step 2 group + s: quarters 2s and 2s + 1 of the group: two chunks of 16 bytes,
//                    which is what ldmatrix wants
//   both    codes    lane t of a row's four lanes owns quarter t.  As columns of store, tile
//                    4 group + e/2: the lane accumulates whole words of codes, D/8 consecutive
//                    bytes, without shuffles.  As k of gather, step = tile / 2.
//   gather  columns  tile 4 c + e/2: lane t owns chunk t of each 64 bytes of fp16 output
//
// In store a group of 32 dims (the same e and all quarters) is the same set of dims on both sides.
// That is what makes two shortcuts possible: the identity is block diagonal over groups, and a
// Hadamard matrix factors into H_32 inside groups and H_(D/32) across groups, which are registers
// of one lane.
#pragma once
#include <cstdint>

#include "common.cuh"

namespace tq4 {

template <int D>
struct FragmentMap {
  static_assert(D % 32 == 0, "four quarters of whole words");
  static constexpr int kQuarter = D / 4;
  static constexpr int kQuarterBytes = D / 8;  // of codes
  static constexpr int kGroups = D / 32;
  static constexpr int kSteps = D / 16;
  static constexpr int kTiles = D / 8;
  // D = 256 is produced in two passes of 4 groups, so that the accumulators fit in registers.
  static constexpr int kPasses = D == 256 ? 2 : 1;
  static constexpr int kPassGroups = kGroups / kPasses;
  static constexpr int kPassTiles = kTiles / kPasses;

  // Fragment elements (PTX ISA, mma.m16n8k16): k = 8 high + 2 t + odd; column = 2 t + odd.
  TQ4_HOST_DEVICE static constexpr int input_dim(int step, int high, int t, int odd) {
    return (step % 2 * 2 + high) * kQuarter + step / 2 * 8 + 2 * t + odd;
  }
  TQ4_HOST_DEVICE static constexpr int code_dim(int tile, int t, int odd) {
    return t * kQuarter + tile * 2 + odd;
  }
  TQ4_HOST_DEVICE static constexpr int output_dim(int tile, int t, int odd) {
    return tile / 4 * 32 + t * 8 + tile % 4 * 2 + odd;
  }
};

}  // namespace tq4
