#include "plan.h"

#include <algorithm>
#include <bit>
#include <stdexcept>
#include <utility>

#include "cpu/floating_point.h"
#include "cpu/threads.h"
#include "gil.h"

namespace flatstep {
namespace {

namespace py = pybind11;

PyObject* name(const char* text) { return PyUnicode_InternFromString(text); }

bool same_placements(PyObject* a, PyObject* b) {
  static PyObject* const kPlacements = name("placements");
  const auto first = py::reinterpret_steal<py::object>(PyObject_GetAttr(a, kPlacements));
  const auto second = py::reinterpret_steal<py::object>(PyObject_GetAttr(b, kPlacements));
  if (!first || !second) throw py::error_already_set();
  return first.equal(second);
}

constexpr const char* kInUse = "step() of this optimizer is running in another thread";

constexpr std::size_t kRowsAhead = 6;

// True while it lives.
class Flag {
 public:
  explicit Flag(bool& flag) : flag_(flag) { flag_ = true; }
  ~Flag() { flag_ = false; }
  Flag(const Flag&) = delete;
  Flag& operator=(const Flag&) = delete;

 private:
  bool& flag_;
};

template <class T>
bool adjoin(T* first, std::int64_t bytes, T* second) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return static_cast<Byte*>(first) + bytes == static_cast<Byte*>(second);
}

// Whether each array of the second begins where the first's ends, after that many elements.
bool adjoin(const Arrays& first, std::int64_t count, const Arrays& second, const Types& types) {
  bool all = adjoin(first.param, count * size_of(types.param), second.param) &&
             adjoin(first.grad, count * size_of(types.grad), second.grad);
  for (int i = 0; all && i < kMaxStates; ++i) {
    all = !second.state[i] || adjoin(first.state[i], count * size_of(types.state), second.state[i]);
  }
  return all;
}

// The same of all that a kernel on the CPU is told.
bool adjoin(const Work& first, std::int64_t count, const Work& second) {
  if (first.scalars != second.scalars || first.extras != second.extras ||
      first.types != second.types || !adjoin(first.arrays, count, second.arrays, first.types)) {
    return false;
  }
  const int master = size_of(master_type(first.extras));
  const int average = size_of(average_type(first.types.param));
  return (!first.master || adjoin(first.master, count * master, second.master)) &&
         (!first.average || adjoin(first.average, count * average, second.average)) &&
         (!(first.extras & kStochastic) ||
          first.first + static_cast<std::uint32_t>(count) == second.first);
}

// Whether there is memory of known type behind the view.
bool is_readable(const TensorView& view) {
  // CUDA is asked, and so begun, only where there is something on a GPU.
  const bool has_device =
      view.device == kCpu || (view.device >= 0 && view.device < cuda::device_count());
  return has_device && view.type != Stored::kUnknown && (view.data || view.count() == 0);
}

// Of the parameter's gradient, or the other type where it has none that can be read.
Stored grad_type_of(PyObject* param, Stored otherwise) {
  const py::object grad = grad_of(param);
  TensorView view;
  if (grad.is_none() || !is_plain(local_of(grad.ptr())) || !view_of(local_of(grad.ptr()), view)) {
    return otherwise;
  }
  return view.type;
}

}  // namespace

unsigned Plan::variant_of(const Row& row) const {
  return variants_.at(static_cast<std::size_t>(row.group));
}

unsigned Plan::mask_of(const Row& row) const {
  return rule_.state_masks.at(variant_of(row) & kFlagMask);
}

void Plan::begin(const std::vector<unsigned>& variants) {
  for (const unsigned variant : variants) {
    const std::string why = refusal(rule_, variant & ~kExtraMask, 0);
    if (!why.empty()) throw std::invalid_argument(why);
  }
  release();
  has_stepped_ = false;
  variants_ = variants;
  rows_.clear();
  dims_.clear();
  state_entries_.clear();
  // What goes with an object may come back here.
  const auto values = std::exchange(state_values_, {});
  state_tensors_.clear();
}

void Plan::add_other(int group, py::handle param, bool without_gradient) {
  release();
  static_cast<void>(variants_.at(static_cast<std::size_t>(group)));
  rows_.push_back({.param = param.ptr(),
                   .group = group,
                   .kind = without_gradient ? Kind::kWithoutGradient : Kind::kElsewhere});
}

