// The INT8 key codebook of decode, to the accuracy of fp32.  Host-compilable.
//
// An int8 code is up to half a unit off its centroid: 0.3 % of a score for the Gaussian codebook,
// which would be most of what is left once q has its residual.  So keys have one too,
//
//   centroid / scale = code + rest / 64         |rest| <= 126
//
// and q . k is two integer products.  64 rather than 256 leaves the rest room to make good for a
// code of +-127, which the lookup below cannot hold.
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
#include <cstdint>

#include "common.cuh"

namespace tq4 {

constexpr int kKeyRestUnits = 64;  // rest units of one code unit
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

struct KeyParts {
  int code, rest;
};

// `ratio`: centroid / scale; not finite where the caller has no centroids, and then rest is what
// the code itself lacks.
TQ4_HOST_DEVICE KeyParts key_parts(int code, float ratio) {
  const auto clamp = [](float x) {
    const float limit = static_cast<float>(kLargestSplit);
    return x > limit ? limit : x < -limit ? -limit : x;
  };
  KeyParts parts;
  parts.code = static_cast<int>(clamp(static_cast<float>(code)));
  if (!(ratio - ratio == 0.f)) ratio = static_cast<float>(code);
  const float rest = clamp((ratio - static_cast<float>(parts.code)) * kKeyRestUnits);
  parts.rest = static_cast<int>(rest < 0.f ? rest - 0.5f : rest + 0.5f);
  return parts;
}

}  // namespace tq4
