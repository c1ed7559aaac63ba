// The loop for what the other one does not know: arrays of mixed types, a weight that the parameter
// is only the rounding of, chance, averages.
#pragma once

#include <cstring>

#include "cpu/kernel.h"
#include "vec/rounding.h"

namespace flatstep {

// The types and extras of a pass: looked up as it runs, at branches that always go the same way,
struct AnyForm {
  Types types;
  unsigned extras;

  explicit AnyForm(const Work& work) : types(work.types), extras(work.extras) {}
};

// or known beforehand, for those that are used most or bound by arithmetic.
template <Stored kParam, Stored kGrad, Stored kState, unsigned kExtras>
struct Form {
  static constexpr Types types = {kParam, kGrad, kState};
  static constexpr unsigned extras = kExtras;

  explicit Form(const Work&) {}
};

using KnownForms = List<Form<Stored::kFloat32, Stored::kFloat32, Stored::kFloat32, kAverage>,
                        Form<Stored::kFloat32, Stored::kBFloat16, Stored::kFloat32, 0>,
                        Form<Stored::kBFloat16, Stored::kBFloat16, Stored::kFloat32, 0>,
                        Form<Stored::kBFloat16, Stored::kBFloat16, Stored::kFloat32, kMasterCopy>,
                        Form<Stored::kBFloat16, Stored::kBFloat16, Stored::kFloat32, kMasterSplit>,
                        Form<Stored::kBFloat16, Stored::kBFloat16, Stored::kBFloat16, kMasterSplit>,
                        Form<Stored::kBFloat16, Stored::kBFloat16, Stored::kBFloat16, kStochastic>>;

template <class Target, class Rule, unsigned kFlags, class T, class V>
struct MixedLoop {
  using Scalars = typename Rule::template Scalars<V>;

  static constexpr int kLanes = Lanes<V>::kCount;
  // Of arrays that are all 16 bits wide, even and odd elements are two vectors.
  static constexpr bool kIsPair = std::is_same_v<V, typename Target::AllBFloat16> && kLanes > 1;
  // Vectors of each array at once, so that a branch is paid for once.
  static constexpr int kVectors = kLanes > 1 && !kIsPair ? 2 : 1;
  static constexpr int kStates = Rule::kStateCount;
  static constexpr bool kIsFloat = std::is_same_v<T, float> && !kIsPair;

  static constexpr bool uses(int state) { return Rule::uses(kFlags, state); }

  // The one type that a value's own load and store are left to.
  using Unconverted = std::conditional_t<kIsPair, BFloat16, T>;

  // Neighbouring elements of one array.
  template <int kCount>
  struct Values {
    V at[kCount];
  };

  // The arrays from one element on.
  struct At {
    char *param, *grad, *state[kStates], *master, *average;
    std::uint32_t number;
  };

  FLATSTEP_INLINE static auto load_halves(const char* from, int vector) {
    return Lanes<V>::load_halves(reinterpret_cast<const std::uint16_t*>(from) + vector * kLanes);
  }

  FLATSTEP_INLINE static auto load_offsets(const char* from, int vector) {
    return Lanes<V>::load_offsets(reinterpret_cast<const std::uint16_t*>(from) + vector * kLanes);
  }

  template <class Bits>
  FLATSTEP_INLINE static void store_halves(char* to, int vector, Bits halves) {
    Lanes<V>::store_halves(reinterpret_cast<std::uint16_t*>(to) + vector * kLanes, halves);
  }

  template <int kCount>
  FLATSTEP_INLINE static Values<kCount> load(Stored type, const char* from) {
    Values<kCount> x;
    if constexpr (kIsFloat) {
      if (type == Stored::kBFloat16) {
        for (int j = 0; j < kCount; ++j) x.at[j] = float_of(shift_left<16>(load_halves(from, j)));
        return x;
      }
      if (type == Stored::kFloat16) return load_all<kCount, Float16>(from);
    }
    return load_all<kCount, Unconverted>(from);
  }

  template <int kCount, class From>
  FLATSTEP_INLINE static Values<kCount> load_all(const char* from) {
    Values<kCount> x;
    const auto* const stored = reinterpret_cast<const From*>(from);
    for (int j = 0; j < kCount; ++j) x.at[j] = Lanes<V>::load(stored + j * kLanes);
    return x;
  }