void Plan::add(int group, py::handle param, std::uint32_t first, const py::list& states,
               const py::object& step, std::optional<bool> first_step, const py::object& cleared) {
  release();
  const Flag busy(running_);
  Row row{.param = param.ptr(), .group = group, .kind = Kind::kUpdated};
  const unsigned mask = mask_of(row), variant = variant_of(row);
  row.first_step = first_step.value_or(false);
  row.goes_by_count = !first_step;
  row.cleared = cleared.is_none() ? nullptr : cleared.ptr();
  TensorView view;
  PyObject* const local = local_of(param.ptr());
  if (!is_plain(local) || !view_of(local, view) || !is_readable(view) || !view.is_compact()) {
    throw std::invalid_argument("the parameter's memory cannot be read");
  }
  row.types = {view.type, grad_type_of(param.ptr(), view.type), view.type};
  row.is_complex = view.is_complex;
  row.device = view.device;
  row.dims = view.dims;
  row.count = view.count();
  row.first = first;
  row.arrays.param = view.data;
  row.first_dim = dims_.size();
  dims_.insert(dims_.end(), view.shape, view.shape + view.dims);
  dims_.insert(dims_.end(), view.strides, view.strides + view.dims);
  row.first_state = state_tensors_.size();
  const unsigned extras = variant & ~kFlagMask;
  const bool has_master = extras & kMaster, has_average = extras & kAverage;
  if (states.size() != static_cast<std::size_t>(std::popcount(mask) + has_master + has_average)) {
    throw std::invalid_argument("there must be a tensor for each of the variant's states");
  }
  std::size_t given = 0;
  const auto take = [&] {
    const auto tensor = py::reinterpret_borrow<py::object>(
        local_of(static_cast<py::object>(states[given++]).ptr()));
    TensorView state;
    if (!is_plain(tensor.ptr()) || !view_of(tensor.ptr(), state) || !is_readable(state) ||
        state.device != row.device || state.is_complex != row.is_complex ||
        !same_memory_order(row, state)) {
      throw std::invalid_argument("a state's memory is unlike its parameter's");
    }
    state_tensors_.add(tensor, state);
    return state;
  };
  const auto expect = [](const TensorView& state, Stored type) {
    if (state.type != type) throw std::invalid_argument("a state is of the wrong type");
    return state.data;
  };
  bool has_states = false;
  for (int i = 0; i < kMaxStates; ++i) {
    if (!(mask >> i & 1)) continue;
    const TensorView state = take();
    if (!has_states) row.types.state = state.type;
    has_states = true;
    row.arrays.state[i] = expect(state, row.types.state);
  }
  if (has_master) {
    row.master = expect(take(), master_type(extras));
  }
  if (has_average) {
    row.average = expect(take(), average_type(row.types.param));
  }
  row.layout = find_layout(row.types);
  const std::string why = refusal(rule_, variant, row.layout);
  if (!why.empty()) throw std::invalid_argument(why);
  if (!step.is_none()) {
    TensorView counter;
    if (!is_plain(step.ptr()) || !view_of(step.ptr(), counter) || !is_readable(counter) ||
        counter.count() != 1 || (counter.device != kCpu && counter.device != row.device) ||
        (counter.type != Stored::kFloat32 && counter.type != Stored::kFloat64)) {
      throw std::invalid_argument("a step must be a float32 or float64 tensor of one element");
    }
    row.step = counter.data;
    row.step_type = counter.type;
    row.counts_on_device = counter.device != kCpu;
    state_tensors_.add(step, counter);
  }
  row.state_tensors = state_tensors_.size() - row.first_state;
  rows_.push_back(row);
}

void Plan::end(const py::dict& state) {
  release();
  const Flag busy(running_);
  for (const auto& [param, dict] : state) {
    if (!PyDict_Check(dict.ptr())) throw std::invalid_argument("a parameter's state is no dict");
    StateEntry entry{param.ptr(), dict.ptr(), state_values_.size(), 0, nullptr};
    entry.keys_hint = reinterpret_cast<PyDictObject*>(dict.ptr())->ma_keys;
    for (const auto& [key, value] : py::reinterpret_borrow<py::dict>(dict)) {
      state_values_.push_back(py::reinterpret_borrow<py::object>(value));
    }
    entry.value_count = state_values_.size() - entry.first_value;
    state_entries_.push_back(entry);
  }
  state_tensors_.open();
}

