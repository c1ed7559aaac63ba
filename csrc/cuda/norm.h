// The norm of all gradients on the GPU: the sums of cpu/norm.h, in the same order.
#pragma once

#include "cuda/kernel.h"

namespace flatstep::cuda {

template <bool kLargest>
__device__ double add(double sum, double x) {
  return kLargest ? maximum(sum, x) : sum + x;
}

// What a lane makes of its elements of a tile, each of which is kNormLanes after the last.
template <bool kLargest, class From>
__device__ double add_lane(const From* from, std::int64_t count, int lane) {
  constexpr int kAhead = 8;  // asked for at once
  const auto size = [](const From& element) {
    const double x = Lanes<double>::load(&element);
    return kLargest ? maximum(x, 0 - x) : x * x;
  };
  double sum = 0;
  std::int64_t at = lane;
  for (; at + (kAhead - 1) * kNormLanes < count; at += kAhead * kNormLanes) {
    From elements[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) elements[i] = from[at + i * kNormLanes];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) sum = add<kLargest>(sum, size(elements[i]));
  }
  for (; at < count; at += kNormLanes) sum = add<kLargest>(sum, size(from[at]));
  return sum;
}

template <bool kLargest>
__device__ double add_lane(const NormRow& row, std::int64_t first, int lane) {
  const std::int64_t rest = row.count - first;
  const std::int64_t count = rest < kNormTile ? rest : kNormTile;
  const auto from = [&](auto* grad) {
    return add_lane<kLargest>(static_cast<decltype(grad)>(row.grad) + first, count, lane);
  };
  switch (row.type) {
    case Stored::kFloat32:
      return from(static_cast<const float*>(nullptr));
    case Stored::kFloat64:
      return from(static_cast<const double*>(nullptr));
    case Stored::kBFloat16:
      return from(static_cast<const BFloat16*>(nullptr));
    case Stored::kFloat16:
      return from(static_cast<const Float16*>(nullptr));
    default:
      return 0;
  }
}

// A tile for as many threads as it has lanes; the lanes are added by halves.
template <bool kLargest>
__device__ void add_tiles(const NormLaunch& launch, double* lanes) {
  const NormRow* const rows = launch.rows ? launch.rows : launch.inline_rows;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kNormLanes;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kTilesPerBlock;
  for (std::int64_t first = launch.begin + blockIdx.x * std::int64_t{kTilesPerBlock};
       first < launch.end; first += stride) {
    const std::int64_t tile = first + thread / kNormLanes;
    lanes[thread] = 0;
    if (tile < launch.end) {
      const NormRow row = rows[find_row(rows, launch.row_count, tile)];
      lanes[thread] = add_lane<kLargest>(row, (tile - row.begin) * kNormTile, lane);
    }
    for (int width = kNormLanes / 2; width > 0; width /= 2) {
      __syncthreads();
      if (lane < width) lanes[thread] = add<kLargest>(lanes[thread], lanes[thread + width]);
    }
    if (lane == 0 && tile < launch.end) launch.of_tiles[tile] = lanes[thread];
    __syncthreads();
  }
}

template <int kUnused = 0>
__global__ void __launch_bounds__(kThreads)
    norms_of_tiles(const __grid_constant__ NormLaunch launch) {
  __shared__ double lanes[kThreads];
  launch.largest ? add_tiles<true>(launch, lanes) : add_tiles<false>(launch, lanes);
}

// Added one after the other, by the block's first thread, which alone has the sum. What is next is
// on its way meanwhile.
template <bool kLargest>
__device__ double add_in_order(const double* values, std::int64_t count, double* staged) {
  const auto mine = [&](std::int64_t first) {
    const std::int64_t at = first + threadIdx.x;
    return at < count ? values[at] : 0;
  };
  double sum = 0, next = mine(0);
  for (std::int64_t first = 0; first < count; first += kThreads) {
    __syncthreads();
    staged[threadIdx.x] = next;
    __syncthreads();
    next = mine(first + kThreads);
    if (threadIdx.x != 0) continue;
    if (count - first >= kThreads) {
#pragma unroll 16
      for (int i = 0; i < kThreads; ++i) sum = add<kLargest>(sum, staged[i]);
    } else {
      for (int i = 0; first + i < count; ++i) sum = add<kLargest>(sum, staged[i]);
    }
  }
  return sum;
}

inline __device__ double add_in_order(const double* values, std::int64_t count, bool largest,
                                      double* staged) {
  return largest ? add_in_order<true>(values, count, staged)
                 : add_in_order<false>(values, count, staged);
}

template <int kUnused = 0>
__global__ void __launch_bounds__(kThreads)
    norms_of_rows(const __grid_constant__ NormLaunch launch) {
  __shared__ double staged[kThreads];
  const NormRow* const rows = launch.rows ? launch.rows : launch.inline_rows;
  for (int i = static_cast<int>(blockIdx.x); i < launch.row_count;
       i += static_cast<int>(gridDim.x)) {
    const std::int64_t begin = rows[i].begin;
    const double sum =
        add_in_order(launch.of_tiles + begin, end_of(rows[i]) - begin, launch.largest, staged);
    if (threadIdx.x == 0) launch.of_rows[i] = sum;
  }
}

// For one block: the sum of all rows, and what becomes of it.
template <int kUnused = 0>
__global__ void __launch_bounds__(kThreads) end_norm(const __grid_constant__ NormEnd end) {
  __shared__ double staged[kThreads];
  FoundNorm& found = *end.found;
  if (end.adds) {
    const double sum = add_in_order(end.of_rows, end.row_count, end.largest, staged);
    if (threadIdx.x == 0) found.total = sum;
  }
  if (threadIdx.x != 0) return;
  if (end.overflow) *end.overflow = is_finite(found.total) ? 0.0F : 1.0F;
  if (!end.judges || (end.found_inf && *end.found_inf != 0)) return;
  const double unscale = end.grad_scale ? 1 / read<float>(end.grad_scale) : 1;
  found.norm = (end.largest ? found.total : root(found.total)) * unscale;
  if (end.skips && !is_finite(found.norm)) found.skipped += 1;
}

}  // namespace flatstep::cuda
