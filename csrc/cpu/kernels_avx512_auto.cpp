// The yardstick for AVX-512: the scalar loop, vectorised by the compiler with the set's flags.
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

extern const Isa kAvx512Auto;
constinit const Isa kAvx512Auto = {"avx512-auto", &supports_avx512, kKernels.kernels,
                                   kTraffic.traffic};

}  // namespace flatstep
