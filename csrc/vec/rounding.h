// How float values become 16 bits, or 16 and 16, in whole lanes: nearest, split, by chance.
//
// Written once on the 32-bit integers that belong to a value type; reference.py has the same.
#pragma once

#include "vec/scalar.h"

namespace flatstep {

template <class V>
using BitsOf = typename Lanes<V>::Bits;

template <class V>
FLATSTEP_INLINE BitsOf<V> all_bits(std::uint32_t bits) {
  return Lanes<V>::all_bits(bits);
}

// To the nearest bfloat16, ties to even, in the lower half of each lane.
template <class V>
FLATSTEP_INLINE BitsOf<V> round_to_bfloat16(V x) {
  const auto bits = bits_of(x);
  const auto odd = shift_right<16>(bits) & all_bits<V>(1);
  const auto rounded = bits + all_bits<V>(0x7fff) + odd;
  return shift_right<16>(where_nan(x, all_bits<V>(std::uint32_t{kBFloat16NaN} << 16), rounded));
}

// Up with a probability of what lies below the last bit, else down; random: 16 bits of it.
template <class V>
FLATSTEP_INLINE BitsOf<V> round_by_chance(V x, BitsOf<V> random) {
  const auto rounded = bits_of(x) + random;
  return shift_right<16>(where_nan(x, all_bits<V>(std::uint32_t{kBFloat16NaN} << 16), rounded));
}

// 16 random bits for each number: an integer hash (lowbias32, C. Wellons, 2018), keyed twice.
template <class V>
FLATSTEP_INLINE BitsOf<V> random_of(BitsOf<V> number, const std::uint32_t (&keys)[2]) {
  auto x = number ^ all_bits<V>(keys[0]);
  x = (x ^ shift_right<16>(x)) * all_bits<V>(0x7feb352dU);
  x = x ^ shift_right<15>(x) ^ all_bits<V>(keys[1]);
  return shift_right<16>(x * all_bits<V>(0x846ca68bU));
}

template <class Bits>
struct Split {
  Bits high;  // the nearest bfloat16, in the lower half of each lane
  Bits all;   // of the value that the two halves stand for
};

// The nearest bfloat16, and the lower half of all bits: as a signed number, how far the value is
// from it. An even upper half and a lower one of exactly a half would take one number more than
// there are (an even bfloat16 is the nearest to 65,537 values): it becomes the next value towards
// zero.
template <class V>
FLATSTEP_INLINE Split<BitsOf<V>> split(V x) {
  auto bits = where_nan(x, all_bits<V>(std::uint32_t{kBFloat16NaN} << 16), bits_of(x));
  bits = bits + equal(bits & all_bits<V>(0x1ffff), all_bits<V>(0x8000));
  return {shift_right<16>(bits + all_bits<V>(0x8000)), bits};
}

// offset: the lower half, its sign extended.
template <class V>
FLATSTEP_INLINE V join(BitsOf<V> high, BitsOf<V> offset) {
  return float_of(shift_left<16>(high) + offset);
}

}  // namespace flatstep
