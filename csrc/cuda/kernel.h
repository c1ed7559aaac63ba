// The loop on the GPU: a persistent grid, an equal share of all rows' elements for each block,
// wherever rows begin and end.
//
// Includes no header of CUDA's, so that a test can run it thread by thread on the host.
#pragma once

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "rules/rules.h"
#include "storage/layouts.h"

namespace flatstep::cuda {

inline constexpr int kAccessBytes = 16;
// At least this many blocks share a processor: what 64 Ki registers allow without spills.
inline constexpr int kBlocks = 2;

template <class Stored>
__device__ double read(const void* at) {
  return static_cast<double>(*static_cast<const Stored*>(at));
}

inline __device__ double value_of(const Number& number) {
  if (!number.at) return number.value;
  return number.is_double ? read<double>(number.at) : read<float>(number.at);
}

inline __device__ std::int64_t step_of(const Launch& launch, const Row& row) {
  if (!row.step) return launch.host_step;
  const double done = launch.step_is_double ? read<double>(row.step) : read<float>(row.step);
  return done >= 0 ? static_cast<std::int64_t>(done) + 1 : 1;
}

inline __device__ bool is_finite(double x) { return x - x == 0; }

// Whether the step is to change nothing.
inline __device__ bool is_left_out(const Launch& launch) {
  return (launch.found_inf && *launch.found_inf != 0) ||
         (launch.skips && !is_finite(launch.norm->norm));
}

// As flatstep.reference.clip_factor.
inline __device__ double clip_factor(const Launch& launch) {
  if (!launch.norm || launch.max_norm < 0) return 1;
  const double factor = launch.max_norm / (launch.norm->norm + 1e-6);
  return factor > 1 ? 1 : factor;
}

// The last row that begins at or before an element, or a tile.
template <class AnyRow>
__device__ int find_row(const AnyRow* rows, int count, std::int64_t at) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (rows[middle].begin <= at ? low : high) = middle;
  }
  return low;
}

// 16 bytes of an array.
template <class Stored>
struct alignas(kAccessBytes) Pack {
  static constexpr int kCount = kAccessBytes / static_cast<int>(sizeof(Stored));
  Stored at[kCount];
};
using Words = Pack<std::uint32_t>;

inline __device__ bool is_aligned(const void* at) {
  return reinterpret_cast<std::uintptr_t>(at) % kAccessBytes == 0;
}

// Lets the compiler take the accesses of the GPU's memory, that no store to shared memory meets.
inline __device__ void assume_global([[maybe_unused]] const void* at) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(at));
#endif
}

// 16 bytes of the GPU's memory in one instruction, whatever the compiler makes of the elements. No
// update reads what it has stored, so that it may keep what else it knows of the memory.
inline __device__ Words load_words(const void* from) {
#ifdef __CUDA_ARCH__
  Words words;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.at[0]), "=r"(words.at[1]), "=r"(words.at[2]), "=r"(words.at[3])
               : "l"(__cvta_generic_to_global(from)));
  return words;
#else
  return *static_cast<const Words*>(from);
#endif
}

inline __device__ void store_words(void* to, const Words& words) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.u32 [%4], {%0, %1, %2, %3};" ::"r"(words.at[0]), "r"(words.at[1]),
               "r"(words.at[2]), "r"(words.at[3]), "l"(__cvta_generic_to_global(to)));
#else
  *static_cast<Words*>(to) = words;
#endif
}

// Elements of kSize bytes one by one, those that are valid; zeros for the others.
template <int kSize, int kCount>
__device__ void load_each(std::uint32_t (&words)[kCount], const void* from, std::int64_t valid) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) words[i] = 0;
  if constexpr (kSize == 2) {
#pragma unroll
    for (int i = 0; i < 2 * kCount; ++i) {
      const std::uint32_t half = i < valid ? static_cast<const std::uint16_t*>(from)[i] : 0U;
      words[i / 2] |= half << (i % 2 * 16);
    }
  } else {
    constexpr int kWords = kSize / 4;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i / kWords < valid) words[i] = static_cast<const std::uint32_t*>(from)[i];
    }
  }
}

// Part of an array for one thread: 16 bytes at once where the array's address allows it.
template <class Stored>
struct Access {
  using Vector = Pack<Stored>;
  static constexpr int kCount = Vector::kCount;

