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
  Bits high, low;
};

// The nearest bfloat16 and the lower half of the bits, which tell together what x was. An odd upper
// half with a lower one of exactly a half has no code left (an even bfloat16 is the nearest to
// 65,537 values): it becomes the next value away from zero.
template <class V>
FLATSTEP_INLINE Split<BitsOf<V>> split(V x) {
  auto bits = where_nan(x, all_bits<V>(std::uint32_t{kBFloat16NaN} << 16), bits_of(x));
  bits = bits - equal(bits & all_bits<V>(0x1ffff), all_bits<V>(0x18000));
  const auto odd = shift_right<16>(bits) & all_bits<V>(1);
  return {shift_right<16>(bits + all_bits<V>(0x7fff) + odd), bits & all_bits<V>(0xffff)};
}

template <class V>
FLATSTEP_INLINE V join(BitsOf<V> high, BitsOf<V> low) {
  const auto rounded_up = shift_right<16>(low + all_bits<V>(0x7fff));
  return float_of(shift_left<16>(high - rounded_up) | low);
}

}  // namespace flatstep