bool Plan::same_memory_order(const Row& row, const TensorView& view) const {
  if (view.dims != row.dims) return false;
  const std::int64_t* shape = dims_.data() + row.first_dim;
  const std::int64_t* strides = shape + row.dims;
  for (int i = 0; i < view.dims; ++i) {
    if (view.shape[i] != shape[i]) return false;
    if (view.strides[i] != strides[i] && shape[i] > 1 && row.count > 0) return false;
  }
  return true;
}

// Thousands of small tensors are thousands of objects all over the heap: asking for the next ones
// early halves the time of a check.
void Plan::prefetch_row(std::size_t at) const {
  if (at >= rows_.size()) return;
  const Row& row = rows_[at];
  __builtin_prefetch(row.param);
  __builtin_prefetch(row.grad);
  prefetch_tensor(row.param_hint, true);
  prefetch_tensor(row.grad_hint, true);
}

bool Plan::row_matches(Row& row, PyObject* param) {
  if (row.param != param) return false;
  auto kept = py::reinterpret_borrow<py::object>(param);  // whatever asking for its gradient does
  py::object gradient = grad_of(param);
  PyObject* const grad = gradient.ptr();
  row.active = grad != Py_None;
  if (!row.active || row.kind != Kind::kUpdated) return !row.active || row.kind == Kind::kElsewhere;
  held_.insert(held_.end(), {kept.release().ptr(), gradient.release().ptr()});
  if (row.cleared && row.cleared != grad) return false;
  if (is_dtensor(param)) {
    if (!is_dtensor(grad) || !same_placements(param, grad)) return false;
  }
  PyObject* local_param = local_of(param);
  PyObject* local_grad = local_of(grad);
  if (!is_plain(local_param) || !is_plain(local_grad)) return false;
  TensorView view;
  if (!view_of(local_param, view) || view.data != row.arrays.param || view.device != row.device ||
      view.type != row.types.param || view.is_complex != row.is_complex ||
      !same_memory_order(row, view)) {
    return false;
  }
  row.param_hint = view.shape;
  if (!view_of(local_grad, view) || view.device != row.device || view.type != row.types.grad ||
      view.is_complex != row.is_complex || !same_memory_order(row, view) ||
      (!view.data && row.count > 0) || !view.is_aligned() ||
      is_unresolved(local_grad, view.is_complex)) {
    return false;
  }
  row.arrays.grad = view.data;
  row.grad = local_grad;
  row.grad_hint = view.shape;
  return true;
}

void Plan::prefetch_entry(const StateEntry& entry) {
  __builtin_prefetch(entry.dict);
  const auto* const keys = static_cast<const char*>(entry.keys_hint);
  for (int line = 0; line < 3; ++line) __builtin_prefetch(keys + 64 * line);
}

bool Plan::state_matches(const py::dict& state) const {
  PyObject *param, *dict, *key, *value;
  Py_ssize_t at = 0;
  std::size_t next = 0;
  while (PyDict_Next(state.ptr(), &at, &param, &dict)) {
    if (next == state_entries_.size()) return false;
    if (next + kRowsAhead < state_entries_.size())
      prefetch_entry(state_entries_[next + kRowsAhead]);
    const StateEntry& entry = state_entries_[next++];
    if (entry.param != param || entry.dict != dict || !PyDict_Check(dict) ||
        static_cast<std::size_t>(PyDict_GET_SIZE(dict)) != entry.value_count) {
      return false;
    }
    Py_ssize_t place = 0;
    const py::object* expected = state_values_.data() + entry.first_value;
    while (PyDict_Next(dict, &place, &key, &value)) {
      if ((expected++)->ptr() != value) return false;
    }
  }
  return next == state_entries_.size();
}

// A state tensor can be given other memory without a new object (state["exp_avg"].data = ...).
bool Plan::states_in_place() const {
  for (const Row& row : rows_) {
    if (!row.active || row.kind != Kind::kUpdated) continue;
    for (std::size_t i = 0; i < row.state_tensors; ++i) {
      state_tensors_.prefetch(row.first_state + row.state_tensors * kRowsAhead + i);
      if (!state_tensors_.is_in_place(row.first_state + i)) return false;
    }
  }
  return true;
}

bool Plan::matches(const py::list& groups, const py::dict& state,
                   const std::vector<unsigned>& variants) {
  release();
  // Asking a tensor may let another thread go on, or call here again.
  const Flag busy(running_);
  return matched_ = everything_matches(groups, state, variants);
}

