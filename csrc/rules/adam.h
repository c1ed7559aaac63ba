// Adam and AdamW: Kingma and Ba, 2015 (arXiv:1412.6980); amsgrad: Reddi et al., 2018
// (arXiv:1904.09237); decoupled decay: Loshchilov and Hutter, 2019 (arXiv:1711.05101).
#pragma once

#include "rules/arithmetic.h"

namespace flatstep {

struct Adam {
  static constexpr const char* kName = "adam";

  enum Hyper { kLr, kBeta1, kBeta2, kEps, kWeightDecay, kHyperCount };
  static constexpr const char* kHyperNames[] = {"lr", "beta1", "beta2", "eps", "weight_decay"};

  // Without kL2 the decay is decoupled: a factor on the parameter, 1 where there is none.
  enum Flag : unsigned { kAmsgrad = 1, kL2 = 2, kFlagEnd = 4 };
  static constexpr const char* kFlagNames[] = {"amsgrad", "l2"};
  static constexpr bool allows(unsigned) { return true; }

  enum State { kExpAvg, kExpAvgSq, kMaxExpAvgSq, kStateCount };
  static constexpr const char* kStateNames[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
  static constexpr bool uses(unsigned flags, int state) {
    return state != kMaxExpAvgSq || (flags & kAmsgrad);
  }

  template <class T>
  struct Scalars {
    T scale, weight_decay, decay, lerp_weight, lerp_side, beta2, grad_sq_weight, step_size,
        root_scale, eps;
  };

  // step counts from 1; scale multiplies the gradient (-1 maximizes).
  FLATSTEP_INLINE static Scalars<double> prepare(const double* h, std::int64_t step, double scale) {
    const Lerp lerp = prepare_lerp(1 - h[kBeta1]);
    return {.scale = scale,
            .weight_decay = h[kWeightDecay],
            .decay = 1 - h[kLr] * h[kWeightDecay],
            .lerp_weight = lerp.weight,
            .lerp_side = lerp.side,
            .beta2 = h[kBeta2],
            .grad_sq_weight = 1 - h[kBeta2],
            .step_size = h[kLr] / (1 - power(h[kBeta1], step)),
            .root_scale = 1 / root(1 - power(h[kBeta2], step)),
            .eps = h[kEps]};
  }

  template <unsigned kFlags, class V>
  FLATSTEP_INLINE static void update(V& p, V g, V* s, const Scalars<V>& k) {
    g = k.scale * g;
    if constexpr (kFlags & kL2) {
      g = g + k.weight_decay * p;
    } else {
      p = k.decay * p;
    }
    s[kExpAvg] = snap(lerp(s[kExpAvg], g, k.lerp_weight, k.lerp_side));
    s[kExpAvgSq] = snap(k.beta2 * s[kExpAvgSq] + k.grad_sq_weight * g * g);
    V v = s[kExpAvgSq];
    if constexpr (kFlags & kAmsgrad) {
      v = s[kMaxExpAvgSq] = snap(maximum(s[kMaxExpAvgSq], v));
    }
    p = p - k.step_size * s[kExpAvg] / (root(v) * k.root_scale + k.eps);
  }
};

}  // namespace flatstep
