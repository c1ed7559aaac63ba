// The kernels for AVX2 with F16C.
#include "cpu/tables.h"
#include "vec/avx2.h"

namespace flatstep {
namespace {

struct Target {
  template <class T>
  using Value = PerType<T, avx2::F32, avx2::F64>;
  using AllBFloat16 = Pair<avx2::F32>;
};

constexpr KernelTables kTables = TablesMaker<Target>::make();

}  // namespace

extern const Isa kAvx2;
constinit const Isa kAvx2 = {"avx2", &supports_avx2, &kTables};

}  // namespace flatstep
