// What one launch is told: some rows of parameters, their rule's numbers, and where on the device
// the rest of them is. Passed to the kernel by value, so that a captured graph keeps it.
#pragma once

#include <cstdint>
#include <type_traits>

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
  std::uint32_t unused = 0;  // tables are compared as bytes, which padding would not keep
};
static_assert(std::has_unique_object_representations_v<Row>);

inline std::int64_t end_of(const Row& row) {
  return row.begin + (row.count + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
}

// A number that is either known to the host or read on the device, where a graph may be captured.
struct Number {
  double value;
  const void* at;  // null: value
  bool is_double;  // of what is at
};

// A norm on the device, and what came of it.
struct FoundNorm {
  double total;    // the sum of squares, or the largest magnitude
  double norm;     // what it is the norm of, without the loss scale
  double skipped;  // how many steps have been left out for one that was not finite
};

// The stages of shared memory that the bulk form has, and its tiles: bytes of each array.
struct Pipeline {
  int stages, tile;

  friend bool operator==(const Pipeline&, const Pipeline&) = default;
};
inline constexpr int kMostStages = 8;
inline constexpr int kTileMultiple = 512;  // the bytes of kRowAlignment elements of any type

inline constexpr int kInlineRows = 42;  // a launch's arguments end at 4 KiB in older drivers

struct Launch {
  const Row* rows;  // on the device; null: inline_rows
  int row_count;
  bool step_is_double;
  bool clears;             // sets the gradients to zero behind the update
  bool skips;              // does nothing where the norm is not finite
  std::int64_t total;      // elements of all rows, with the gaps of their alignment
  std::int64_t host_step;  // where a row has no step on the device
  std::int64_t rule_step;  // what the rule takes for the step; 0: the row's
  Number hyper[kMaxHyper];
  double sign;  // -1 maximizes
  const float* grad_scale;
  const float* found_inf;
  const FoundNorm* norm;  // of all gradients, where they are clipped or a step is skipped for it
  double max_norm;        // negative: of this group they are not clipped
  Types types;
  unsigned extras;
  double unscale;  // where there is no grad_scale
  double average_decay;
  std::uint64_t seed;
  Pipeline pipeline;
  Row inline_rows[kInlineRows];
};
static_assert(sizeof(Launch) <= 4096);

// A gradient, as far as its norm is concerned.
struct NormRow {
  const void* grad;
  std::int64_t begin;  // its first tile among all gradients'
  std::int64_t count;  // elements
  Stored type;
  std::uint32_t unused = 0;
};
static_assert(std::has_unique_object_representations_v<NormRow>);

FLATSTEP_INLINE std::int64_t end_of(const NormRow& row) {
  return row.begin + (row.count + kNormTile - 1) / kNormTile;
}

inline constexpr int kInlineNormRows = 120;

// The norms of some gradients: of each tile, then of each gradient.
struct NormLaunch {
  const NormRow* rows;  // on the device; null: inline_rows
  int row_count;
  bool largest;
  std::int64_t begin, end;  // their tiles
  double* of_tiles;         // of all gradients
  double* of_rows;          // of these
  NormRow inline_rows[kInlineNormRows];
};
static_assert(sizeof(NormLaunch) <= 4096);

// What becomes of the norms of all gradients.
struct NormEnd {
  const double* of_rows;
  std::int64_t row_count;
  FoundNorm* found;
  float* overflow;  // set to 1 where the total is not finite, else to 0; null: nobody asks
  const float* grad_scale;
  const float* found_inf;
  bool largest;
  bool adds;    // makes the total of the rows, else it is there already
  bool judges;  // makes the norm of the total, unless there is an overflow already
  bool skips;   // counts a norm that is not finite
};

}  // namespace flatstep::cuda
