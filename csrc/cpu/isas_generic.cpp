// The instruction sets of a build for any other processor.
#include "cpu/isa.h"

namespace flatstep {

extern const Isa kScalar;

const Isa* const kIsas[] = {&kScalar, nullptr};

}  // namespace flatstep
