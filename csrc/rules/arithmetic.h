// The arithmetic that rules share. reference.py has the same functions in the same order.
#pragma once

#include "vec/scalar.h"

namespace flatstep {

// base^exponent by squaring: only multiplications, so the same bits on every host and device.
FLATSTEP_INLINE double power(double base, std::int64_t exponent) {
  double result = 1;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

// torch.lerp(start, end, weight): from the nearer end, so that weight 1 gives end exactly.
struct Lerp {
  double weight, side;
};

FLATSTEP_INLINE Lerp prepare_lerp(double weight) {
  return weight < 0.5 ? Lerp{weight, 0} : Lerp{weight - 1, 1};
}

template <class V>
FLATSTEP_INLINE V lerp(V start, V end, V weight, V side) {
  return select(side, end, start) + weight * (end - start);
}

}  // namespace flatstep
