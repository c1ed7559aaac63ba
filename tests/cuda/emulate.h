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

#include "cuda/bulk.h"
#include "cuda/kernel.h"
#include "cuda/mixed.h"
#include "cuda/norm.h"
#include "cuda/variants.h"
#include "emulate_copies.h"

namespace flatstep::cuda::emulation {

using Kernel = void (*)(const Launch);

struct Kernels {
  Kernel vectorised[Layouts::kCount][kVariants];
  Kernel mixed[2][kVariants];  // in float, in double
  Kernel in_bulk[Layouts::kCount][kVariants];
  int arrays[kVariants];
};

inline Kernels make_kernels() {
  Kernels kernels = {};
  visit_layouts(Layouts{}, [&]<class Layout>(int layout) {
    visit_variants(Rules{}, [&]<class Rule, unsigned kFlags>(int variant) {
      using L = Loop<Rule, kFlags, Layout>;
      kernels.vectorised[layout][variant] = &update<L>;
      kernels.in_bulk[layout][variant] = &update_in_bulk<L, EmulatedCopies>;
      kernels.arrays[variant] = L::count_arrays();
    });
  });
  visit_variants(Rules{}, [&]<class Rule, unsigned kFlags>(int variant) {
    kernels.mixed[0][variant] = &update<MixedLoop<Rule, kFlags, float>>;
    kernels.mixed[1][variant] = &update<MixedLoop<Rule, kFlags, double>>;
  });
  return kernels;
}

template <class AnyLaunch>
void run(void (*kernel)(const AnyLaunch), const AnyLaunch& launch, unsigned blocks,
         int shared = 0) {
  gridDim = {blocks};
  blockDim = {kThreads};
  for (unsigned block = 0; block < blocks; ++block) {
    block_barrier = std::make_unique<std::barrier<>>(kThreads);
    EmulatedCopies::begin_block(shared);
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
    EmulatedCopies::end_block();
  }
}

// An update, in bulk where the launch has a pipeline and there is such a kernel.
inline void run_update(int layout, int variant, const Launch& launch, unsigned blocks) {
  static const Kernels kernels = make_kernels();
  const auto at = static_cast<std::size_t>(variant);
  const bool is_double = launch.types.param == Stored::kFloat64;
  if (layout >= Layouts::kCount || launch.extras) {
    run(kernels.mixed[is_double][at], launch, blocks);
  } else if (launch.pipeline.stages > 0) {
    const int stage = launch.pipeline.tile * kernels.arrays[at];
    run(kernels.in_bulk[layout][at], launch, blocks, launch.pipeline.stages * stage);
  } else {
    run(kernels.vectorised[layout][at], launch, blocks);
  }
}

}  // namespace flatstep::cuda::emulation
