// The places of variants in a table of kernels.
#pragma once

#include "rules/rules.h"

namespace flatstep::cuda {

template <class Rule, unsigned kFlags, class Visit>
void visit_flags(int place, const Visit& visit) {
  if constexpr (kFlags < Rule::kFlagEnd) {
    if constexpr (Rule::allows(kFlags)) visit.template operator()<Rule, kFlags>(place);
    visit_flags<Rule, kFlags + 1>(place + 1, visit);
  }
}

// Calls visit<Rule, kFlags>(place) for each variant that a rule allows.
template <class... Rule, class Visit>
void visit_variants(List<Rule...>, const Visit& visit) {
  int place = 0;
  ((visit_flags<Rule, 0>(place, visit), place += static_cast<int>(Rule::kFlagEnd)), ...);
}

// Calls visit<Layout>(place) for each layout.
template <class... Layout, class Visit>
void visit_layouts(List<Layout...>, const Visit& visit) {
  int place = 0;
  (visit.template operator()<Layout>(place++), ...);
}

}  // namespace flatstep::cuda
