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

// The types that memory can hold, by the names that torch gives them.
enum class Stored { kFloat32, kFloat64, kBFloat16, kFloat16, kUnknown };
const char* name_of(Stored type);
int size_of(Stored type);

struct LayoutInfo {
  Stored param, grad, state;
};

const std::vector<RuleInfo>& rules();
const std::vector<LayoutInfo>& layouts();

// Throws std::invalid_argument with the names that exist.
const RuleInfo& find_rule(const std::string& name);
// The place in layouts(), or -1.
int find_layout(const LayoutInfo& layout);

// The kernel of the instruction set in use. flags must be allowed.
Kernel find_kernel(const RuleInfo& rule, unsigned flags, int layout);

}  // namespace flatstep
