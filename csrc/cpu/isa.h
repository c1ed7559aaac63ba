// The instruction sets: what one brings, and which is in use.
#pragma once

#include <cstdint>

#include "rules/rules.h"
#include "storage/extras.h"
#include "storage/layouts.h"

namespace flatstep {

// The arrays of one parameter; a state that the variant does not use is null.
struct Arrays {
  void* param;
  const void* grad;
  void* state[kMaxStates];
};

// What a kernel is told of one parameter, or of several that lie side by side.
struct Work {
  Arrays arrays;
  const double* scalars;  // as the rule prepared them
  // What only a mixed kernel reads.
  Types types;
  unsigned extras;
  void* master;         // float32, or the 16 more bits
  void* average;        // in the type that the rule computes in
  std::uint32_t first;  // of the numbers that chance counts elements with
  ExtraNumbers numbers;
};

// Updates elements [begin, end).
using Kernel = void (*)(const Work& work, std::int64_t begin, std::int64_t end);

// Elements of a gradient that a partial norm is over, from the gradient's start; and the sums that
// they are added up in, each element in the one of its place modulo their number.
inline constexpr std::int64_t kNormTile = 16384;
inline constexpr int kNormLanes = 32;

// The sum of squares, or (largest) the largest magnitude, of each tile in [begin, end) of the
// gradient with that many elements.
using TileNorms = void (*)(const void* grad, Stored type, std::int64_t count, std::int64_t begin,
                           std::int64_t end, bool largest, double* norms);

inline constexpr int kMaxStreams = 5;

// Reads that many float arrays and writes the first few back, with next to no arithmetic.
using Traffic = void (*)(float* const* streams, std::int64_t begin, std::int64_t end);

struct KernelTables {
  Kernel kernels[Layouts::kCount * kVariants];
  Kernel mixed[2 * kVariants];  // computed in float, in double
  TileNorms norms;
  Traffic traffic[(kMaxStreams + 1) * (kMaxStreams + 1)];  // by streams read, streams written
};

struct Isa {
  const char* name;
  bool (*supported)();
  const KernelTables* tables;
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
