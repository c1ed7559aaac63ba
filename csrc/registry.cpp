#include "registry.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "cpu/floating_point.h"

namespace flatstep {
namespace {

template <class Rule>
Scalars prepare(const double* hyper, std::int64_t step, double scale) {
  const IeeeMode ieee;
  const auto prepared = Rule::prepare(hyper, step, scale);
  static_assert(sizeof prepared <= sizeof(Scalars));
  Scalars scalars = {};
  std::memcpy(scalars.data(), &prepared, sizeof prepared);
  return scalars;
}

template <class Rule>
RuleInfo describe(int first_variant) {
  static_assert(Rule::kStateCount <= kMaxStates);
  RuleInfo info{.name = Rule::kName,
                .hyper = {std::begin(Rule::kHyperNames), std::end(Rule::kHyperNames)},
                .flags = {std::begin(Rule::kFlagNames), std::end(Rule::kFlagNames)},
                .states = {std::begin(Rule::kStateNames), std::end(Rule::kStateNames)},
                .state_masks = {},
                .allowed = {},
                .first_variant = first_variant,
                .prepare = &prepare<Rule>};
  for (unsigned flags = 0; flags < Rule::kFlagEnd; ++flags) {
    unsigned mask = 0;
    for (int i = 0; i < Rule::kStateCount; ++i) mask |= Rule::uses(flags, i) ? 1U << i : 0U;
    info.state_masks.push_back(mask);
    info.allowed.push_back(Rule::allows(flags));
  }
  return info;
}

template <class... Rule>
std::vector<RuleInfo> describe_all(List<Rule...>) {
  std::vector<RuleInfo> infos;
  int first = 0;
  ((infos.push_back(describe<Rule>(first)), first += static_cast<int>(Rule::kFlagEnd)), ...);
  return infos;
}

template <class T>
constexpr Stored stored() {
  if constexpr (std::is_same_v<T, float>) return Stored::kFloat32;
  if constexpr (std::is_same_v<T, double>) return Stored::kFloat64;
  if constexpr (std::is_same_v<T, BFloat16>) return Stored::kBFloat16;
  if constexpr (std::is_same_v<T, Float16>) return Stored::kFloat16;
}

template <class... Layout>
std::vector<Types> describe_all_layouts(List<Layout...>) {
  std::vector<Types> all = {{stored<typename Layout::Param>(), stored<typename Layout::Grad>(),
                             stored<typename Layout::State>()}...};
  all.insert(all.end(), std::begin(kMixedLayouts), std::end(kMixedLayouts));
  return all;
}

}  // namespace

const char* name_of(Stored type) {
  constexpr const char* kNames[] = {"float32", "float64", "bfloat16",
                                    "float16", "int16",   "unknown"};
  return kNames[static_cast<int>(type)];
}

const std::vector<RuleInfo>& rules() {
  static const auto* infos = new std::vector<RuleInfo>(describe_all(Rules{}));
  return *infos;
}

const std::vector<Types>& layouts() {
  static const auto* all = new std::vector<Types>(describe_all_layouts(Layouts{}));
  return *all;
}

const RuleInfo& find_rule(const std::string& name) {
  std::string names;
  for (const RuleInfo& rule : rules()) {
    if (rule.name == name) return rule;
    names += (names.empty() ? "" : ", ") + rule.name;
  }
  throw std::invalid_argument("no rule '" + name + "'; there are: " + names);
}

int find_layout(const Types& types) {
  const auto found = std::find(layouts().begin(), layouts().end(), types);
  return found == layouts().end() ? -1 : static_cast<int>(found - layouts().begin());
}

std::string refusal(const RuleInfo& rule, unsigned variant, int layout) {
  const unsigned flags = variant & kFlagMask, extras = variant & ~kFlagMask;
  if (flags >= rule.allowed.size() || !rule.allowed[flags] || extras & ~kExtraMask) {
    return "rule '" + rule.name + "' has no variant " + std::to_string(variant);
  }
  if (layout < 0 || layout >= static_cast<int>(layouts().size())) return "no such layout";
  const Stored param = layouts()[static_cast<std::size_t>(layout)].param;
  if (extras & kMasterCopy && param != Stored::kBFloat16 && param != Stored::kFloat16) {
    return "only 16-bit parameters have a master copy";
  }
  if (extras & (kMasterSplit | kStochastic) && param != Stored::kBFloat16) {
    return "only bfloat16 parameters have a split master or are rounded by chance";
  }
  if (std::popcount(extras & (kMaster | kStochastic)) > 1) {
    return "a master copy, a split master and chance exclude each other";
  }
  return "";
}

Kernel find_kernel(const RuleInfo& rule, unsigned variant, int layout) {
  const int at = rule.first_variant + static_cast<int>(variant & kFlagMask);
  const KernelTables& tables = *current_isa().tables;
  if (layout < Layouts::kCount && !(variant & kExtraMask)) {
    return tables.kernels[layout * kVariants + at];
  }
  const bool in_double = layouts()[static_cast<std::size_t>(layout)].param == Stored::kFloat64;
  return tables.mixed[(in_double ? kVariants : 0) + at];
}

}  // namespace flatstep
