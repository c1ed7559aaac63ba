#include "group_update.h"

#include <map>
#include <stdexcept>
#include <utility>

#include "api.h"
#include "gil.h"

namespace flatstep {
namespace {

namespace py = pybind11;

PyObject* at(const py::list& list, std::size_t place) {
  return PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(place));
}

TensorView view_at(const py::list& list, std::size_t place) {
  TensorView view;
  if (!is_plain(at(list, place)) || !view_of(at(list, place), view) || view.device != kCpu ||
      view.type == Stored::kUnknown || (!view.data && view.count() > 0)) {
    throw std::invalid_argument("the memory of a tensor cannot be read");
  }
  return view;
}

// Whether a kernel that walks over the parameter walks over this tensor too.
bool lies_as(const TensorView& view, const TensorView& param, PyObject* tensor) {
  if (view.dims != param.dims || view.is_complex != param.is_complex) {
    throw std::invalid_argument("a tensor is unlike its parameter");
  }
  bool same = true;
  for (int i = 0; i < view.dims; ++i) {
    if (view.shape[i] != param.shape[i]) {
      throw std::invalid_argument("a tensor is unlike its parameter");
    }
    same = same && (view.strides[i] == param.strides[i] || view.shape[i] <= 1);
  }
  return (same || param.count() == 0) && view.is_aligned() &&
         !is_unresolved(tensor, view.is_complex);
}

// A number in a tensor.
class Counter {
 public:
  Counter(const py::list& list, std::size_t place) : view_(view_at(list, place)) {
    if (view_.count() != 1 || !(view_.type == Stored::kFloat32 || view_.type == Stored::kFloat64)) {
      throw std::invalid_argument("a step must be a float32 or float64 tensor of one element");
    }
  }

  double get() const {
    return view_.type == Stored::kFloat32 ? *static_cast<const float*>(view_.data)
                                          : *static_cast<const double*>(view_.data);
  }

  void set(double value) const {
    if (view_.type == Stored::kFloat32)
      *static_cast<float*>(view_.data) = static_cast<float>(value);
    if (view_.type == Stored::kFloat64) *static_cast<double*>(view_.data) = value;
  }

 private:
  TensorView view_;
};

// The number of the step that follows.
std::int64_t step_after(const Counter& counter) {
  const double done = counter.get();
  if (!(done >= 0 && done < 9e15)) {
    throw std::invalid_argument("the step in a parameter's state is " + std::to_string(done) +
                                "; it must count from 0");
  }
  return static_cast<std::int64_t>(done) + 1;
}

struct Prepared {
  Scalars scalars;
  ExtraNumbers numbers;
};

}  // namespace

bool update_group(const std::string& rule_name, unsigned variant, const GroupTensors& tensors,
                  const std::vector<double>& hyper, double scale, int threads, double average_decay,
                  std::uint64_t seed, const std::vector<std::uint32_t>& firsts) {
  const RuleInfo& rule = find_rule(rule_name);
  const std::size_t size = tensors.params.size();
  const std::size_t each = size ? tensors.states.size() / size : 0;
  const auto one_each = [size](const auto& list) { return list.empty() || list.size() == size; };
  if (tensors.grads.size() != size || tensors.states.size() != each * size ||
      !one_each(tensors.steps) || !one_each(tensors.fresh) || !one_each(firsts)) {
    throw std::invalid_argument("the lists differ in length");
  }
  if (hyper.size() != rule.hyper.size()) throw std::invalid_argument("wrong number of hyper");
  const std::string why = refusal(rule, variant & ~kExtraMask, 0);
  if (!why.empty()) throw std::invalid_argument(why);
  const unsigned extras = variant & ~kFlagMask, mask = rule.state_masks[variant & kFlagMask];
  std::vector<Counter> steps, fresh;
  std::map<std::pair<std::int64_t, std::int64_t>, Prepared> prepared;
  std::vector<Segment> segments;
  std::int64_t total = 0;
  for (std::size_t i = 0; i < size; ++i) {
    const TensorView param = view_at(tensors.params, i), grad = view_at(tensors.grads, i);
    if (!param.is_compact()) {
      throw std::invalid_argument("a parameter has gaps or overlaps itself");
    }
    if (!lies_as(param, param, at(tensors.params, i)) ||
        !lies_as(grad, param, at(tensors.grads, i))) {
      return false;
    }
    Work work = {};
    work.arrays = {param.data, grad.data, {}};
    work.types = {param.type, grad.type, param.type};
    bool in_order = true, has_states = false;
    std::size_t given = i * each;
    const auto take = [&](Stored type) {
      if (given == (i + 1) * each) throw std::invalid_argument("there are too few states");
      const TensorView state = view_at(tensors.states, given);
      if (!lies_as(state, param, at(tensors.states, given++))) in_order = false;
      if (type != Stored::kUnknown && state.type != type) {
        throw std::invalid_argument("a state is of the wrong type");
      }
      if (type == Stored::kUnknown) work.types.state = state.type;
      return state.data;
    };
    for (int state = 0; state < kMaxStates; ++state) {
      if (!(mask >> state & 1)) continue;
      work.arrays.state[state] = take(has_states ? work.types.state : Stored::kUnknown);
      has_states = true;
    }
    if (extras & kMaster) work.master = take(master_type(extras));
    if (extras & kAverage) work.average = take(average_type(param.type));
    if (given != (i + 1) * each) throw std::invalid_argument("there are too many states");
    if (!in_order) return false;
    const int layout = find_layout(work.types);
    const std::string unknown = refusal(rule, variant, layout);
    if (!unknown.empty()) throw std::invalid_argument(unknown);
    std::int64_t count = 1;
    if (!tensors.steps.empty()) count = step_after(steps.emplace_back(tensors.steps, i));
    std::int64_t step = count;
    if (!tensors.fresh.empty()) step = fresh.emplace_back(tensors.fresh, i).get() != 0 ? 1 : 2;
    const auto [found, is_new] = prepared.try_emplace({step, count});
    if (is_new) {
      found->second = {rule.prepare(hyper.data(), step, scale),
                       prepare_extras(1.0, average_decay, seed, count)};
    }
    work.scalars = found->second.scalars.data();
    work.extras = extras;
    work.first = firsts.empty() ? 0 : firsts[i];
    work.numbers = found->second.numbers;
    if (param.count() > 0) {
      segments.push_back({work, param.count(), find_kernel(rule, variant, layout), false});
    }
    total += param.count();
  }
  threads = available_threads(threads);
  if (total < kElementsPerThread) {
    run_update(segments, 1);
  } else {
    const WithoutGil others_may_run;
    run_update(segments, threads);
  }
  for (const Counter& step : steps) step.set(step.get() + 1);
  for (const Counter& first : fresh) first.set(0);
  return true;
}

}  // namespace flatstep
