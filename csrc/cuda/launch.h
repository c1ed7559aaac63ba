// What one launch is told: some rows of parameters, their rule's numbers, and where on the device
// the rest of them is. Passed to the kernel by value, so that a captured graph keeps it.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "storage/extras.h"

namespace flatstep::cuda {

inline constexpr int kNoDevice = -1;
inline constexpr int kMaxHyper = 5;
// Rows begin at multiples of this in the count that is shared out, so that a share begins at a
// multiple of it within its row.
inline constexpr std::int64_t kRowAlignment = 64;

// A parameter, or several that lie side by side.
struct Row {
  Arrays arrays;
  std::int64_t begin;  // where it begins among all rows, in elements
  std::int64_t count;
  void* step;  // where its state counts on the device, or null
  // What only a mixed kernel reads, as in Work.
  void *master, *average;
  std::uint32_t first;
};

inline std::int64_t end_of(const Row& row) {
  return row.begin + (row.count + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
}

// A number that is either known to the host or read on the device, where a graph may be captured.
struct Number {
  double value;
  const void* at;  // null: value
  bool is_double;  // of what is at
};

inline constexpr int kInlineRows = 43;  // a launch's arguments end at 4 KiB in older drivers

struct Launch {
  const Row* rows;  // on the device; null: inline_rows
  int row_count;
  bool step_is_double;
  bool clears;             // sets the gradients to zero behind the update
  std::int64_t total;      // elements of all rows, with the gaps of their alignment
  std::int64_t host_step;  // where a row has no step on the device
  std::int64_t rule_step;  // what the rule takes for the step; 0: the row's
  Number hyper[kMaxHyper];
  double sign;  // -1 maximizes
  const float* grad_scale;
  const float* found_inf;
  Types types;
  unsigned extras;
  double unscale;  // where there is no grad_scale
  double average_decay;
  std::uint64_t seed;
  Row inline_rows[kInlineRows];
};
static_assert(sizeof(Launch) <= 4096);

}  // namespace flatstep::cuda
