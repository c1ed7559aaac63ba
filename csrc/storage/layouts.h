// The list of layouts: which stored types of parameter, gradient and states go together, and the
// type that the rules compute in.
#pragma once

#include "rules/list.h"
#include "storage/storage.h"

namespace flatstep {

template <class P, class G, class S, class T>
struct Layout {
  using Param = P;
  using Grad = G;
  using State = S;
  using Compute = T;
};

using AllFloat32 = Layout<float, float, float, float>;
using AllFloat64 = Layout<double, double, double, double>;
using AllBFloat16 = Layout<BFloat16, BFloat16, BFloat16, float>;
using AllFloat16 = Layout<Float16, Float16, Float16, float>;

using Layouts = List<AllFloat32, AllFloat64, AllBFloat16, AllFloat16>;

}  // namespace flatstep