  template <int kCount>
  FLATSTEP_INLINE static void store(Stored type, char* to, const Values<kCount>& x) {
    if constexpr (kIsFloat) {
      if (type == Stored::kBFloat16) {
        for (int j = 0; j < kCount; ++j) store_halves(to, j, round_to_bfloat16(x.at[j]));
        return;
      }
      if (type == Stored::kFloat16) return store_all<kCount, Float16>(to, x);
    }
    store_all<kCount, Unconverted>(to, x);
  }

  template <int kCount, class To>
  FLATSTEP_INLINE static void store_all(char* to, const Values<kCount>& x) {
    auto* const stored = reinterpret_cast<To*>(to);
    for (int j = 0; j < kCount; ++j) Lanes<V>::store(stored + j * kLanes, x.at[j]);
  }

  template <int kCount, class F>
  FLATSTEP_INLINE static Values<kCount> load_weight(const F& form, const At& at) {
    if constexpr (!std::is_same_v<T, double>) {
      if (form.extras & kMasterCopy) return load<kCount>(Stored::kFloat32, at.master);
      if (form.extras & kMasterSplit) {
        Values<kCount> weight;
        for (int j = 0; j < kCount; ++j) {
          weight.at[j] = join<V>(load_halves(at.param, j), load_offsets(at.master, j));
        }
        return weight;
      }
    }
    return load<kCount>(form.types.param, at.param);
  }

  // Stores the weight and makes it what it is from now on.
  template <int kCount, class F>
  FLATSTEP_INLINE static void store_weight(const F& form, const Work& work, const At& at,
                                           Values<kCount>& weight) {
    if constexpr (!std::is_same_v<T, double>) {
      if (form.extras & kMasterSplit) {
        for (V& x : weight.at) {
          const int j = static_cast<int>(&x - weight.at);
          const auto halves = split(x);
          store_halves(at.param, j, halves.high);
          store_halves(at.master, j, halves.all);
          x = float_of(halves.all);
        }
        return;
      }
      if (form.extras & kMasterCopy) {
        store(Stored::kFloat32, at.master, weight);
        return store(form.types.param, at.param, weight);
      }
      if (form.extras & kStochastic) {
        for (V& x : weight.at) {
          const int j = static_cast<int>(&x - weight.at);
          const auto number = at.number + static_cast<std::uint32_t>(j * kLanes);
          const auto random =
              random_of<V>(all_bits<V>(number) + Lanes<V>::count_up(), work.numbers.chance_key);
          const auto halves = round_by_chance(x, random);
          store_halves(at.param, j, halves);
          x = float_of(shift_left<16>(halves));
        }
        return;
      }
    }
    store(form.types.param, at.param, weight);
    if (kIsFloat && form.types.param != Stored::kFloat32 && form.extras & kAverage) {
      weight = load<kCount>(form.types.param, at.param);
    }
  }

  FLATSTEP_INLINE static V all(double x) { return Lanes<V>::all(static_cast<T>(x)); }

  template <int kCount, class F>
  FLATSTEP_INLINE static void update(const F& form, const Work& work, const At& at,
                                     const Scalars& k) {
    Values<kCount> weight = load_weight<kCount>(form, at);
    const Values<kCount> grad = load<kCount>(form.types.grad, at.grad);
    Values<kCount> state[kStates];
    for (int i = 0; i < kStates; ++i) {
      if (uses(i)) state[i] = load<kCount>(form.types.state, at.state[i]);
    }
    for (int j = 0; j < kCount; ++j) {
      V states[kStates];
      for (int i = 0; i < kStates; ++i) {
        if (uses(i)) states[i] = state[i].at[j];
      }
      Rule::template update<kFlags, V>(weight.at[j], grad.at[j], states, k);
      for (int i = 0; i < kStates; ++i) {
        if (uses(i)) state[i].at[j] = states[i];
      }
    }
    store_weight(form, work, at, weight);
    for (int i = 0; i < kStates; ++i) {
      if (uses(i)) store(form.types.state, at.state[i], state[i]);
    }
    if (form.extras & kAverage) {
      const V towards = all(work.numbers.average.weight), side = all(work.numbers.average.side);
      auto average = load_all<kCount, Unconverted>(at.average);
      for (int j = 0; j < kCount; ++j) {
        average.at[j] = snap(lerp(average.at[j], weight.at[j], towards, side));
      }
      store_all<kCount, Unconverted>(at.average, average);
    }
    if (form.extras & kWritesGrad) {
      Values<kCount> unscaled;
      for (int j = 0; j < kCount; ++j) unscaled.at[j] = all(work.numbers.unscale) * grad.at[j];
      store(form.types.grad, at.grad, unscaled);
    }
  }

