// The kernels for AVX2 with F16C.
#include "cpu/kernel.h"
#include "vec/avx2.h"

namespace flatstep {
namespace {

struct Target {
  template <class T>
  using Value = PerType<T, avx2::F32, avx2::F64>;
  using AllBFloat16 = Pair<avx2::F32>;
};

constexpr KernelTable kKernels = KernelTableMaker<Target>::make();
constexpr TrafficTable kTraffic = make_traffic<Target>();

}  // namespace

extern const Isa kAvx2;
constinit const Isa kAvx2 = {"avx2", &supports_avx2, kKernels.kernels, kTraffic.traffic};

}  // namespace flatstep
