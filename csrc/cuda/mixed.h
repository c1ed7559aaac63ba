// The GPU's loop for mixed types, masters, chance and averages: as cpu/mixed.h, with what is the
// same for all threads looked up as it runs.
#pragma once

#include "cuda/kernel.h"
#include "vec/rounding.h"

namespace flatstep::cuda {

// A thread's part of one array, as it lies in memory: up to two accesses of 16 bytes.
struct Raw {
  Words words[2];

  __device__ std::uint32_t& word(int i) { return words[i / 4].at[i % 4]; }
  __device__ std::uint32_t word(int i) const { return words[i / 4].at[i % 4]; }
};

template <class Rule, unsigned kFlags, class V>
struct MixedLoop {
  static constexpr int kStates = Rule::kStateCount;
  static constexpr bool kIsFloat = sizeof(V) == sizeof(float);
  static constexpr int kCount = kIsFloat ? 8 : 2;

  struct Prepared {
    typename Rule::template Scalars<V> k;
    ExtraNumbers numbers;
  };

  struct Values {
    V at[kCount];
  };

  static __host__ __device__ constexpr bool uses(int state) { return Rule::uses(kFlags, state); }

  static __device__ Prepared prepare(const Launch& launch, std::int64_t step) {
    const double unscale = launch.grad_scale ? 1 / read<float>(launch.grad_scale) : launch.unscale;
    return {prepare_scalars<Rule, V>(launch, step),
            prepare_extras(unscale, launch.average_decay, launch.seed, step)};
  }