  // Words, to be made a vector when all that a thread asks for is on its way: 16-bit elements
  // would be taken apart, and so waited for, at once.
  static __device__ Words load(const Stored* from, bool aligned, std::int64_t valid) {
    if (aligned && valid >= kCount) return load_words(from);
    Words words;
    load_each<sizeof(Stored)>(words.at, from, valid);
    return words;
  }

  static __device__ Vector vector_of(const Words& words) {
    Vector vector;
    __builtin_memcpy(&vector, &words, sizeof vector);
    return vector;
  }

  static __device__ void store(Stored* to, const Vector& from, bool aligned, std::int64_t valid) {
    if (aligned && valid >= kCount) {
      Words words;
      __builtin_memcpy(&words, &from, sizeof words);
      store_words(to, words);
    } else {
      for (int i = 0; i < kCount; ++i) {
        if (i < valid) to[i] = from.at[i];
      }
    }
  }
};

// Rounded once from doubles, as on the host.
template <class Rule, class V>
__device__ __noinline__ typename Rule::template Scalars<V> prepare_scalars(const Launch& launch,
                                                                           std::int64_t step) {
  double hyper[Rule::kHyperCount];
  for (int i = 0; i < Rule::kHyperCount; ++i) hyper[i] = value_of(launch.hyper[i]);
  const double scale =
      launch.grad_scale ? launch.sign / read<float>(launch.grad_scale) : launch.sign;
  const auto prepared =
      Rule::prepare(hyper, launch.rule_step ? launch.rule_step : step, scale * clip_factor(launch));
  typename Rule::template Scalars<V> k;
  constexpr int kNumbers = static_cast<int>(sizeof k / sizeof(V));
  const auto* const from = reinterpret_cast<const double*>(&prepared);
  auto* const to = reinterpret_cast<V*>(&k);
  for (int i = 0; i < kNumbers; ++i) to[i] = static_cast<V>(from[i]);
  return k;
}

template <class Rule, unsigned kFlags, class Layout>
struct Loop {
  using P = typename Layout::Param;
  using G = typename Layout::Grad;
  using S = typename Layout::State;
  using V = typename Layout::Compute;
  using Scalars = typename Rule::template Scalars<V>;

  static constexpr int kStates = Rule::kStateCount;
  using ParamAccess = Access<P>;
  using GradAccess = Access<G>;
  using StateAccess = Access<S>;
  static constexpr int kCount = ParamAccess::kCount;
  static_assert(GradAccess::kCount == kCount && StateAccess::kCount == kCount);

  static __host__ __device__ constexpr bool uses(int state) { return Rule::uses(kFlags, state); }

  static constexpr int count_arrays() {
    int arrays = 2;
    for (int i = 0; i < kStates; ++i) arrays += uses(i) ? 1 : 0;
    return arrays;
  }
  // Vectors of each array that a thread asks for at once: as many as its registers hold.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
  static constexpr int kMostArrays = sizeof(P) == 2 ? 3 : 4;
#else
  static constexpr int kMostArrays = 4;
#endif
  static constexpr int kUnroll = count_arrays() > kMostArrays ? 1 : 2;

  using Prepared = Scalars;
  static __device__ Prepared prepare(const Launch& launch, std::int64_t step) {
    return prepare_scalars<Rule, V>(launch, step);
  }

  struct Vectors {
    typename ParamAccess::Vector p;
    typename GradAccess::Vector g;
    typename StateAccess::Vector s[kStates];
  };

