// The yardstick for AVX-512: the scalar loop, vectorised by the compiler with the set's flags.
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

extern const Isa kAvx512Auto;
constinit const Isa kAvx512Auto = {"avx512-auto", &supports_avx512, &kTables};

}  // namespace flatstep
