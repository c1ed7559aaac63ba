// The kernels for NEON.
#include "cpu/tables.h"
#include "vec/neon.h"

namespace flatstep {
namespace {

struct Target {
  template <class T>
  using Value = PerType<T, neon::F32, neon::F64>;
  using AllBFloat16 = Pair<neon::F32>;
};

constexpr KernelTables kTables = TablesMaker<Target>::make();

}  // namespace

extern const Isa kNeon;
constinit const Isa kNeon = {"neon", &always_supported, &kTables};

}  // namespace flatstep
