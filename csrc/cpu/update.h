// One update: many segments of memory, cut into equal shares wherever tensors begin and end.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/isa.h"

namespace flatstep {

struct Segment {
  Arrays arrays;
  std::int64_t count;  // elements
  Kernel kernel;
  const double* scalars;  // as the rule prepared them
  void* cleared;          // the gradient to set to zero behind the update, or null
  int cleared_size;       // bytes in an element of it
};

// A step of fewer elements than this stays on the calling thread.
inline constexpr std::int64_t kElementsPerThread = 1 << 15;

void run_update(const std::vector<Segment>& segments, int threads);

// Moves count floats of each stream through memory as an update would; the floats should be zero.
void run_traffic(const std::vector<float*>& streams, int written, std::int64_t count, int threads);

}  // namespace flatstep
