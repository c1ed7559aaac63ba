// The rules, variants and layouts by name and number: what the templates know, for run time.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace flatstep {

using Scalars = std::array<double, kMaxScalars>;

struct RuleInfo {
  std::string name;
  std::vector<std::string> hyper, flags, states;
  std::vector<unsigned> state_masks;  // by flags: bit i for states[i]; of those that are allowed
  std::vector<bool> allowed;          // by flags
  int first_variant;
  Scalars (*prepare)(const double* hyper, std::int64_t step, double scale);
};

const char* name_of(Stored type);

const std::vector<RuleInfo>& rules();
// First those with kernels of their own, then the mixed ones.
const std::vector<Types>& layouts();

// Throws std::invalid_argument with the names that exist.
const RuleInfo& find_rule(const std::string& name);
// The place in layouts(), or -1.
int find_layout(const Types& types);

// Why there is no such variant (a rule's flags and extras) in a layout; empty where there is.
std::string refusal(const RuleInfo& rule, unsigned variant, int layout);

// The kernel of the instruction set in use, for a variant that is not refused.
Kernel find_kernel(const RuleInfo& rule, unsigned variant, int layout);

}  // namespace flatstep
