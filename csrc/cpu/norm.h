// The norms of a gradient's tiles: sums of squares in double, in an order that no instruction set,
// thread or neighbour changes.
#pragma once

#include "cpu/isa.h"

namespace flatstep {

template <class Target>
struct Norm {
  using D = typename Target::template Value<double>;
  static constexpr int kLanes = Lanes<D>::kCount;
  static constexpr int kVectors = kNormLanes / kLanes;

  template <bool kLargest, class V>
  FLATSTEP_INLINE static V add(V sum, V x) {
    if constexpr (kLargest) return maximum(sum, x);
    return sum + x;
  }

  template <bool kLargest, class From>
  FLATSTEP_INLINE static void add_lanes(D* sums, const From* from) {
    for (int i = 0; i < kVectors; ++i) {
      const D x = Lanes<D>::load(from + i * kLanes);
      if constexpr (kLargest) {
        sums[i] = maximum(sums[i], maximum(x, Lanes<D>::all(0) - x));
      } else {
        sums[i] = sums[i] + x * x;
      }
    }
  }

  // A tile's end is padded with zeros, which change nothing. The lanes are added by halves.
  template <bool kLargest, class From>
  static double tile(const From* from, std::int64_t count) {
    D sums[kVectors];
    for (D& sum : sums) sum = Lanes<D>::all(0);
    std::int64_t at = 0;
    for (; at + kNormLanes <= count; at += kNormLanes) add_lanes<kLargest>(sums, from + at);
    if (at < count) {
      From padded[kNormLanes] = {};
      for (int j = 0; at + j < count; ++j) padded[j] = from[at + j];
      add_lanes<kLargest>(sums, padded);
    }
    double lanes[kNormLanes];
    for (int i = 0; i < kVectors; ++i) Lanes<D>::store(lanes + i * kLanes, sums[i]);
    for (int width = kNormLanes / 2; width > 0; width /= 2) {
      for (int j = 0; j < width; ++j) lanes[j] = add<kLargest>(lanes[j], lanes[j + width]);
    }
    return lanes[0];
  }

  template <class From>
  static void tiles(const void* grad, std::int64_t count, std::int64_t begin, std::int64_t end,
                    bool largest, double* norms) {
    for (std::int64_t i = begin; i < end; ++i) {
      const From* const from = static_cast<const From*>(grad) + i * kNormTile;
      const std::int64_t rest = count - i * kNormTile;
      const std::int64_t here = rest < kNormTile ? rest : kNormTile;
      norms[i - begin] = largest ? tile<true>(from, here) : tile<false>(from, here);
    }
  }

  static void run(const void* grad, Stored type, std::int64_t count, std::int64_t begin,
                  std::int64_t end, bool largest, double* norms) {
    if (type == Stored::kFloat32) tiles<float>(grad, count, begin, end, largest, norms);
    if (type == Stored::kFloat64) tiles<double>(grad, count, begin, end, largest, norms);
    if (type == Stored::kBFloat16) tiles<BFloat16>(grad, count, begin, end, largest, norms);
    if (type == Stored::kFloat16) tiles<Float16>(grad, count, begin, end, largest, norms);
  }
};

}  // namespace flatstep
