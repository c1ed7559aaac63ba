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
};

}  // namespace flatstep
