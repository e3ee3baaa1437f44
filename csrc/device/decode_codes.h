// The key codebook of decode as two INT8 terms.  Host-compilable.
//
// One INT8 code is up to half a unit off its centroid: 0.3 % of a score for the Gaussian codebook.
// So a centroid is a code and a rest,
//
//   centroid / unit = code + rest / 128        unit = max|centroid| / 126, |rest| <= 64
//
// right to 1/256 of the unit: 5e-5 of a score, less than rounding to fp16 costs.
//
// Lookup.  A byte permute replicates the sign of the byte it selects when the selector's top bit is
// set (PTX ISA: prmt, default mode).  With the 16 entries in two halves, low for codes 0-7 and high
// for 8-15, and w the word of codes,
//
//   prmt(low, w)               low[i]         where the code is i < 8, else sign(low[i - 8])
//   prmt(high, w ^ 0x8888...)  high[i - 8]    where the code is i >= 8, else sign(high[i])
//
// (sign is 0 or -1), and their sum is what entry i stands for if low and high are chosen as
// split_pair does.  The tensor core does the sum: two MMAs into the same accumulator.  8 codes take
// 4 permutes instead of 8, and none of the selector arithmetic of unpack_int8; tensor time is not
// short here.
#pragma once
#include <cmath>
#include <cstdint>

#include "common.cuh"

namespace tq4 {

constexpr int kKeyRestUnits = 128;  // rest units of one code unit
// Entries of a split table.  126, not 127: one more must fit in a byte.
constexpr int kLargestSplit = 126;

struct SplitPair {
  int8_t low, high;
};

// low + sign(high) = a and high + sign(low) = b, for |a|, |b| <= kLargestSplit.
TQ4_HOST_DEVICE SplitPair split_pair(int a, int b) {
  int low = a, high = b;
  if (a < 0 && b >= -1) {
    high = b + 1;
  } else if (a >= -1 && b < 0) {
    low = a + 1;
  } else if (a < 0 && b < 0) {
    low = a + 1;
    high = b + 1;
  }
  return {static_cast<int8_t>(low), static_cast<int8_t>(high)};
}

// The value of one unit of the codes.  What is not finite stays so, and gets into every score.
TQ4_HOST_DEVICE float key_unit(float largest) {
  return largest == 0.f ? 1.f : largest / static_cast<float>(kLargestSplit);
}

struct KeyTerms {
  int code, rest;
};

// `ratio`: centroid / unit.
TQ4_HOST_DEVICE KeyTerms key_terms(float ratio) {
  if (!(fabsf(ratio) < kLargestSplit + 0.5f)) ratio = 0.f;  // the unit is not finite
  const float code = floorf(ratio + 0.5f);
  const float rest = floorf((ratio - code) * kKeyRestUnits + 0.5f);
  return {static_cast<int>(code), static_cast<int>(rest)};
}

}  // namespace tq4
