// A plan: the table of an optimizer's memory, kept between steps, checked against the live
// objects before each one, and the way from there to one update.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <map>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/update.h"
#include "cuda/device.h"
#include "registry.h"
#include "torch_tensor.h"

namespace flatstep {

// What a step on a GPU reads there: addresses, 0 where there is none. numbers: of each group's
// hyper-parameters, and whether it is a double. norm: three doubles, as run_norm() leaves them;
// skips: whether the step is left out where the norm is not finite.
struct DeviceInputs {
  std::uintptr_t stream, grad_scale, found_inf;
  std::vector<std::vector<std::pair<std::uintptr_t, bool>>> numbers;
  std::uintptr_t norm;
  bool skips;
};

// What a group's extras take: the factor of a gradient that is stored back, the decay of averages,
// the seed of chance; and the largest norm on a GPU, negative where there is none.
struct ExtraInputs {
  double unscale = 1, average_decay = 0;
  std::uint64_t seed = 0;
  double max_norm = -1;
};

// Rows stand in the order of the parameter groups. Parameters are known by address and looked up
// in the live groups at every step; they and their gradients are held only while an update runs.
class Plan {
 public:
  explicit Plan(const std::string& rule) : rule_(find_rule(rule)) {}
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() { release(); }

  // Empties the table. variants: of each group, the rule's flags and the extras.
  void begin(const std::vector<unsigned>& variants);
  // A parameter that is updated elsewhere, or (without_gradient) that must have none to be skipped.
  void add_other(int group, pybind11::handle param, bool without_gradient);
  // A parameter that this plan updates. first: the number of its first element, for chance. states:
  // a tensor for each of the variant's states, its
  // master and its average, those that there are. step: a 0-dim float tensor that counts, or None.
  // first_step: whether none has been made, or None where the rule goes by the count.
  // cleared: the gradient that the step is to set to zero, which the caller keeps, or None.
  void add(int group, pybind11::handle param, std::uint32_t first, const pybind11::list& states,
           const pybind11::object& step, std::optional<bool> first_step,
           const pybind11::object& cleared);
  void end(const pybind11::dict& state);

  // Whether the table is still true of the live objects. Takes hold of the gradients if it is.
  bool matches(const pybind11::list& groups, const pybind11::dict& state,
               const std::vector<unsigned>& variants);

  // The parameters that step() will update; matches() has just said true.
  pybind11::list updated() const;

  // The sum of squares, or (largest) the largest magnitude, of all gradients; matches() has just
  // said true. others: the same of each parameter that has one and is updated elsewhere.
  double norm(bool largest, const std::vector<double>& others, int threads);

  // The same of each tile (owns: of each row, how many it has, or 1 for their total), written to a
  // row's place among the slots. Says which rows with a gradient are updated elsewhere: theirs are
  // still to be written.
  std::vector<std::size_t> write_norms(double* slots, const std::vector<std::int64_t>& places,
                                       const std::vector<std::int64_t>& owns, bool largest,
                                       int threads);

  // The same where all rows are on one GPU, where it is under way when this returns. room: as many
  // doubles there as norm_room() says.
  std::int64_t norm_room(int device);
  void norm_on_gpu(int device, bool largest, std::uintptr_t stream, std::uintptr_t room,
                   const cuda::NormEnd& end);

  // One update of all rows whose parameter has a gradient; matches() has just said true. inputs:
  // for each GPU with rows, what is read there. Those updates are under way when this returns.
  // extras: of each group, or none where no group has any.
  void step(const std::vector<std::vector<double>>& hyper, const std::vector<double>& scales,
            int threads, const std::map<int, DeviceInputs>& inputs,
            const std::vector<ExtraInputs>& extras);

  // Whether the table has been through a step since begin().
  bool has_stepped() const { return has_stepped_; }

  // Lets go of the gradients: what matches() found may no longer be true.
  void release();

  // The devices of the rows: GPUs by their numbers, and kCpu.
  std::vector<int> devices() const;

  // How many pieces of memory the last step walked over.
  std::size_t segments() const { return segments_.size(); }