  // Calls with each array that the pass uses and the bytes of its elements.
  template <class F, class Call>
  FLATSTEP_INLINE static void for_each_array(const F& form, At& at, const Call& call) {
    call(at.param, size_of(form.types.param));
    call(at.grad, size_of(form.types.grad));
    for (int i = 0; i < kStates; ++i) {
      if (uses(i)) call(at.state[i], size_of(form.types.state));
    }
    if (form.extras & kMaster) call(at.master, size_of(master_type(form.extras)));
    if (form.extras & kAverage) call(at.average, static_cast<int>(sizeof(T)));
  }

  template <class F>
  static void run(const Work& given, std::int64_t begin, std::int64_t end) {
    const Work work = given;  // of which the compiler knows that no store changes it
    const F form(work);
    const Scalars k = round_scalars<Rule, V, T>(work.scalars);
    At at = {.param = static_cast<char*>(work.arrays.param),
             .grad = static_cast<char*>(const_cast<void*>(work.arrays.grad)),
             .state = {},
             .master = static_cast<char*>(work.master),
             .average = static_cast<char*>(work.average),
             .number = work.first + static_cast<std::uint32_t>(begin)};
    for (int i = 0; i < kStates; ++i) at.state[i] = static_cast<char*>(work.arrays.state[i]);
    for_each_array(form, at, [begin](char*& from, int size) { from += begin * size; });

    std::int64_t left = end - begin;
    constexpr int kBlock = kVectors * kLanes;
    for (; left >= kBlock; left -= kBlock) {
      for_each_array(form, at, [](char*& from, int) { prefetch(from); });
      update<kVectors>(form, work, at, k);
      advance(form, at, kBlock);
    }
    for (; left >= kLanes; left -= kLanes) {
      update<1>(form, work, at, k);
      advance(form, at, kLanes);
    }
    if (left > 0) update_tail(form, work, at, static_cast<int>(left), k);
  }

  template <class F>
  FLATSTEP_INLINE static void advance(const F& form, At& at, int count) {
    for_each_array(form, at, [count](char*& from, int size) { from += count * size; });
    at.number += static_cast<std::uint32_t>(count);
  }

  // As in the other loop: the body on copies padded to full lanes.
  template <class F>
  static void update_tail(const F& form, const Work& work, At at, int count, const Scalars& k) {
    alignas(64) char copies[kStates + 4][kLanes * sizeof(T)] = {};
    At padded = at;
    int next = 0;
    for_each_array(form, padded, [&](char*& from, int size) {
      std::memcpy(copies[next], from, static_cast<std::size_t>(count * size));
      from = copies[next++];
    });
    update<1>(form, work, padded, k);
    next = 0;
    for_each_array(form, at, [&](char*& to, int size) {
      if (&to != &at.grad || form.extras & kWritesGrad) {
        std::memcpy(to, copies[next], static_cast<std::size_t>(count * size));
      }
      ++next;
    });
  }
};

template <class Target, class Rule, unsigned kFlags, class T>
struct Mixed {
  static void run(const Work& work, std::int64_t begin, std::int64_t end) {
    if constexpr (std::is_same_v<T, float>) {
      if (run_known(KnownForms{}, work, begin, end)) return;
    }
    using V = typename Target::template Value<T>;
    MixedLoop<Target, Rule, kFlags, T, V>::template run<AnyForm>(work, begin, end);
  }

  template <class... F>
  static bool run_known(List<F...>, const Work& work, std::int64_t begin, std::int64_t end) {
    return (run_if<F>(work, begin, end) || ...);
  }

  template <class F>
  FLATSTEP_INLINE static bool run_if(const Work& work, std::int64_t begin, std::int64_t end) {
    if (work.types != F::types || work.extras != F::extras) return false;
    constexpr bool kAllHalves =
        F::types == Types{Stored::kBFloat16, Stored::kBFloat16, Stored::kBFloat16};
    using V = std::conditional_t<kAllHalves, typename Target::AllBFloat16,
                                 typename Target::template Value<float>>;
    MixedLoop<Target, Rule, kFlags, T, V>::template run<F>(work, begin, end);
    return true;
  }
};

}  // namespace flatstep