bool Plan::everything_matches(const py::list& groups, const py::dict& state,
                              const std::vector<unsigned>& variants) {
  static PyObject* const kParams = name("params");
  if (variants != variants_ || groups.size() != variants.size()) return false;
  std::size_t next = 0;
  for (std::size_t group = 0; group < variants.size(); ++group) {
    // Asking a tensor below may change either list.
    if (group >= groups.size()) return false;
    PyObject* const options = PyList_GET_ITEM(groups.ptr(), static_cast<Py_ssize_t>(group));
    if (!PyDict_Check(options)) return false;
    const auto found =
        py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(options, kParams));
    if (PyErr_Occurred()) throw py::error_already_set();
    PyObject* const params = found.ptr();
    if (!params || !PyList_Check(params)) return false;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params); ++i) {
      if (next == rows_.size()) return false;
      prefetch_row(next + kRowsAhead);
      Row& row = rows_[next++];
      if (row.group != static_cast<int>(group)) return false;
      if (!row_matches(row, PyList_GET_ITEM(params, i))) return false;
    }
  }
  return next == rows_.size() && state_matches(state) && states_in_place();
}

std::int64_t Plan::step_of(const Row& row) {
  if (!row.goes_by_count) return row.first_step ? 1 : 2;
  return count_of(row);
}

std::int64_t Plan::count_of(const Row& row) {
  if (!row.step) return 1;
  const double done = row.step_type == Stored::kFloat32
                          ? static_cast<double>(*static_cast<const float*>(row.step))
                          : *static_cast<const double*>(row.step);
  if (!(done >= 0 && done < 9e15)) {
    throw std::invalid_argument("the step in a parameter's state is " + std::to_string(done) +
                                "; it must count from 0");
  }
  return static_cast<std::int64_t>(done) + 1;
}

void Plan::append(const Row& row, const Prepared& prepared) {
  const unsigned variant = variant_of(row);
  const Kernel kernel = find_kernel(rule_, variant, row.layout);
  const bool clears = row.cleared != nullptr;
  const Work work = {
      row.arrays, prepared.scalars.data(), row.types, variant & ~kFlagMask, row.master, row.average,
      row.first,  prepared.numbers};
  if (!segments_.empty()) {
    Segment& last = segments_.back();
    if (last.kernel == kernel && last.clears == clears && adjoin(last.work, last.count, work)) {
      last.count += row.count;
      return;
    }
  }
  segments_.push_back({work, row.count, kernel, clears});
}

py::list Plan::updated() const {
  py::list updated;  // first: making it may collect garbage, and that may call here
  if (!matched_) {
    throw std::runtime_error("updated() must follow a call of matches() that said true");
  }
  for (const Row& row : rows_) {
    if (row.active && row.kind == Kind::kUpdated) updated.append(py::handle(row.param));
  }
  return updated;
}

void Plan::append_to_batch(const Row& row) {
  const bool on_device = row.counts_on_device;
  const BatchKey key = {row.device,
                        row.group,
                        row.layout,
                        row.cleared != nullptr,
                        on_device ? 0 : count_of(row),
                        row.goes_by_count ? 0 : step_of(row),
                        on_device ? row.step_type : Stored::kUnknown};
  const Work work = {row.arrays, nullptr,     row.types, variant_of(row) & ~kFlagMask,
                     row.master, row.average, row.first, {}};
  Batch& batch = batches_[key];
  if (!batch.rows.empty() && !on_device) {
    cuda::Row& last = batch.rows.back();
    const Work before = {last.arrays, nullptr,      work.types, work.extras,
                         last.master, last.average, last.first, {}};
    if (adjoin(before, last.count, work)) {
      last.count += row.count;
      batch.end = cuda::end_of(last);
      return;
    }
  }
  batch.rows.push_back({row.arrays, batch.end, row.count, on_device ? row.step : nullptr,
                        row.master, row.average, row.first});
  batch.end = cuda::end_of(batch.rows.back());
}

