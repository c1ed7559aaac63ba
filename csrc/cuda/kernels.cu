#include "cuda/kernel.h"
#include "cuda/kernels.h"

namespace flatstep::cuda {
namespace {

struct KernelTable {
  const void* kernels[Layouts::kCount * kVariants];
};

class KernelTableMaker {
 public:
  static KernelTable make() {
    KernelTableMaker maker;
    maker.add_layouts(Layouts{});
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
        kernel = reinterpret_cast<const void*>(&update<Rule, kFlags, Layout>);
      }
      add_flags<Layout, Rule, kFlags + 1>();
    }
  }

  KernelTable table_ = {};
  int next_ = 0;
};

}  // namespace

const void* find_kernel(int layout, int variant) {
  static const KernelTable table = KernelTableMaker::make();
  return table.kernels[layout * kVariants + variant];
}

const void* count_kernel() { return reinterpret_cast<const void*>(&count<>); }

}  // namespace flatstep::cuda
