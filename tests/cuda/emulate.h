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

namespace flatstep::cuda::emulation {

using Kernel = void (*)(const Launch);

template <class Layout, class Rule, unsigned kFlags>
void add_flags(std::vector<Kernel>& kernels) {
  if constexpr (kFlags < Rule::kFlagEnd) {
    if constexpr (Rule::allows(kFlags)) {
      kernels.push_back(&update<Rule, kFlags, Layout>);
    } else {
      kernels.push_back(nullptr);
    }
    add_flags<Layout, Rule, kFlags + 1>(kernels);
  }
}

template <class Layout, class... Rule>
void add_rules(std::vector<Kernel>& kernels, List<Rule...>) {
  (add_flags<Layout, Rule, 0>(kernels), ...);
}

template <class... Layout>
std::vector<Kernel> all_kernels(List<Layout...>) {
  std::vector<Kernel> kernels;
  (add_rules<Layout>(kernels, Rules{}), ...);
  return kernels;
}

inline void run(Kernel kernel, const Launch& launch, unsigned blocks) {
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

inline Kernel find(int layout, int variant) {
  static const auto kernels = all_kernels(Layouts{});
  return kernels[static_cast<std::size_t>(layout * kVariants + variant)];
}

}  // namespace flatstep::cuda::emulation
