// The value types float and double as the rules see them: one lane, and the contract every
// other value type keeps.
//
// A value type V offers + - * /, root, select, maximum and snap, each lane rounded on its own as
// IEEE 754 asks, and Lanes<V>: how many there are, and how they enter and leave memory. One of
// floats has a type of 32-bit integers beside it, Lanes<V>::Bits, with + - * & | ^, shifts, equal
// (all ones where it is true) and where_nan.
#pragma once

#include <cmath>
#include <cstdint>

#include "storage/storage.h"

namespace flatstep {

FLATSTEP_INLINE float root(float x) { return std::sqrt(x); }
FLATSTEP_INLINE double root(double x) { return std::sqrt(x); }

// a where side is not zero, else b.
FLATSTEP_INLINE float select(float side, float a, float b) { return side != 0 ? a : b; }
FLATSTEP_INLINE double select(double side, double a, double b) { return side != 0 ? a : b; }

// The larger one; NaN when either is NaN; b when they compare equal.
FLATSTEP_INLINE float maximum(float a, float b) { return a > b || a != a ? a : b; }
FLATSTEP_INLINE double maximum(double a, double b) { return a > b || a != a ? a : b; }

// Zero in place of a subnormal: such a state would never reach zero and slows every step.
FLATSTEP_INLINE float snap(float x) { return (bits_of(x) & 0x7fffffffU) < 0x00800000U ? 0.0F : x; }
FLATSTEP_INLINE double snap(double x) {
  return (bits_of(x) & 0x7fffffffffffffffULL) < 0x0010000000000000ULL ? 0.0 : x;
}

template <int kBits>
FLATSTEP_INLINE std::uint32_t shift_left(std::uint32_t x) {
  return x << kBits;
}
template <int kBits>
FLATSTEP_INLINE std::uint32_t shift_right(std::uint32_t x) {
  return x >> kBits;
}
FLATSTEP_INLINE std::uint32_t equal(std::uint32_t a, std::uint32_t b) {
  return a == b ? 0xffffffffU : 0;
}
FLATSTEP_INLINE std::uint32_t where_nan(float x, std::uint32_t then, std::uint32_t otherwise) {
  return x != x ? then : otherwise;
}

template <class V>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr int kCount = 1;
  template <class Stored>
  FLATSTEP_INLINE static float load(const Stored* from) {
    return widen(*from);
  }
  template <class Stored>
  FLATSTEP_INLINE static void store(Stored* to, float x) {
    narrow(to, x);
  }
  FLATSTEP_INLINE static float all(float x) { return x; }

  using Bits = std::uint32_t;
  FLATSTEP_INLINE static Bits load_halves(const std::uint16_t* from) { return *from; }
  // With their signs extended.
  FLATSTEP_INLINE static Bits load_offsets(const std::uint16_t* from) {
    return static_cast<Bits>(static_cast<std::int16_t>(*from));
  }
  // The lower half of each lane.
  FLATSTEP_INLINE static void store_halves(std::uint16_t* to, Bits x) {
    *to = static_cast<std::uint16_t>(x);
  }
  FLATSTEP_INLINE static Bits all_bits(std::uint32_t x) { return x; }
  FLATSTEP_INLINE static Bits count_up() { return 0; }
};

template <>
struct Lanes<double> {
  static constexpr int kCount = 1;
  FLATSTEP_INLINE static double load(const double* from) { return *from; }
  template <class Stored>
  FLATSTEP_INLINE static double load(const Stored* from) {
    return static_cast<double>(widen(*from));
  }
  FLATSTEP_INLINE static void store(double* to, double x) { *to = x; }
  FLATSTEP_INLINE static double all(double x) { return x; }
};

}  // namespace flatstep