 private:
  enum class Kind { kUpdated, kElsewhere, kWithoutGradient };

  struct Row {
    PyObject* param;
    int group;
    Kind kind;
    bool active = false;
    PyObject* cleared = nullptr;
    int layout = 0;
    Types types = {Stored::kUnknown, Stored::kUnknown, Stored::kUnknown};
    std::uint32_t first = 0;  // of the numbers of its elements
    bool is_complex = false;
    int device = kCpu;
    int dims = 0;
    std::size_t first_dim = 0;  // in dims_: the shape, then the strides
    // In state_tensors_, the step among them.
    std::size_t first_state = 0, state_tensors = 0;
    std::int64_t count = 0;
    Arrays arrays = {};
    void *master = nullptr, *average = nullptr;
    // Where torch's objects were when last seen: good enough to prefetch, never to read.
    const void *param_hint = nullptr, *grad = nullptr, *grad_hint = nullptr;
    void* step = nullptr;  // where torch's state counts
    Stored step_type = Stored::kUnknown;
    bool counts_on_device = false;
    bool first_step = false, goes_by_count = false;
  };

  // What the rows of a group with one count of steps have in common.
  struct Prepared {
    Scalars scalars;
    ExtraNumbers numbers;
  };

  // Rows on a GPU that one launch updates: of a device, a group, a layout, whether gradients are
  // cleared; a count of steps that the host knows, or 0 and the type of those on the device; and
  // the rule's step where it does not go by the count, or 0.
  using BatchKey = std::tuple<int, int, int, bool, std::int64_t, std::int64_t, Stored>;
  struct Batch {
    std::vector<cuda::Row> rows;
    std::int64_t end = 0;
  };

  struct StateEntry {
    PyObject *param, *dict;
    std::size_t first_value, value_count;
    const void* keys_hint;  // of the dict
  };

  unsigned variant_of(const Row& row) const;
  unsigned mask_of(const Row& row) const;   // the states that its variant uses
  std::vector<Gradient> gradients() const;  // of the rows that have one and are updated here
  void prefetch_row(std::size_t at) const;
  static void prefetch_entry(const StateEntry& entry);
  bool everything_matches(const pybind11::list& groups, const pybind11::dict& state,
                          const std::vector<unsigned>& variants);
  bool row_matches(Row& row, PyObject* param);
  bool same_memory_order(const Row& row, const TensorView& view) const;
  bool state_matches(const pybind11::dict& state) const;
  bool states_in_place() const;
  static std::int64_t count_of(const Row& row);  // of its step, from 1
  static std::int64_t step_of(const Row& row);   // as the rule sees it
  void append(const Row& row, const Prepared& prepared);
  const std::vector<cuda::NormRow>& norm_rows(int device);
  void append_to_batch(const Row& row);
  void run_batches(const std::vector<std::vector<double>>& hyper, const std::vector<double>& scales,
                   const std::map<int, DeviceInputs>& inputs,
                   const std::vector<ExtraInputs>& extras);

  const RuleInfo& rule_;
  std::vector<unsigned> variants_;  // of each group: the rule's flags, and extras
  std::vector<Row> rows_;
  std::vector<std::int64_t> dims_;
  HeldTensors state_tensors_;              // of each row, in the rule's order, then its step
  std::vector<StateEntry> state_entries_;  // in the order of the optimizer's state
  std::vector<pybind11::object> state_values_;
  std::vector<PyObject*> held_;
  std::vector<Segment> segments_;
  std::map<std::tuple<int, std::int64_t, std::int64_t>, Prepared> prepared_;
  std::map<BatchKey, Batch> batches_;
  std::map<std::tuple<int, int, int, bool>, cuda::Table> tables_;  // by the first of a key
  std::map<int, cuda::Table> norm_tables_;                         // of each device
  std::vector<cuda::NormRow> norm_rows_;  // of the gradients on that device, where there is one:
  std::optional<int> norm_device_;        // since the last matches()
  bool matched_ = false;                  // by the last call, so that step() may run
  bool running_ = false;                  // something that nothing may come between
  bool has_stepped_ = false;
};

}  // namespace flatstep
