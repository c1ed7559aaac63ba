// The instruction sets of a build for x86-64 that also measures what the compiler makes of the
// scalar loop.
#include "cpu/isa.h"

namespace flatstep {

extern const Isa kAvx512;
extern const Isa kAvx2;
extern const Isa kAvx512Auto;
extern const Isa kAvx2Auto;
extern const Isa kScalar;

const Isa* const kIsas[] = {&kAvx512, &kAvx2, &kAvx512Auto, &kAvx2Auto, &kScalar, nullptr};

}  // namespace flatstep
