// The compiled kernels, by layout and variant.
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "rules/rules.h"
#include "storage/layouts.h"

namespace flatstep::cuda {

inline constexpr int kThreads = 256;
// A launch has no more blocks than give each this many elements.
inline constexpr std::int64_t kElementsPerBlock = 1024;

// The vectorised kernel that takes such a Launch, to be launched with kThreads a block.
const void* find_kernel(int layout, int variant, const Launch& launch);

// A kernel, and what its launch needs.
struct Choice {
  const void* kernel;
  int shared = 0;  // bytes of each block, beside those that the kernel declares
  int blocks = 0;  // of a processor, at most; 0: as many as it runs at once
};

// That one, but where a build with both forms is told otherwise; the launch is told how it runs.
Choice choose_kernel(int device, int layout, int variant, Launch& launch);

const void* count_kernel();

inline constexpr int kTilesPerBlock = kThreads / kNormLanes;
// Of a NormLaunch, one after the other, and of a NormEnd, for one block.
const void* tile_norm_kernel();
const void* row_norm_kernel();
const void* norm_end_kernel();

}  // namespace flatstep::cuda