  static __device__ Raw load(const void* from, Stored type, std::int64_t first,
                             std::int64_t valid) {
    const int size = size_of(type);
    const char* const at = static_cast<const char*>(from) + first * size;
    Raw raw = {};
    if (valid >= kCount && is_aligned(at)) {
      raw.words[0] = load_words(at);
      if (size * kCount > kAccessBytes) raw.words[1] = load_words(at + kAccessBytes);
    } else if (size == 2) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const std::uint32_t half =
            i < valid ? reinterpret_cast<const std::uint16_t*>(at)[i] : std::uint16_t{0};
        raw.word(i / 2) |= half << (i % 2 * 16);
      }
    } else {
      constexpr int kWords = static_cast<int>(sizeof(V) / 4);
#pragma unroll
      for (int i = 0; i < kCount * kWords; ++i) {
        if (i / kWords < valid) raw.word(i) = reinterpret_cast<const std::uint32_t*>(at)[i];
      }
    }
    return raw;
  }

  static __device__ void store(void* to, Stored type, std::int64_t first, std::int64_t valid,
                               const Raw& raw) {
    const int size = size_of(type);
    char* const at = static_cast<char*>(to) + first * size;
    if (valid >= kCount && is_aligned(at)) {
      store_words(at, raw.words[0]);
      if (size * kCount > kAccessBytes) store_words(at + kAccessBytes, raw.words[1]);
    } else if (size == 2) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const auto half = static_cast<std::uint16_t>(raw.word(i / 2) >> (i % 2 * 16));
        if (i < valid) reinterpret_cast<std::uint16_t*>(at)[i] = half;
      }
    } else {
      constexpr int kWords = static_cast<int>(sizeof(V) / 4);
#pragma unroll
      for (int i = 0; i < kCount * kWords; ++i) {
        if (i / kWords < valid) reinterpret_cast<std::uint32_t*>(at)[i] = raw.word(i);
      }
    }
  }

  static __device__ std::uint16_t half_of(const Raw& raw, int i) {
    return static_cast<std::uint16_t>(raw.word(i / 2) >> (i % 2 * 16));
  }

  static __device__ void put_half(Raw& raw, int i, std::uint32_t half) {
    raw.word(i / 2) |= half << (i % 2 * 16);
  }

  static __device__ Values widened(Stored type, const Raw& raw) {
    Values x;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if constexpr (!kIsFloat) {
        const std::uint64_t low = raw.word(2 * i), high = raw.word(2 * i + 1);
        x.at[i] = double_of(high << 32 | low);
      } else if (type == Stored::kBFloat16) {
        x.at[i] = widen(BFloat16{half_of(raw, i)});
      } else if (type == Stored::kFloat16) {
        x.at[i] = widen(Float16{half_of(raw, i)});
      } else {
        x.at[i] = float_of(raw.word(i));
      }
    }
    return x;
  }

  static __device__ Raw narrowed(Stored type, const Values& x) {
    Raw raw = {};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if constexpr (!kIsFloat) {
        const std::uint64_t bits = bits_of(x.at[i]);
        raw.word(2 * i) = static_cast<std::uint32_t>(bits);
        raw.word(2 * i + 1) = static_cast<std::uint32_t>(bits >> 32);
      } else if (type == Stored::kBFloat16) {
        put_half(raw, i, round_to_bfloat16(x.at[i]));
      } else if (type == Stored::kFloat16) {
        Float16 half;
        narrow(&half, x.at[i]);
        put_half(raw, i, half.bits);
      } else {
        raw.word(i) = bits_of(x.at[i]);
      }
    }
    return raw;
  }

  static __device__ Values weight_of(const Launch& launch, const Raw& param, const Raw& master) {
    if constexpr (kIsFloat) {
      if (launch.extras & kMasterCopy) return widened(Stored::kFloat32, master);
      if (launch.extras & kMasterSplit) {
        Values weight;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const auto offset = static_cast<std::int16_t>(half_of(master, i));
          weight.at[i] = join<float>(half_of(param, i), static_cast<std::uint32_t>(offset));
        }
        return weight;
      }
    }
    return widened(launch.types.param, param);
  }

  // Makes the parameter and the master of a weight, and the weight what it is from now on.
  static __device__ void split_weight(const Launch& launch, const Prepared& prepared,
                                      std::uint32_t number, Values& weight, Raw& param,
                                      Raw& master) {
    if constexpr (kIsFloat) {
      if (launch.extras & kMasterCopy) {
        master = narrowed(Stored::kFloat32, weight);
        param = narrowed(launch.types.param, weight);
        return;
      }
      if (launch.extras & (kMasterSplit | kStochastic)) {
        param = master = {};
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          if (launch.extras & kMasterSplit) {
            const auto halves = split(weight.at[i]);
            put_half(param, i, halves.high);
            put_half(master, i, halves.all & 0xffff);
            weight.at[i] = float_of(halves.all);
          } else {
            const auto random = random_of<float>(number + i, prepared.numbers.chance_key);
            const auto half = round_by_chance(weight.at[i], random);
            put_half(param, i, half);
            weight.at[i] = float_of(half << 16);
          }
        }
        return;
      }
    }
    param = narrowed(launch.types.param, weight);
    weight = widened(launch.types.param, param);
  }

  // Elements [begin, end) of a row; begin is a multiple of kRowAlignment.
  static __device__ void run(const Launch& launch, const Row& row, std::int64_t begin,
                             std::int64_t end, const Prepared& prepared) {
    const Types types = launch.types;
    const unsigned extras = launch.extras;
    const bool has_master = extras & kMaster, has_average = extras & kAverage;
    const Stored master_stored = master_type(extras);
    constexpr Stored average_stored = kIsFloat ? Stored::kFloat32 : Stored::kFloat64;
    void* const grad_memory = const_cast<void*>(row.arrays.grad);
    for (std::int64_t first = begin + static_cast<std::int64_t>(threadIdx.x) * kCount; first < end;
         first += static_cast<std::int64_t>(kThreads) * kCount) {
      const std::int64_t valid = end - first;
      // Everything is asked for before anything is looked at.
      Raw param = load(row.arrays.param, types.param, first, valid);
      const Raw raw_grad = load(grad_memory, types.grad, first, valid);
      Raw raw_states[kStates], master = {}, raw_average = {};
      for (int i = 0; i < kStates; ++i) {
        if (uses(i)) raw_states[i] = load(row.arrays.state[i], types.state, first, valid);
      }
      if (has_master) master = load(row.master, master_stored, first, valid);
      if (has_average) raw_average = load(row.average, average_stored, first, valid);

      Values weight = weight_of(launch, param, master), states[kStates];
      const Values grad = widened(types.grad, raw_grad);
      for (int i = 0; i < kStates; ++i) {
        if (uses(i)) states[i] = widened(types.state, raw_states[i]);
      }
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        V state[kStates] = {};
        for (int i = 0; i < kStates; ++i) {
          if (uses(i)) state[i] = states[i].at[j];
        }
        Rule::template update<kFlags, V>(weight.at[j], grad.at[j], state, prepared.k);
        for (int i = 0; i < kStates; ++i) {
          if (uses(i)) states[i].at[j] = state[i];
        }
      }
      const auto number = row.first + static_cast<std::uint32_t>(first);
      split_weight(launch, prepared, number, weight, param, master);
      store(row.arrays.param, types.param, first, valid, param);
      if (has_master) store(row.master, master_stored, first, valid, master);
      for (int i = 0; i < kStates; ++i) {
        if (uses(i)) {
          store(row.arrays.state[i], types.state, first, valid, narrowed(types.state, states[i]));
        }
      }
      if (has_average) {
        const V towards = static_cast<V>(prepared.numbers.average.weight);
        const V side = static_cast<V>(prepared.numbers.average.side);
        Values average = widened(average_stored, raw_average);
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          average.at[j] = snap(lerp(average.at[j], weight.at[j], towards, side));
        }
        store(row.average, average_stored, first, valid, narrowed(average_stored, average));
      }
      if (launch.clears) {
        store(grad_memory, types.grad, first, valid, {});
      } else if (extras & kWritesGrad) {
        const V unscale = static_cast<V>(prepared.numbers.unscale);
        Values unscaled;
#pragma unroll
        for (int j = 0; j < kCount; ++j) unscaled.at[j] = unscale * grad.at[j];
        store(grad_memory, types.grad, first, valid, narrowed(types.grad, unscaled));
      }
    }
  }
};

}  // namespace flatstep::cuda
