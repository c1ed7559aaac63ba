// The kernels for AVX-512.
#include "cpu/tables.h"
#include "vec/avx512.h"

namespace flatstep {
namespace {

struct Target {
  template <class T>
  using Value = PerType<T, avx512::F32, avx512::F64>;
  using AllBFloat16 = Pair<avx512::F32>;
};

constexpr KernelTables kTables = TablesMaker<Target>::make();

}  // namespace

extern const Isa kAvx512;
constinit const Isa kAvx512 = {"avx512", &supports_avx512, &kTables};

}  // namespace flatstep