void Plan::run_batches(const std::vector<std::vector<double>>& hyper,
                       const std::vector<double>& scales, const std::map<int, DeviceInputs>& inputs,
                       const std::vector<ExtraInputs>& extras) {
  for (const auto& [key, batch] : batches_) {
    const auto& [device, group_number, layout, clears, count, step, step_type] = key;
    const auto group = static_cast<std::size_t>(group_number);
    const auto found = inputs.find(device);
    if (found == inputs.end()) throw std::invalid_argument("there are no inputs for a device");
    const DeviceInputs& input = found->second;
    cuda::Launch launch = {};
    launch.step_is_double = step_type == Stored::kFloat64;
    launch.clears = clears;
    launch.host_step = count;
    launch.rule_step = step;
    launch.types = layouts()[static_cast<std::size_t>(layout)];
    launch.extras = variants_[group] & ~kFlagMask;
    if (!extras.empty()) {
      launch.unscale = extras[group].unscale;
      launch.average_decay = extras[group].average_decay;
      launch.seed = extras[group].seed;
      launch.max_norm = extras[group].max_norm;
    }
    launch.norm = reinterpret_cast<const cuda::FoundNorm*>(input.norm);
    launch.skips = input.norm && input.skips;
    for (std::size_t i = 0; i < hyper[group].size(); ++i) {
      const auto [at, is_double] = input.numbers.at(group).at(i);
      launch.hyper[i] = {hyper[group][i], reinterpret_cast<const void*>(at), is_double};
    }
    launch.sign = scales[group];
    launch.grad_scale = reinterpret_cast<const float*>(input.grad_scale);
    launch.found_inf = reinterpret_cast<const float*>(input.found_inf);
    auto& table = tables_.try_emplace({device, group_number, layout, clears}, device).first->second;
    const int variant = rule_.first_variant + static_cast<int>(variants_[group] & kFlagMask);
    cuda::run(device, reinterpret_cast<void*>(input.stream), layout, variant, launch, batch.rows,
              table);
  }
}

std::vector<int> Plan::devices() const {
  std::vector<int> devices;
  for (const Row& row : rows_) {
    if (row.kind != Kind::kUpdated) continue;
    if (std::find(devices.begin(), devices.end(), row.device) == devices.end()) {
      devices.push_back(row.device);
    }
  }
  return devices;
}

std::vector<Gradient> Plan::gradients() const {
  if (running_) throw std::runtime_error(kInUse);
  if (!matched_) throw std::runtime_error("a norm must follow a call of matches() that said true");
  std::vector<Gradient> gradients;
  for (const Row& row : rows_) {
    if (!row.active || row.kind != Kind::kUpdated) continue;
    if (row.device != kCpu) throw std::invalid_argument("a gradient is on a GPU");
    gradients.push_back({row.arrays.grad, row.types.grad, row.count});
  }
  return gradients;
}

double Plan::norm(bool largest, const std::vector<double>& others, int threads) {
  const std::vector<Gradient> gradients = this->gradients();
  threads = available_threads(threads);
  std::vector<double> norms;
  {
    const Flag running(running_);
    const WithoutGil others_may_run;
    norms = run_norms(gradients, largest, threads);
  }
  const IeeeMode ieee;
  auto own = norms.begin();
  auto other = others.begin();
  double total = 0;
  for (const Row& row : rows_) {
    if (!row.active) continue;
    if (row.kind == Kind::kElsewhere && other == others.end()) {
      throw std::invalid_argument("there must be a norm of each gradient that is elsewhere");
    }
    const double norm = row.kind == Kind::kUpdated ? *own++ : *other++;
    total = largest ? maximum(total, norm) : total + norm;
  }
  return total;
}

std::vector<std::size_t> Plan::write_norms(double* slots, const std::vector<std::int64_t>& places,
                                           const std::vector<std::int64_t>& owns, bool largest,
                                           int threads) {
  const std::vector<Gradient> gradients = this->gradients();
  if (places.size() != rows_.size() || owns.size() != rows_.size()) {
    throw std::invalid_argument("there must be a place and a number of norms for each parameter");
  }
  threads = available_threads(threads);
  std::vector<double> tiles;
  {
    const Flag running(running_);
    const WithoutGil others_may_run;
    tiles = run_tile_norms(gradients, largest, threads);
  }
  std::vector<std::size_t> elsewhere;
  const double* next = tiles.data();
  for (std::size_t i = 0; i < rows_.size(); ++i) {
    const Row& row = rows_[i];
    if (!row.active) continue;
    if (row.kind == Kind::kElsewhere) {
      elsewhere.push_back(i);
      continue;
    }
    const std::int64_t count = tile_count(row.count);
    if (count == owns[i]) {
      std::copy_n(next, count, slots + places[i]);
    } else if (count > 0) {
      slots[places[i]] = add_norms(next, count, largest);
    }
    next += count;
  }
  return elsewhere;
}

