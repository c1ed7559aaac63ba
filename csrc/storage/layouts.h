// The lists of layouts: which stored types of parameter, gradient and states go together, and the
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

// Those with kernels of their own.
using Layouts = List<AllFloat32, AllFloat64, AllBFloat16, AllFloat16>;

struct Types {
  Stored param, grad, state;

  friend bool operator==(const Types&, const Types&) = default;
};

// Those that one kernel, which looks at the types as it runs, updates: computed in float.
inline constexpr Types kMixedLayouts[] = {
    {Stored::kFloat32, Stored::kFloat32, Stored::kBFloat16},
    {Stored::kFloat32, Stored::kBFloat16, Stored::kFloat32},
    {Stored::kFloat32, Stored::kBFloat16, Stored::kBFloat16},
    {Stored::kFloat32, Stored::kFloat16, Stored::kFloat32},
    {Stored::kFloat32, Stored::kFloat16, Stored::kBFloat16},
    {Stored::kBFloat16, Stored::kBFloat16, Stored::kFloat32},
    {Stored::kBFloat16, Stored::kFloat32, Stored::kBFloat16},
    {Stored::kBFloat16, Stored::kFloat32, Stored::kFloat32},
    {Stored::kFloat16, Stored::kFloat16, Stored::kFloat32},
    {Stored::kFloat16, Stored::kFloat16, Stored::kBFloat16},
    {Stored::kFloat16, Stored::kFloat32, Stored::kFloat16},
    {Stored::kFloat16, Stored::kFloat32, Stored::kFloat32},
    {Stored::kFloat16, Stored::kFloat32, Stored::kBFloat16},
};

}  // namespace flatstep
