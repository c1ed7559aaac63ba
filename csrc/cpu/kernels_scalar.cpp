// The kernels for any processor: one lane at a time, as the rules are written.
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

extern const Isa kScalar;
constinit const Isa kScalar = {"scalar", &always_supported, kKernels.kernels, kTraffic.traffic};

}  // namespace flatstep
