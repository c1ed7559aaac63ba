// The yardstick for AVX2: the scalar loop, vectorised by the compiler with the set's flags.
#include "cpu/tables.h"
#include "vec/scalar.h"

namespace flatstep {
namespace {

struct Target {
  template <class T>
  using Value = PerType<T, float, double>;
  using AllBFloat16 = float;
};

constexpr KernelTables kTables = TablesMaker<Target>::make();

}  // namespace

extern const Isa kAvx2Auto;
constinit const Isa kAvx2Auto = {"avx2-auto", &supports_avx2, &kTables};

}  // namespace flatstep