const std::vector<cuda::NormRow>& Plan::norm_rows(int device) {
  if (!matched_) throw std::runtime_error("norms must follow a call of matches() that said true");
  if (norm_device_ == device) return norm_rows_;
  norm_device_.reset();
  norm_rows_.clear();
  std::int64_t end = 0;
  for (const Row& row : rows_) {
    if (!row.active) continue;
    if (row.kind != Kind::kUpdated || row.device == kCpu || row.device != device) {
      throw std::invalid_argument("a gradient is not on GPU " + std::to_string(device));
    }
    norm_rows_.push_back({row.arrays.grad, end, row.count, row.types.grad});
    end = cuda::end_of(norm_rows_.back());
  }
  norm_device_ = device;
  return norm_rows_;
}

std::int64_t Plan::norm_room(int device) {
  const auto& rows = norm_rows(device);
  const auto count = static_cast<std::int64_t>(rows.size());
  return rows.empty() ? 0 : cuda::end_of(rows.back()) + count;
}

void Plan::norm_on_gpu(int device, bool largest, std::uintptr_t stream, std::uintptr_t room,
                       const cuda::NormEnd& end) {
  const auto& rows = norm_rows(device);
  if (!end.found || (!room && !rows.empty())) throw std::invalid_argument("there is no room");
  auto& table = norm_tables_.try_emplace(device, device).first->second;
  cuda::run_norm(device, reinterpret_cast<void*>(stream), largest, rows,
                 reinterpret_cast<double*>(room), end, table);
}

void Plan::step(const std::vector<std::vector<double>>& hyper, const std::vector<double>& scales,
                int threads, const std::map<int, DeviceInputs>& inputs,
                const std::vector<ExtraInputs>& extras) {
  if (running_) throw std::runtime_error(kInUse);
  if (!matched_) throw std::runtime_error("step() must follow a call of matches() that said true");
  matched_ = false;
  if (hyper.size() != variants_.size() || scales.size() != variants_.size() ||
      (!extras.empty() && extras.size() != variants_.size())) {
    throw std::invalid_argument("there must be hyper-parameters, a scale and extras of each group");
  }
  for (const auto& values : hyper) {
    if (values.size() != rule_.hyper.size()) {
      throw std::invalid_argument("each group must have a value for each hyper-parameter");
    }
  }
  segments_.clear();
  prepared_.clear();
  batches_.clear();
  std::int64_t total = 0;
  std::tuple<int, std::int64_t, std::int64_t> last = {-1, 0, 0};
  const Prepared* prepared = nullptr;
  for (const Row& row : rows_) {
    if (!row.active || row.kind != Kind::kUpdated) continue;
    if (row.device != kCpu) {
      if (row.count > 0 || row.counts_on_device) append_to_batch(row);
      continue;
    }
    const std::tuple key = {row.group, step_of(row), count_of(row)};
    if (key != last) {
      const auto group = static_cast<std::size_t>(row.group);
      const auto [found, is_new] = prepared_.try_emplace(key);
      if (is_new) {
        const auto [index, step, count] = key;
        const ExtraInputs own = extras.empty() ? ExtraInputs{} : extras[group];
        found->second = {rule_.prepare(hyper[group].data(), step, scales[group]),
                         prepare_extras(own.unscale, own.average_decay, own.seed, count)};
      }
      prepared = &found->second;
      last = key;
    }
    if (row.count > 0) append(row, *prepared);
    total += row.count;
  }
  run_batches(hyper, scales, inputs, extras);
  threads = available_threads(threads);
  if (total < kElementsPerThread) {
    run_update(segments_, 1);
  } else {
    const Flag running(running_);
    const WithoutGil others_may_run;
    run_update(segments_, threads);
  }
  for (Row& row : rows_) {
    if (!row.active || row.kind != Kind::kUpdated) continue;
    if (!row.counts_on_device) {
      if (row.step_type == Stored::kFloat32) *static_cast<float*>(row.step) += 1;
      if (row.step_type == Stored::kFloat64) *static_cast<double*>(row.step) += 1;
    }
    row.first_step = false;
  }
  has_stepped_ = true;
  release();
}

void Plan::release() {
  if (running_) throw std::runtime_error(kInUse);
  matched_ = false;
  norm_device_.reset();
  // The last reference to an object may be here, and what goes with it may come back.
  std::vector<PyObject*> held = std::exchange(held_, {});
  for (std::size_t i = 0; i < held.size(); ++i) {
    if (i + 2 * kRowsAhead < held.size()) __builtin_prefetch(held[i + 2 * kRowsAhead]);
    Py_DECREF(held[i]);
  }
  held.clear();
  if (held_.empty()) held_ = std::move(held);  // its room is for the next step
}

}  // namespace flatstep
