// The kernels for AVX-512.
#include "cpu/kernel.h"
#include "vec/avx512.h"

namespace flatstep {
namespace {

struct Target {
  template <class T>
  using Value = PerType<T, avx512::F32, avx512::F64>;
  using AllBFloat16 = Pair<avx512::F32>;
};

constexpr KernelTable kKernels = KernelTableMaker<Target>::make();
constexpr TrafficTable kTraffic = make_traffic<Target>();

}  // namespace

extern const Isa kAvx512;
constinit const Isa kAvx512 = {"avx512", &supports_avx512, kKernels.kernels, kTraffic.traffic};

}  // namespace flatstep
