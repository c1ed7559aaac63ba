// The instruction sets: what one brings, and which is in use.
#pragma once

#include <cstdint>

#include "rules/rules.h"
#include "storage/layouts.h"

namespace flatstep {

// The arrays of one parameter; a state that the variant does not use is null.
struct Arrays {
  void* param;
  const void* grad;
  void* state[kMaxStates];
};

// Updates elements [begin, end) with the scalars that the rule prepared.
using Kernel = void (*)(const Arrays& arrays, std::int64_t begin, std::int64_t end,
                        const double* scalars);

inline constexpr int kMaxStreams = 5;

// Reads that many float arrays and writes the first few back, with next to no arithmetic.
using Traffic = void (*)(float* const* streams, std::int64_t begin, std::int64_t end);

struct Isa {
  const char* name;
  bool (*supported)();
  const Kernel* kernels;   // [Layouts::kCount][kVariants]
  const Traffic* traffic;  // [kMaxStreams + 1][kMaxStreams + 1]: streams read, streams written
};

// The instruction sets of this build, the widest first; null ends the list.
extern const Isa* const kIsas[];

bool always_supported();
bool supports_avx2();
bool supports_avx512();

const Isa& current_isa();

// Throws std::invalid_argument where the name is unknown, or the build or the processor lacks it.
void use_isa(const char* name);

}  // namespace flatstep
