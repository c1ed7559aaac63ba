// The module: a table of contents.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>

#include "api.h"
#include "gil.h"

namespace flatstep {
namespace {

namespace py = pybind11;
using namespace pybind11::literals;

py::list describe_rules() {
  py::list described;
  for (const RuleInfo& rule : rules()) {
    py::list variants;
    for (unsigned flags = 0; flags < rule.allowed.size(); ++flags) {
      if (!rule.allowed[flags]) continue;
      py::list states;
      for (std::size_t i = 0; i < rule.states.size(); ++i) {
        if (rule.state_masks[flags] >> i & 1) states.append(rule.states[i]);
      }
      variants.append(py::make_tuple(flags, py::tuple(states)));
    }
    described.append(py::dict("name"_a = rule.name, "hyper"_a = py::tuple(py::cast(rule.hyper)),
                              "flags"_a = py::tuple(py::cast(rule.flags)),
                              "states"_a = py::tuple(py::cast(rule.states)),
                              "variants"_a = py::tuple(variants)));
  }
  return described;
}

py::list describe_layouts() {
  py::list described;
  for (const Types& types : layouts()) {
    described.append(
        py::make_tuple(name_of(types.param), name_of(types.grad), name_of(types.state)));
  }
  return described;
}

py::list describe_isas() {
  py::list described;
  for (const Isa* const* isa = kIsas; *isa; ++isa) {
    described.append(py::make_tuple((*isa)->name, (*isa)->supported()));
  }
  return described;
}

// By device: DeviceInputs.
using RawInputs =
    std::map<int, std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t,
                             std::vector<std::vector<std::pair<std::uintptr_t, bool>>>,
                             std::uintptr_t, bool>>;

// Of each group: ExtraInputs.
using RawExtras = std::vector<std::tuple<double, double, std::uint64_t, double>>;

template <class T = void>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The arrays of one update, checked.
Arrays arrays_of(const RuleInfo& rule, unsigned variant, int layout, std::uintptr_t param,
                 std::uintptr_t grad, const std::vector<std::uintptr_t>& states, std::int64_t count,
                 const std::vector<double>& hyper, std::int64_t step, std::uintptr_t master,
                 std::uintptr_t average) {
  const std::string why = refusal(rule, variant, layout);
  if (!why.empty()) throw std::invalid_argument(why);
  if (hyper.size() != rule.hyper.size()) throw std::invalid_argument("wrong number of hyper");
  if (step < 1) throw std::invalid_argument("step counts from 1");
  if (count < 0) throw std::invalid_argument("count must not be negative");
  Arrays arrays{pointer(param), pointer(grad), {}};
  std::size_t given = 0;
  bool complete = param && grad;
  for (int i = 0; i < kMaxStates; ++i) {
    if (!(rule.state_masks[variant & kFlagMask] >> i & 1)) continue;
    complete = complete && given < states.size() && states[given];
    if (complete) arrays.state[i] = pointer(states[given++]);
  }
  const bool has_extras =
      (master != 0) == ((variant & kMaster) != 0) && (average != 0) == ((variant & kAverage) != 0);
  if (count > 0 && (!complete || given != states.size() || !has_extras)) {
    throw std::invalid_argument("wrong arrays");
  }
  return arrays;
}

// One update of plain memory, checked. Only where it runs is left open.
struct Update {
  const RuleInfo& rule;
  unsigned variant;
  int layout;
  Arrays arrays;
  std::int64_t count;
  const std::vector<double>& hyper;
  std::int64_t step;
  double scale;
  void *master, *average;
  double unscale, average_decay;
  std::uint64_t seed;
  std::int64_t count_of_step;
  std::uint32_t first;

