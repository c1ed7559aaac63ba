#include "registry.h"

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
std::vector<LayoutInfo> describe_all_layouts(List<Layout...>) {
  return {{stored<typename Layout::Param>(), stored<typename Layout::Grad>(),
           stored<typename Layout::State>()}...};
}

}  // namespace

const char* name_of(Stored type) {
  constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16", "unknown"};
  return kNames[static_cast<int>(type)];
}

int size_of(Stored type) {
  constexpr int kSizes[] = {4, 8, 2, 2, 0};
  return kSizes[static_cast<int>(type)];
}

const std::vector<RuleInfo>& rules() {
  static const auto* infos = new std::vector<RuleInfo>(describe_all(Rules{}));
  return *infos;
}

const std::vector<LayoutInfo>& layouts() {
  static const auto* infos = new std::vector<LayoutInfo>(describe_all_layouts(Layouts{}));
  return *infos;
}

const RuleInfo& find_rule(const std::string& name) {
  std::string names;
  for (const RuleInfo& rule : rules()) {
    if (rule.name == name) return rule;
    names += (names.empty() ? "" : ", ") + rule.name;
  }
  throw std::invalid_argument("no rule '" + name + "'; there are: " + names);
}

int find_layout(const LayoutInfo& layout) {
  int at = 0;
  for (const LayoutInfo& known : layouts()) {
    if (known.param == layout.param && known.grad == layout.grad && known.state == layout.state) {
      return at;
    }
    ++at;
  }
  return -1;
}

Kernel find_kernel(const RuleInfo& rule, unsigned flags, int layout) {
  return current_isa().kernels[layout * kVariants + rule.first_variant + static_cast<int>(flags)];
}

}  // namespace flatstep
