// The kernels for any processor: one lane at a time, as the rules are written.
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

extern const Isa kScalar;
constinit const Isa kScalar = {"scalar", &always_supported, &kTables};

}  // namespace flatstep
