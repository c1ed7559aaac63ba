// RMSprop: Hinton, lecture 6 of "Neural Networks for Machine Learning", 2012; centered: Graves,
// 2013 (arXiv:1308.0850). As in torch, eps is outside the root.
#pragma once

#include "rules/arithmetic.h"

namespace flatstep {

struct RMSprop {
  static constexpr const char* kName = "rmsprop";

  enum Hyper { kLr, kAlpha, kEps, kWeightDecay, kMu, kHyperCount };
  static constexpr const char* kHyperNames[] = {"lr", "alpha", "eps", "weight_decay", "momentum"};

  enum Flag : unsigned { kMomentum = 1, kCentered = 2, kL2 = 4, kFlagEnd = 8 };
  static constexpr const char* kFlagNames[] = {"momentum", "centered", "l2"};
  static constexpr bool allows(unsigned) { return true; }

  enum State { kSquareAvg, kMomentumBuffer, kGradAvg, kStateCount };
  static constexpr const char* kStateNames[] = {"square_avg", "momentum_buffer", "grad_avg"};
  static constexpr bool uses(unsigned flags, int state) {
    return state == kSquareAvg || (state == kMomentumBuffer && (flags & kMomentum)) ||
           (state == kGradAvg && (flags & kCentered));
  }

  template <class T>
  struct Scalars {
    T scale, weight_decay, alpha, grad_sq_weight, lerp_weight, lerp_side, eps, momentum, lr, zero;
  };

  FLATSTEP_INLINE static Scalars<double> prepare(const double* h, std::int64_t, double scale) {
    const Lerp lerp = prepare_lerp(1 - h[kAlpha]);
    return {.scale = scale,
            .weight_decay = h[kWeightDecay],
            .alpha = h[kAlpha],
            .grad_sq_weight = 1 - h[kAlpha],
            .lerp_weight = lerp.weight,
            .lerp_side = lerp.side,
            .eps = h[kEps],
            .momentum = h[kMu],
            .lr = h[kLr],
            .zero = 0};
  }

  template <unsigned kFlags, class V>
  FLATSTEP_INLINE static void update(V& p, V g, V* s, const Scalars<V>& k) {
    g = k.scale * g;
    if constexpr (kFlags & kL2) g = g + k.weight_decay * p;
    s[kSquareAvg] = snap(k.alpha * s[kSquareAvg] + k.grad_sq_weight * g * g);
    V variance = s[kSquareAvg];
    if constexpr (kFlags & kCentered) {
      s[kGradAvg] = snap(lerp(s[kGradAvg], g, k.lerp_weight, k.lerp_side));
      // Rounding can take the difference below zero, where torch's root is NaN.
      variance = maximum(variance - s[kGradAvg] * s[kGradAvg], k.zero);
    }
    const V average = root(variance) + k.eps;
    if constexpr (kFlags & kMomentum) {
      s[kMomentumBuffer] = snap(k.momentum * s[kMomentumBuffer] + g / average);
      p = p - k.lr * s[kMomentumBuffer];
    } else {
      p = p - k.lr * g / average;
    }
  }
};

}  // namespace flatstep
