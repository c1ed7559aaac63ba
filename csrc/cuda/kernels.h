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

// A kernel that takes such a Launch, to be launched with kThreads a block.
const void* find_kernel(int layout, int variant, const Launch& launch);
const void* count_kernel();

inline constexpr int kTilesPerBlock = kThreads / kNormLanes;
// Of a NormLaunch, one after the other, and of a NormEnd, for one block.
const void* tile_norm_kernel();
const void* row_norm_kernel();
const void* norm_end_kernel();

}  // namespace flatstep::cuda
