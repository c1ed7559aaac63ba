// The yardstick for AVX2: the scalar loop, vectorised by the compiler with the set's flags.
#include "cpu/kernel.h"
#include "vec/scalar.h"

namespace flatstep {
namespace {

struct Target {
  template <class T>
  using Value = PerType<T, float, double>;
  using AllBFloat16 = float;
};

constexpr KernelTable kKernels = KernelTableMaker<Target>::make();
constexpr TrafficTable kTraffic = make_traffic<Target>();

}  // namespace

extern const Isa kAvx2Auto;
constinit const Isa kAvx2Auto = {"avx2-auto", &supports_avx2, kKernels.kernels, kTraffic.traffic};

}  // namespace flatstep
