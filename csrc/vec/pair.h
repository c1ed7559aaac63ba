// Two vectors as one value: the even and the odd elements of arrays that are all bfloat16.
//
// A 32-bit lane holds two neighbours; a shift brings out the even one and a mask the odd one, where
// widening in order would have to move lanes. The order does not matter to element-wise rules.
#pragma once

#include "vec/scalar.h"

namespace flatstep {

template <class V>
struct Pair {
  V even, odd;
};

template <class V>
FLATSTEP_INLINE Pair<V> operator+(Pair<V> a, Pair<V> b) {
  return {a.even + b.even, a.odd + b.odd};
}
template <class V>
FLATSTEP_INLINE Pair<V> operator-(Pair<V> a, Pair<V> b) {
  return {a.even - b.even, a.odd - b.odd};
}
template <class V>
FLATSTEP_INLINE Pair<V> operator*(Pair<V> a, Pair<V> b) {
  return {a.even * b.even, a.odd * b.odd};
}
template <class V>
FLATSTEP_INLINE Pair<V> operator/(Pair<V> a, Pair<V> b) {
  return {a.even / b.even, a.odd / b.odd};
}
template <class V>
FLATSTEP_INLINE Pair<V> operator&(Pair<V> a, Pair<V> b) {
  return {a.even & b.even, a.odd & b.odd};
}
template <class V>
FLATSTEP_INLINE Pair<V> operator|(Pair<V> a, Pair<V> b) {
  return {a.even | b.even, a.odd | b.odd};
}
template <class V>
FLATSTEP_INLINE Pair<V> operator^(Pair<V> a, Pair<V> b) {
  return {a.even ^ b.even, a.odd ^ b.odd};
}
template <int kBits, class V>
FLATSTEP_INLINE Pair<V> shift_left(Pair<V> a) {
  return {shift_left<kBits>(a.even), shift_left<kBits>(a.odd)};
}
template <int kBits, class V>
FLATSTEP_INLINE Pair<V> shift_right(Pair<V> a) {
  return {shift_right<kBits>(a.even), shift_right<kBits>(a.odd)};
}
template <class V>
FLATSTEP_INLINE Pair<V> equal(Pair<V> a, Pair<V> b) {
  return {equal(a.even, b.even), equal(a.odd, b.odd)};
}
template <class V>
FLATSTEP_INLINE auto bits_of(Pair<V> a) {
  return Pair<typename Lanes<V>::Bits>{bits_of(a.even), bits_of(a.odd)};
}
template <class Bits>
FLATSTEP_INLINE auto float_of(Pair<Bits> a) {
  return Pair<decltype(float_of(a.even))>{float_of(a.even), float_of(a.odd)};
}
template <class V, class Bits>
FLATSTEP_INLINE Pair<Bits> where_nan(Pair<V> a, Pair<Bits> then, Pair<Bits> otherwise) {
  return {where_nan(a.even, then.even, otherwise.even), where_nan(a.odd, then.odd, otherwise.odd)};
}
template <class V>
FLATSTEP_INLINE Pair<V> root(Pair<V> a) {
  return {root(a.even), root(a.odd)};
}
template <class V>
FLATSTEP_INLINE Pair<V> select(Pair<V> side, Pair<V> a, Pair<V> b) {
  return {select(side.even, a.even, b.even), select(side.odd, a.odd, b.odd)};
}
template <class V>
FLATSTEP_INLINE Pair<V> maximum(Pair<V> a, Pair<V> b) {
  return {maximum(a.even, b.even), maximum(a.odd, b.odd)};
}
template <class V>
FLATSTEP_INLINE Pair<V> snap(Pair<V> a) {
  return {snap(a.even), snap(a.odd)};
}

template <class V>
struct Lanes<Pair<V>> {
  static constexpr int kCount = 2 * Lanes<V>::kCount;
  FLATSTEP_INLINE static Pair<V> load(const BFloat16* from) {
    Pair<V> pair;
    Lanes<V>::load(from, pair.even, pair.odd);
    return pair;
  }
  FLATSTEP_INLINE static void store(BFloat16* to, Pair<V> pair) {
    Lanes<V>::store(to, pair.even, pair.odd);
  }
  FLATSTEP_INLINE static Pair<V> all(float x) { return {Lanes<V>::all(x), Lanes<V>::all(x)}; }

  using Half = typename Lanes<V>::Bits;
  using Bits = Pair<Half>;
  FLATSTEP_INLINE static Bits load_halves(const std::uint16_t* from) {
    const Half both = Lanes<V>::load_bits(from);
    return {both & Lanes<V>::all_bits(0xffff), shift_right<16>(both)};
  }
  FLATSTEP_INLINE static Bits load_offsets(const std::uint16_t* from) {
    const Half both = Lanes<V>::load_bits(from);
    return {shift_right_signed<16>(shift_left<16>(both)), shift_right_signed<16>(both)};
  }
  FLATSTEP_INLINE static void store_halves(std::uint16_t* to, Bits a) {
    Lanes<V>::store_bits(to, (a.even & Lanes<V>::all_bits(0xffff)) | shift_left<16>(a.odd));
  }
  FLATSTEP_INLINE static Bits all_bits(std::uint32_t x) {
    return {Lanes<V>::all_bits(x), Lanes<V>::all_bits(x)};
  }
  FLATSTEP_INLINE static Bits count_up() {
    const Half even = shift_left<1>(Lanes<V>::count_up());
    return {even, even | Lanes<V>::all_bits(1)};
  }
};

}  // namespace flatstep
