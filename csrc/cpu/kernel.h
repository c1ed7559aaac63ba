// The loop over arrays of known types: loads, one rule's update, stores.
//
// It knows no optimizer. A Target names the value types; it lives in an unnamed namespace of its
// file, so that no symbol of one instruction set can stand in for another's when the linker merges
// duplicates.
#pragma once

#include <type_traits>

#include "cpu/isa.h"

namespace flatstep {

template <class T, class IfFloat, class IfDouble>
using PerType = std::conditional_t<std::is_same_v<T, float>, IfFloat, IfDouble>;

// How far ahead of its use a cache line is asked for: the hardware's own prefetchers lose track
// of seven streams.
inline constexpr std::int64_t kPrefetchBytes = 512;

FLATSTEP_INLINE void prefetch(const void* at) {
  __builtin_prefetch(static_cast<const char*>(at) + kPrefetchBytes);
}

// Rounded once from the host's double, then the same in every lane.
template <class Rule, class V, class T>
FLATSTEP_INLINE typename Rule::template Scalars<V> round_scalars(const double* prepared) {
  typename Rule::template Scalars<V> k;
  V values[sizeof k / sizeof(V)];
  int next = 0;
  for (V& value : values) value = Lanes<V>::all(static_cast<T>(prepared[next++]));
  __builtin_memcpy(&k, values, sizeof k);
  return k;
}

template <class Target, class Rule, unsigned kFlags, class Layout>
struct Loop {
  using P = typename Layout::Param;
  using G = typename Layout::Grad;
  using S = typename Layout::State;
  using T = typename Layout::Compute;
  using V = std::conditional_t<std::is_same_v<Layout, AllBFloat16>, typename Target::AllBFloat16,
                               typename Target::template Value<T>>;
  using Scalars = typename Rule::template Scalars<V>;

  static constexpr int kLanes = Lanes<V>::kCount;
  // A block is a cache line of floats; one lane is left to the compiler to vectorise.
  static constexpr int kBlock = kLanes == 1 ? 1 : (kLanes < 16 ? 16 : kLanes);
  static constexpr int kStates = Rule::kStateCount;

  static constexpr bool uses(int state) { return Rule::uses(kFlags, state); }

  FLATSTEP_INLINE static void update(P* p, const G* g, S* const* s, std::int64_t at,
                                     const Scalars& k) {
    V param = Lanes<V>::load(p + at);
    V state[kStates];
    for (int i = 0; i < kStates; ++i) {
      if (uses(i)) state[i] = Lanes<V>::load(s[i] + at);
    }
    Rule::template update<kFlags, V>(param, Lanes<V>::load(g + at), state, k);
    Lanes<V>::store(p + at, param);
    for (int i = 0; i < kStates; ++i) {
      if (uses(i)) Lanes<V>::store(s[i] + at, state[i]);
    }
  }

  // The tail is the body on a copy padded to full lanes: no other rounding, no byte outside.
  static void update_tail(P* p, const G* g, S* const* s, int count, const Scalars& k) {
    P param[kLanes] = {};
    G grad[kLanes] = {};
    S state[kStates][kLanes] = {};
    S* states[kStates];
    for (int j = 0; j < count; ++j) {
      param[j] = p[j];
      grad[j] = g[j];
    }
    for (int i = 0; i < kStates; ++i) {
      states[i] = state[i];
      for (int j = 0; uses(i) && j < count; ++j) state[i][j] = s[i][j];
    }
    update(param, grad, states, 0, k);
    for (int j = 0; j < count; ++j) p[j] = param[j];
    for (int i = 0; i < kStates; ++i) {
      for (int j = 0; uses(i) && j < count; ++j) s[i][j] = state[i][j];
    }
  }

  static void run(const Work& work, std::int64_t begin, std::int64_t end) {
    const Scalars k = round_scalars<Rule, V, T>(work.scalars);
    P* const p = static_cast<P*>(work.arrays.param);
    const G* const g = static_cast<const G*>(work.arrays.grad);
    S* s[kStates];
    for (int i = 0; i < kStates; ++i) s[i] = static_cast<S*>(work.arrays.state[i]);

    std::int64_t at = begin;
#pragma GCC ivdep
    for (; at + kBlock <= end; at += kBlock) {
      if constexpr (kBlock > 1) {
        prefetch(p + at);
        prefetch(g + at);
        for (int i = 0; i < kStates; ++i) {
          if (uses(i)) prefetch(s[i] + at);
        }
      }
      for (int j = 0; j < kBlock; j += kLanes) update(p, g, s, at + j, k);
    }
    for (; at + kLanes <= end; at += kLanes) update(p, g, s, at, k);
    if (at < end) {
      for (int i = 0; i < kStates; ++i) s[i] += uses(i) ? at : 0;
      update_tail(p + at, g + at, s, static_cast<int>(end - at), k);
    }
  }
};

}  // namespace flatstep