  static __device__ void update(Vectors& at, const Scalars& k) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      V param = Lanes<V>::load(&at.p.at[j]), state[kStates] = {};
      for (int i = 0; i < kStates; ++i) {
        if (uses(i)) state[i] = Lanes<V>::load(&at.s[i].at[j]);
      }
      Rule::template update<kFlags, V>(param, Lanes<V>::load(&at.g.at[j]), state, k);
      Lanes<V>::store(&at.p.at[j], param);
      for (int i = 0; i < kStates; ++i) {
        if (uses(i)) Lanes<V>::store(&at.s[i].at[j], state[i]);
      }
    }
  }

  // Elements [begin, end) of a row; begin is a multiple of kRowAlignment.
  template <int kAtOnce = kUnroll>
  static __device__ void run(const Launch& launch, const Row& row, std::int64_t begin,
                             std::int64_t end, const Scalars& k) {
    const Arrays& arrays = row.arrays;
    P* const p = static_cast<P*>(arrays.param);
    const G* const g = static_cast<const G*>(arrays.grad);
    S* s[kStates];
    bool s_aligned[kStates];
    assume_global(p);
    assume_global(g);
    for (int i = 0; i < kStates; ++i) {
      s[i] = static_cast<S*>(arrays.state[i]);
      s_aligned[i] = is_aligned(s[i]);
      if (uses(i)) assume_global(s[i]);
    }
    const bool p_aligned = is_aligned(p), g_aligned = is_aligned(g);
    constexpr std::int64_t kStride = static_cast<std::int64_t>(kThreads) * kCount;
    for (std::int64_t at = begin + static_cast<std::int64_t>(threadIdx.x) * kCount; at < end;
         at += kAtOnce * kStride) {
      Words p_words[kAtOnce], g_words[kAtOnce], s_words[kAtOnce][kStates];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const std::int64_t first = at + u * kStride;
        p_words[u] = ParamAccess::load(p + first, p_aligned, end - first);
        g_words[u] = GradAccess::load(g + first, g_aligned, end - first);
        for (int i = 0; i < kStates; ++i) {
          if (uses(i)) s_words[u][i] = StateAccess::load(s[i] + first, s_aligned[i], end - first);
        }
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const std::int64_t first = at + u * kStride;
        Vectors vectors;
        vectors.p = ParamAccess::vector_of(p_words[u]);
        vectors.g = GradAccess::vector_of(g_words[u]);
        for (int i = 0; i < kStates; ++i) {
          if (uses(i)) vectors.s[i] = StateAccess::vector_of(s_words[u][i]);
        }
        update(vectors, k);
        ParamAccess::store(p + first, vectors.p, p_aligned, end - first);
        if (launch.clears) {
          GradAccess::store(const_cast<G*>(g) + first, {}, g_aligned, end - first);
        }
        for (int i = 0; i < kStates; ++i) {
          if (uses(i)) StateAccess::store(s[i] + first, vectors.s[i], s_aligned[i], end - first);
        }
      }
    }
  }
};

// A block's equal share of all rows' elements, by a loop with the numbers that L prepares.
template <class L, class AnyLoop>
__device__ void run_share(const Launch& launch, typename L::Prepared& shared, AnyLoop& loop) {
  if (is_left_out(launch)) return;
  const Row* const rows = launch.rows ? launch.rows : launch.inline_rows;
  const std::int64_t tiles = launch.total / kRowAlignment;
  std::int64_t at = tiles * blockIdx.x / gridDim.x * kRowAlignment;
  const std::int64_t end = tiles * (blockIdx.x + 1) / gridDim.x * kRowAlignment;
  if (at >= end) return;
  std::int64_t prepared = 0;  // the step that the numbers are for
  for (int i = find_row(rows, launch.row_count, at); at < end; ++i) {
    const Row row = rows[i];
    const std::int64_t step = step_of(launch, row);
    if (step != prepared) {
      __syncthreads();
      if (threadIdx.x == 0) shared = L::prepare(launch, step);
      __syncthreads();
      prepared = step;
    }
    const std::int64_t begin = at - row.begin, rest = end - row.begin;
    loop.run(launch, row, begin, rest < row.count ? rest : row.count, shared);
    at = i + 1 < launch.row_count ? rows[i + 1].begin : end;
  }
}

template <class L>
__global__ void __launch_bounds__(kThreads, kBlocks) update(const __grid_constant__ Launch launch) {
  __shared__ typename L::Prepared shared;
  L loop;
  run_share<L>(launch, shared, loop);
}

// Counts the steps of all rows, after the update.
template <int kUnused = 0>
__global__ void __launch_bounds__(kThreads) count(const __grid_constant__ Launch launch) {
  if (is_left_out(launch)) return;
  const Row* const rows = launch.rows ? launch.rows : launch.inline_rows;
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < launch.row_count;
       i += static_cast<int>(gridDim.x * blockDim.x)) {
    if (launch.step_is_double) {
      *static_cast<double*>(rows[i].step) += 1;
    } else {
      *static_cast<float*>(rows[i].step) += 1;
    }
  }
}

}  // namespace flatstep::cuda
