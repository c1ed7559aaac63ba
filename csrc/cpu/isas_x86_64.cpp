// The instruction sets of a build for x86-64.
#include "cpu/isa.h"

namespace flatstep {

extern const Isa kAvx512;
extern const Isa kAvx2;
extern const Isa kScalar;

const Isa* const kIsas[] = {&kAvx512, &kAvx2, &kScalar, nullptr};

}  // namespace flatstep
