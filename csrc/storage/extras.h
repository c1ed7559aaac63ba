// What a pass over memory does beside the rule, and the numbers and arrays that it takes.
#pragma once

#include <cstdint>

#include "rules/arithmetic.h"
#include "storage/storage.h"

namespace flatstep {

// Bits of a group's variant, above the rule's flags.
enum Extra : unsigned {
  kMasterCopy = 1U << 8,   // the weight is a float32 array, of which the parameter is the rounding
  kMasterSplit = 1U << 9,  // the weight is the bfloat16 parameter with 16 more bits
  kStochastic = 1U << 10,  // the bfloat16 parameter is rounded up or down by chance
  kAverage = 1U << 11,     // an exponential moving average of the weights is kept
  kWritesGrad = 1U << 12,  // the gradient is stored back without its loss scale
};
inline constexpr unsigned kFlagMask = (1U << 8) - 1;
inline constexpr unsigned kMaster = kMasterCopy | kMasterSplit;
inline constexpr unsigned kExtraMask = kMaster | kStochastic | kAverage | kWritesGrad;

// How the master lies in memory, where there is one, and the average.
FLATSTEP_INLINE constexpr Stored master_type(unsigned extras) {
  return extras & kMasterCopy ? Stored::kFloat32 : Stored::kInt16;
}
FLATSTEP_INLINE constexpr Stored average_type(Stored param) {
  return param == Stored::kFloat64 ? Stored::kFloat64 : Stored::kFloat32;
}

struct ExtraNumbers {
  double unscale;               // the factor of the gradient that is stored back
  Lerp average;                 // from the average to the weight
  std::uint32_t chance_key[2];  // of this seed and step
};

// The function of splitmix64 (Steele, Lea and Flood, 2014) that spreads bits over the whole word.
FLATSTEP_INLINE std::uint64_t spread(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

FLATSTEP_INLINE ExtraNumbers prepare_extras(double unscale, double average_decay,
                                            std::uint64_t seed, std::int64_t step) {
  const std::uint64_t key = spread(spread(seed) + static_cast<std::uint64_t>(step));
  return {unscale,
          prepare_lerp(1 - average_decay),
          {static_cast<std::uint32_t>(key), static_cast<std::uint32_t>(key >> 32)}};
}

}  // namespace flatstep
