// One update: many segments of memory, cut into equal shares wherever tensors begin and end.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/isa.h"

namespace flatstep {

struct Segment {
  Work work;
  std::int64_t count;  // elements
  Kernel kernel;
  bool clears;  // sets the gradient to zero behind the update
};

struct Gradient {
  const void* data;
  Stored type;
  std::int64_t count;  // elements
};

// A step of fewer elements than this stays on the calling thread.
inline constexpr std::int64_t kElementsPerThread = 1 << 15;

void run_update(const std::vector<Segment>& segments, int threads);

// Of each gradient the sum of squares, or (largest) the largest magnitude; NaN where one is in it.
std::vector<double> run_norms(const std::vector<Gradient>& gradients, bool largest, int threads);

// The same of each tile of each gradient, and how many tiles a gradient of that size has.
std::vector<double> run_tile_norms(const std::vector<Gradient>& gradients, bool largest,
                                   int threads);
std::int64_t tile_count(std::int64_t count);

// Their sum, or (largest) the largest of them, in their order.
double add_norms(const double* norms, std::int64_t count, bool largest);

// Moves count floats of each stream through memory as an update would; the floats should be zero.
void run_traffic(const std::vector<float*>& streams, int written, std::int64_t count, int threads);

}  // namespace flatstep
