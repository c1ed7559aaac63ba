// The kernels for NEON.
#include "cpu/kernel.h"
#include "vec/neon.h"

namespace flatstep {
namespace {

struct Target {
  template <class T>
  using Value = PerType<T, neon::F32, neon::F64>;
  using AllBFloat16 = Pair<neon::F32>;
};

constexpr KernelTable kKernels = KernelTableMaker<Target>::make();
constexpr TrafficTable kTraffic = make_traffic<Target>();

}  // namespace

extern const Isa kNeon;
constinit const Isa kNeon = {"neon", &always_supported, kKernels.kernels, kTraffic.traffic};

}  // namespace flatstep
