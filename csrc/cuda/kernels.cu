#include "cuda/kernel.h"
#include "cuda/kernels.h"
#include "cuda/mixed.h"
#include "cuda/norm.h"
#include "cuda/variants.h"

namespace flatstep::cuda {
namespace {

struct KernelTable {
  const void* kernels[Layouts::kCount][kVariants];
  const void* mixed[2][kVariants];  // computed in float, in double
};

template <class L>
const void* update_by() {
  return reinterpret_cast<const void*>(&update<L>);
}

KernelTable make_table() {
  KernelTable table = {};
  visit_layouts(Layouts{}, [&]<class Layout>(int layout) {
    visit_variants(Rules{}, [&]<class Rule, unsigned kFlags>(int variant) {
      table.kernels[layout][variant] = update_by<Loop<Rule, kFlags, Layout>>();
    });
  });
  visit_variants(Rules{}, [&]<class Rule, unsigned kFlags>(int variant) {
    table.mixed[0][variant] = update_by<MixedLoop<Rule, kFlags, float>>();
    table.mixed[1][variant] = update_by<MixedLoop<Rule, kFlags, double>>();
  });
  return table;
}

}  // namespace

const void* find_kernel(int layout, int variant, const Launch& launch) {
  static const KernelTable table = make_table();
  if (layout < Layouts::kCount && !launch.extras) return table.kernels[layout][variant];
  return table.mixed[launch.types.param == Stored::kFloat64][variant];
}

const void* count_kernel() { return reinterpret_cast<const void*>(&count<>); }

const void* tile_norm_kernel() { return reinterpret_cast<const void*>(&norms_of_tiles<>); }
const void* row_norm_kernel() { return reinterpret_cast<const void*>(&norms_of_rows<>); }
const void* norm_end_kernel() { return reinterpret_cast<const void*>(&end_norm<>); }

}  // namespace flatstep::cuda
