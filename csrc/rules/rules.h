// The list of rules. Dispatch, bindings, tests, verify and profile walk over it.
#pragma once

#include "rules/adam.h"
#include "rules/list.h"
#include "rules/rmsprop.h"
#include "rules/sgd.h"

namespace flatstep {

using Rules = List<Adam, RMSprop, SGD>;

inline constexpr int kMaxStates = 3;
inline constexpr int kMaxScalars = 10;

// A variant is a rule with its flags; each has its place in a table of kernels.
template <class... Rule>
constexpr int count_variants(List<Rule...>) {
  return (0 + ... + static_cast<int>(Rule::kFlagEnd));
}
inline constexpr int kVariants = count_variants(Rules{});

}  // namespace flatstep
