// The GPU's loop on the host: a thread for each thread of a block, block after block. It checks
// which elements are touched and their bits; it says nothing of a real GPU.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

struct Index {
  unsigned x;
};
inline thread_local Index threadIdx;
inline thread_local Index blockIdx;
inline Index blockDim, gridDim;
inline std::unique_ptr<std::barrier<>> block_barrier;

#define __host__
#define __device__
#define __global__
#define __noinline__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __syncthreads() block_barrier->arrive_and_wait()

#include "cuda/kernel.h"
#include "cuda/mixed.h"
#include "cuda/norm.h"

namespace flatstep::cuda::emulation {

using Kernel = void (*)(const Launch);

template <template <class, unsigned, class> class L, class Of, class Rule, unsigned kFlags>
void add_flags(std::vector<Kernel>& kernels) {
  if constexpr (kFlags < Rule::kFlagEnd) {
    if constexpr (Rule::allows(kFlags)) {
      kernels.push_back(&update<L<Rule, kFlags, Of>>);
    } else {
      kernels.push_back(nullptr);
    }
    add_flags<L, Of, Rule, kFlags + 1>(kernels);
  }
}

template <template <class, unsigned, class> class L, class Of, class... Rule>
void add_rules(std::vector<Kernel>& kernels, List<Rule...>) {
  (add_flags<L, Of, Rule, 0>(kernels), ...);
}

// Those of each layout, then the mixed ones in float and in double.
template <class... Layout>
std::vector<Kernel> all_kernels(List<Layout...>) {
  std::vector<Kernel> kernels;
  (add_rules<Loop, Layout>(kernels, Rules{}), ...);
  add_rules<MixedLoop, float>(kernels, Rules{});
  add_rules<MixedLoop, double>(kernels, Rules{});
  return kernels;
}

template <class AnyLaunch>
void run(void (*kernel)(const AnyLaunch), const AnyLaunch& launch, unsigned blocks) {
  gridDim = {blocks};
  blockDim = {kThreads};
  for (unsigned block = 0; block < blocks; ++block) {
    block_barrier = std::make_unique<std::barrier<>>(kThreads);
    std::vector<std::thread> threads;
    for (unsigned thread = 0; thread < kThreads; ++thread) {
      threads.emplace_back([=, &launch] {
        threadIdx = {thread};
        blockIdx = {block};
        kernel(launch);
        block_barrier->arrive_and_drop();
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
}

inline Kernel find(int layout, int variant, const Launch& launch) {
  static const auto kernels = all_kernels(Layouts{});
  if (layout >= Layouts::kCount || launch.extras) {
    layout = Layouts::kCount + (launch.types.param == Stored::kFloat64);
  }
  return kernels[static_cast<std::size_t>(layout * kVariants + variant)];
}

}  // namespace flatstep::cuda::emulation
