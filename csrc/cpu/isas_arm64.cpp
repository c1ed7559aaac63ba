// The instruction sets of a build for 64-bit Arm.
#include "cpu/isa.h"

namespace flatstep {

extern const Isa kNeon;
extern const Isa kScalar;

const Isa* const kIsas[] = {&kNeon, &kScalar, nullptr};

}  // namespace flatstep
