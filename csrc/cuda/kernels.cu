#include "cuda/kernel.h"
#include "cuda/kernels.h"
#include "cuda/mixed.h"
#include "cuda/norm.h"

namespace flatstep::cuda {
namespace {

struct KernelTable {
  const void* kernels[Layouts::kCount * kVariants];
  const void* mixed[2 * kVariants];  // computed in float, in double
};

class KernelTableMaker {
 public:
  static KernelTable make() {
    KernelTableMaker maker;
    maker.add_layouts(Layouts{});
    maker.next_ = 0;
    maker.add_mixed<float>(Rules{});
    maker.add_mixed<double>(Rules{});
    return maker.table_;
  }

 private:
  template <class... Layout>
  void add_layouts(List<Layout...>) {
    (add_rules<Layout>(Rules{}), ...);
  }

  template <class Layout, class... Rule>
  void add_rules(List<Rule...>) {
    (add_flags<Layout, Rule, 0>(), ...);
  }

  template <class Layout, class Rule, unsigned kFlags>
  void add_flags() {
    if constexpr (kFlags < Rule::kFlagEnd) {
      const void*& kernel = table_.kernels[next_++];
      if constexpr (Rule::allows(kFlags)) {
        kernel = reinterpret_cast<const void*>(&update<Loop<Rule, kFlags, Layout>>);
      }
      add_flags<Layout, Rule, kFlags + 1>();
    }
  }

  template <class V, class... Rule>
  void add_mixed(List<Rule...>) {
    (add_mixed_flags<V, Rule, 0>(), ...);
  }

  template <class V, class Rule, unsigned kFlags>
  void add_mixed_flags() {
    if constexpr (kFlags < Rule::kFlagEnd) {
      const void*& kernel = table_.mixed[next_++];
      if constexpr (Rule::allows(kFlags)) {
        kernel = reinterpret_cast<const void*>(&update<MixedLoop<Rule, kFlags, V>>);
      }
      add_mixed_flags<V, Rule, kFlags + 1>();
    }
  }

  KernelTable table_ = {};
  int next_ = 0;
};

}  // namespace

const void* find_kernel(int layout, int variant, const Launch& launch) {
  static const KernelTable table = KernelTableMaker::make();
  if (layout < Layouts::kCount && !launch.extras) {
    return table.kernels[layout * kVariants + variant];
  }
  return table.mixed[(launch.types.param == Stored::kFloat64 ? kVariants : 0) + variant];
}

const void* count_kernel() { return reinterpret_cast<const void*>(&count<>); }

const void* tile_norm_kernel() { return reinterpret_cast<const void*>(&norms_of_tiles<>); }
const void* row_norm_kernel() { return reinterpret_cast<const void*>(&norms_of_rows<>); }
const void* norm_end_kernel() { return reinterpret_cast<const void*>(&end_norm<>); }

}  // namespace flatstep::cuda