  Types types() const { return layouts()[static_cast<std::size_t>(layout)]; }
  unsigned extras() const { return variant & ~kFlagMask; }
};

// Binds what runs an update. own: the names of what it is told beside, which stand after the scale.
template <class... Own, class... Name>
void def_update(py::module_& module, const char* name, void (*run)(const Update&, Own...),
                const Name&... own) {
  module.def(
      name,
      [run](const std::string& rule_name, unsigned variant, int layout, std::uintptr_t param,
            std::uintptr_t grad, const std::vector<std::uintptr_t>& states, std::int64_t count,
            const std::vector<double>& hyper, std::int64_t step, double scale, Own... beside,
            std::uintptr_t master, std::uintptr_t average, double unscale, double average_decay,
            std::uint64_t seed, std::int64_t count_of_step, std::uint32_t first) {
        const RuleInfo& rule = find_rule(rule_name);
        run({rule, variant, layout,
             arrays_of(rule, variant, layout, param, grad, states, count, hyper, step, master,
                       average),
             count, hyper, step, scale, pointer(master), pointer(average), unscale, average_decay,
             seed, count_of_step, first},
            beside...);
      },
      "rule"_a, "flags"_a, "layout"_a, "param"_a, "grad"_a, "states"_a, "count"_a, "hyper"_a,
      "step"_a, "scale"_a, own..., "master"_a = 0, "average"_a = 0, "unscale"_a = 1.0,
      "average_decay"_a = 0.0, "seed"_a = 0, "count_of_step"_a = 1, "first"_a = 0);
}

void update(const Update& of, int threads) {
  if (of.count == 0) return;
  const Scalars scalars = of.rule.prepare(of.hyper.data(), of.step, of.scale);
  const Work work = {
      .arrays = of.arrays,
      .scalars = scalars.data(),
      .types = of.types(),
      .extras = of.extras(),
      .master = of.master,
      .average = of.average,
      .first = of.first,
      .numbers = prepare_extras(of.unscale, of.average_decay, of.seed, of.count_of_step)};
  threads = available_threads(threads);
  const WithoutGil others_may_run;
  run_update({{work, of.count, find_kernel(of.rule, of.variant, of.layout), false}}, threads);
}

// Gradients by their addresses, checked.
std::vector<Gradient> gradients_of(const std::vector<std::uintptr_t>& grads,
                                   const std::vector<std::string>& dtypes,
                                   const std::vector<std::int64_t>& counts) {
  if (dtypes.size() != grads.size() || counts.size() != grads.size()) {
    throw std::invalid_argument("there must be a dtype and a count of each gradient");
  }
  std::vector<Gradient> gradients;
  for (std::size_t i = 0; i < grads.size(); ++i) {
    const auto same = [&](const Types& types) { return dtypes[i] == name_of(types.grad); };
    const auto types = std::find_if(layouts().begin(), layouts().end(), same);
    if (types == layouts().end()) {
      throw std::invalid_argument("there are no gradients of dtype '" + dtypes[i] + "'");
    }
    if (counts[i] < 0 || (counts[i] > 0 && !grads[i])) {
      throw std::invalid_argument("there is no such gradient");
    }
    gradients.push_back({pointer(grads[i]), types->grad, counts[i]});
  }
  return gradients;
}

std::vector<double> norms(const std::vector<std::uintptr_t>& grads,
                          const std::vector<std::string>& dtypes,
                          const std::vector<std::int64_t>& counts, bool largest, int threads) {
  const auto gradients = gradients_of(grads, dtypes, counts);
  threads = available_threads(threads);
  const WithoutGil others_may_run;
  return run_norms(gradients, largest, threads);
}

void check_gpu(int device) {
  if (device < 0 || (device >= cuda::device_count() && cuda::device_count() > 0)) {
    throw std::invalid_argument("there is no GPU " + std::to_string(device));
  }
  if (cuda::device_count() == 0) throw std::runtime_error(cuda::absence());
}

void norms_on_gpu(const std::vector<std::uintptr_t>& grads, const std::vector<std::string>& dtypes,
                  const std::vector<std::int64_t>& counts, bool largest, int device,
                  std::uintptr_t stream, std::uintptr_t room, std::uintptr_t found) {
  check_gpu(device);
  std::vector<cuda::NormRow> rows;
  std::int64_t end = 0;
  for (const Gradient& gradient : gradients_of(grads, dtypes, counts)) {
    rows.push_back({gradient.data, end, gradient.count, gradient.type});
    end = cuda::end_of(rows.back());
  }
  if (!found || (!room && !rows.empty())) throw std::invalid_argument("there is no room");
  cuda::Table table(device);
  cuda::run_norm(device, pointer(stream), largest, rows, pointer<double>(room),
                 {.found = pointer<cuda::FoundNorm>(found)}, table);
}

py::bytes tile_norms(const std::vector<std::uintptr_t>& grads,
                     const std::vector<std::string>& dtypes,
                     const std::vector<std::int64_t>& counts, bool largest, int threads) {
  const auto gradients = gradients_of(grads, dtypes, counts);
  threads = available_threads(threads);
  std::vector<double> tiles;
  {
    const WithoutGil others_may_run;
    tiles = run_tile_norms(gradients, largest, threads);
  }
  return {reinterpret_cast<const char*>(tiles.data()), tiles.size() * sizeof(double)};
}

double total_of_tiles(std::uintptr_t tiles, const std::vector<std::int64_t>& counts, bool largest) {
  std::vector<double> norms;
  const double* next = pointer<double>(tiles);
  for (const std::int64_t count : counts) {
    if (count < 0 || (count > 0 && !tiles)) throw std::invalid_argument("there are no such tiles");
    norms.push_back(add_norms(next, count, largest));
    next += count;
  }
  return add_norms(norms.data(), static_cast<std::int64_t>(norms.size()), largest);
}

void update_on_gpu(const Update& of, int device, std::uintptr_t stream) {
  check_gpu(device);
  if (of.count == 0) return;
  cuda::Launch launch = {};
  launch.host_step = of.count_of_step;
  launch.rule_step = of.step;
  launch.types = of.types();
  launch.extras = of.extras();
  launch.unscale = of.unscale;
  launch.average_decay = of.average_decay;
  launch.seed = of.seed;
  launch.sign = of.scale;
  for (std::size_t i = 0; i < of.hyper.size(); ++i) launch.hyper[i].value = of.hyper[i];
  cuda::Table table(device);
  cuda::run(device, pointer(stream), of.layout,
            of.rule.first_variant + static_cast<int>(of.variant & kFlagMask), launch,
            {{of.arrays, 0, of.count, nullptr, of.master, of.average, of.first}}, table);
}

void judge_norm_on_gpu(int device, std::uintptr_t stream, std::uintptr_t found, bool largest,
                       bool skips, std::uintptr_t grad_scale, std::uintptr_t found_inf) {
  check_gpu(device);
  if (!found) throw std::invalid_argument("there is no norm");
  cuda::finish_norm(device, pointer(stream),
                    {.found = pointer<cuda::FoundNorm>(found),
                     .grad_scale = pointer<const float>(grad_scale),
                     .found_inf = pointer<const float>(found_inf),
                     .largest = largest,
                     .judges = true,
                     .skips = skips});
}

void traffic(const std::vector<std::uintptr_t>& addresses, int written, std::int64_t count,
             int threads) {
  const auto read = static_cast<int>(addresses.size());
  if (written < 1 || written > read || read > kMaxStreams || count < 0) {
    throw std::invalid_argument("there are 1 to 5 streams, of which at least one is written");
  }
  std::vector<float*> streams;
  for (const std::uintptr_t address : addresses) {
    if (!address) throw std::invalid_argument("a stream's address is null");
    streams.push_back(pointer<float>(address));
  }
  const WithoutGil others_may_run;
  run_traffic(streams, written, count, threads);
}

}  // namespace

// pybind11's way in, which waits for ever in a sub-interpreter of Python before 3.12.
#define PyInit__core init_in_main_interpreter
PYBIND11_MODULE(_core, module) {
  module.doc() =
      "The kernels of flatstep. Addresses and sizes are taken at their word: "
      "the Python package checks them.";

  module.def("rules", &describe_rules);
  module.def("layouts", &describe_layouts);
  module.def("isas", &describe_isas);
  module.def("isa", [] { return current_isa().name; });
  module.def("use_isa", [](const std::string& name) { use_isa(name.c_str()); }, "name"_a);

  module.def("connect", &connect, "exchange"_a, "tensor_type"_a, "parameter_type"_a);
  module.def("connect_handles", &connect_handles, "library"_a, "open_handles"_a);
  module.def("connect_dtensor", &connect_dtensor, "dtensor_type"_a);
  module.def(
      "use_torch_threads",
      [](const std::optional<std::string>& path) {
        return use_torch_threads(path ? path->c_str() : nullptr);
      },
      "library"_a);

  module.attr("EXTRAS") =
      py::dict("master_copy"_a = unsigned{kMasterCopy}, "master_split"_a = unsigned{kMasterSplit},
               "stochastic"_a = unsigned{kStochastic}, "average"_a = unsigned{kAverage},
               "writes_grad"_a = unsigned{kWritesGrad});

  def_update(module, "update", &update, "threads"_a);
  module.def(
      "update_group",
      [](const std::string& rule, unsigned flags, py::list params, py::list grads, py::list states,
         py::list steps, py::list fresh, const std::vector<double>& hyper, double scale,
         int threads, double average_decay, std::uint64_t seed,
         const std::vector<std::uint32_t>& firsts) {
        return update_group(rule, flags, {params, grads, states, steps, fresh}, hyper, scale,
                            threads, average_decay, seed, firsts);
      },
      "rule"_a, "flags"_a, "params"_a, "grads"_a, "states"_a, "steps"_a, "fresh"_a, "hyper"_a,
      "scale"_a, "threads"_a, "average_decay"_a, "seed"_a, "firsts"_a);
  module.def("norms", &norms, "grads"_a, "dtypes"_a, "counts"_a, "largest"_a, "threads"_a);
  module.def("tile_norms", &tile_norms, "grads"_a, "dtypes"_a, "counts"_a, "largest"_a,
             "threads"_a);
  module.def("total_of_tiles", &total_of_tiles, "tiles"_a, "counts"_a, "largest"_a);
  def_update(module, "update_on_gpu", &update_on_gpu, "device"_a, "stream"_a);
  module.def("norms_on_gpu", &norms_on_gpu, "grads"_a, "dtypes"_a, "counts"_a, "largest"_a,
             "device"_a, "stream"_a, "room"_a, "found"_a);
  module.def("judge_norm_on_gpu", &judge_norm_on_gpu, "device"_a, "stream"_a, "found"_a,
             "largest"_a, "skips"_a, "grad_scale"_a, "found_inf"_a);
  module.def("gpu_count", &cuda::device_count);
  module.def("gpu_absence", &cuda::absence);
  module.def("traffic", &traffic, "streams"_a, "written"_a, "count"_a, "threads"_a);

  py::class_<Plan>(module, "Plan")
      .def(py::init<const std::string&>(), "rule"_a)
      .def("begin", &Plan::begin, "variants"_a)
      .def("add", &Plan::add, "group"_a, "param"_a, "first"_a, "states"_a, "step"_a, "first_step"_a,
           "cleared"_a)
      .def("add_other", &Plan::add_other, "group"_a, "param"_a, "without_gradient"_a)
      .def("end", &Plan::end, "state"_a)
      .def("matches", &Plan::matches, "groups"_a, "state"_a, "variants"_a)
      .def("updated", &Plan::updated)
      .def("norm", &Plan::norm, "largest"_a, "others"_a, "threads"_a)
      .def("norm_room", &Plan::norm_room, "device"_a)
      .def(
          "norm_on_gpu",
          [](Plan& plan, int device, bool largest, std::uintptr_t stream, std::uintptr_t room,
             std::uintptr_t found, std::uintptr_t overflow) {
            plan.norm_on_gpu(
                device, largest, stream, room,
                {.found = pointer<cuda::FoundNorm>(found), .overflow = pointer<float>(overflow)});
          },
          "device"_a, "largest"_a, "stream"_a, "room"_a, "found"_a, "overflow"_a = 0)
      .def(
          "write_norms",
          [](Plan& plan, std::uintptr_t slots, const std::vector<std::int64_t>& places,
             const std::vector<std::int64_t>& owns, bool largest, int threads) {
            return plan.write_norms(pointer<double>(slots), places, owns, largest, threads);
          },
          "slots"_a, "places"_a, "owns"_a, "largest"_a, "threads"_a)
      .def(
          "step",
          [](Plan& plan, const std::vector<std::vector<double>>& hyper,
             const std::vector<double>& scales, int threads, const RawInputs& raw,
             const RawExtras& raw_extras) {
            std::map<int, DeviceInputs> inputs;
            for (const auto& [device, input] : raw) {
              const auto& [stream, grad_scale, found_inf, numbers, norm, skips] = input;
              inputs[device] = {stream, grad_scale, found_inf, numbers, norm, skips};
            }
            std::vector<ExtraInputs> extras;
            for (const auto& [unscale, decay, seed, max_norm] : raw_extras) {
              extras.push_back({unscale, decay, seed, max_norm});
            }
            plan.step(hyper, scales, threads, inputs, extras);
          },
          "hyper"_a, "scales"_a, "threads"_a, "inputs"_a = RawInputs{}, "extras"_a = RawExtras{})
      .def_property_readonly("has_stepped", &Plan::has_stepped)
      .def("release", &Plan::release)
      .def("devices", &Plan::devices)
      .def_property_readonly("segments", &Plan::segments);
}

#undef PyInit__core

}  // namespace flatstep

extern "C" PYBIND11_EXPORT PyObject* PyInit__core() {
  if (PyInterpreterState_Get() != PyInterpreterState_Main()) {
    PyErr_SetString(PyExc_ImportError,
                    "flatstep works in the main interpreter only, as torch does");
    return nullptr;
  }
  return flatstep::init_in_main_interpreter();
}
