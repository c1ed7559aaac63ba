// SGD with momentum, in torch's form; Nesterov: Sutskever et al., 2013 ("On the importance of
// initialization and momentum in deep learning").
#pragma once

#include "rules/arithmetic.h"

namespace flatstep {

struct SGD {
  static constexpr const char* kName = "sgd";

  enum Hyper { kLr, kMu, kDampening, kWeightDecay, kHyperCount };
  static constexpr const char* kHyperNames[] = {"lr", "momentum", "dampening", "weight_decay"};

  enum Flag : unsigned { kMomentum = 1, kNesterov = 2, kL2 = 4, kFlagEnd = 8 };
  static constexpr const char* kFlagNames[] = {"momentum", "nesterov", "l2"};
  static constexpr bool allows(unsigned flags) {
    return (flags & kMomentum) || !(flags & kNesterov);
  }

  enum State { kMomentumBuffer, kStateCount };
  static constexpr const char* kStateNames[] = {"momentum_buffer"};
  static constexpr bool uses(unsigned flags, int) { return flags & kMomentum; }

  template <class T>
  struct Scalars {
    T scale, weight_decay, kept, added, momentum, lr;
  };

  // On the first step (step 1) the buffer becomes the gradient, whatever the dampening.
  FLATSTEP_INLINE static Scalars<double> prepare(const double* h, std::int64_t step, double scale) {
    const bool first = step == 1;
    return {.scale = scale,
            .weight_decay = h[kWeightDecay],
            .kept = first ? 0 : h[kMu],
            .added = first ? 1 : 1 - h[kDampening],
            .momentum = h[kMu],
            .lr = h[kLr]};
  }

  template <unsigned kFlags, class V>
  FLATSTEP_INLINE static void update(V& p, V g, V* s, const Scalars<V>& k) {
    g = k.scale * g;
    if constexpr (kFlags & kL2) g = g + k.weight_decay * p;
    if constexpr (kFlags & kMomentum) {
      s[kMomentumBuffer] = snap(k.kept * s[kMomentumBuffer] + k.added * g);
      g = kFlags & kNesterov ? g + k.momentum * s[kMomentumBuffer] : s[kMomentumBuffer];
    }
    p = p - k.lr * g;
  }
};

}  // namespace flatstep
