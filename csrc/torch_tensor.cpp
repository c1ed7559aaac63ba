#include "torch_tensor.h"

#include <dlfcn.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <utility>

namespace flatstep {
namespace {

namespace py = pybind11;

// DLPack 1.3 (github.com/dmlc/dlpack, include/dlpack/dlpack.h), as far as it is read here.
struct DLTensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t ndim;
  std::uint8_t code, bits;
  std::uint16_t lanes;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct ExchangeTable {
  struct {
    std::uint32_t major, minor;
    void* previous;
  } header;
  void* allocate;
  void* managed_from_object;
  void* object_from_managed;
  int (*tensor_from_object)(void* object, DLTensor* out);
  void* current_work_stream;
};

enum DLCode : std::uint8_t { kDLInt = 0, kDLFloat = 2, kDLBfloat = 4, kDLComplex = 5 };
constexpr std::int32_t kDLCpu = 1, kDLCuda = 2;

struct Torch {
  const ExchangeTable* exchange = nullptr;
  PyObject *tensor_type = nullptr, *parameter_type = nullptr, *dtensor_type = nullptr;
  PyObject* local_tensor = nullptr;  // the attribute's name
  // Of plain tensors, called without a lookup.
  PyGetSetDef* grad = nullptr;
  PyMethodDef *is_neg = nullptr, *is_conj = nullptr;
};
Torch torch;

// What is used of torch's handles; every function answers 0 where it succeeds.
struct HandleTable {
  int (*data)(void* handle, void** out);
  int (*count)(void* handle, std::int64_t* out);
  int (*dtype)(void* handle, std::int32_t* out);
  int (*close)(void* handle);
};
HandleTable handles;
PyObject* open_handles = nullptr;  // null: no handles

template <class Function>
bool find(void* library, const char* symbol, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, symbol));
  return function != nullptr;
}

bool find_handles(void* library, HandleTable& table) {
  return find(library, "aoti_torch_get_data_ptr", table.data) &&
         find(library, "aoti_torch_get_numel", table.count) &&
         find(library, "aoti_torch_get_dtype", table.dtype) &&
         find(library, "aoti_torch_delete_tensor_object", table.close);
}

PyGetSetDef* find_getter(py::handle type, const char* name) {
  const py::object found = type.attr(name);
  if (!Py_IS_TYPE(found.ptr(), &PyGetSetDescr_Type)) return nullptr;
  return reinterpret_cast<PyGetSetDescrObject*>(found.ptr())->d_getset;
}

PyMethodDef* find_method(py::handle type, const char* name) {
  const py::object found = type.attr(name);
  if (!Py_IS_TYPE(found.ptr(), &PyMethodDescr_Type)) return nullptr;
  PyMethodDef* const method = reinterpret_cast<PyMethodDescrObject*>(found.ptr())->d_method;
  return method->ml_flags == METH_NOARGS ? method : nullptr;
}

// Whether the method of the tensor that takes nothing answers True.
bool answers_true(PyObject* tensor, const PyMethodDef* method, const char* name) {
  const auto answer = py::reinterpret_steal<py::object>(
      method && is_plain(tensor) ? method->ml_meth(tensor, nullptr)
                                 : PyObject_CallMethod(tensor, name, nullptr));
  if (!answer) throw py::error_already_set();
  return answer.is(py::handle(Py_True));
}

Stored stored_of(int code, int bits) {
  if (code == kDLFloat && bits == 32) return Stored::kFloat32;
  if (code == kDLFloat && bits == 64) return Stored::kFloat64;
  if (code == kDLFloat && bits == 16) return Stored::kFloat16;
  if (code == kDLBfloat && bits == 16) return Stored::kBFloat16;
  if (code == kDLInt && bits == 16) return Stored::kInt16;
  return Stored::kUnknown;
}

bool view_by_table(PyObject* tensor, TensorView& view) {
  DLTensor raw;
  if (torch.exchange->tensor_from_object(tensor, &raw) != 0) {
    PyErr_Clear();
    return false;
  }
  view.data = static_cast<char*>(raw.data) + raw.byte_offset;
  view.is_complex = raw.code == kDLComplex;
  view.type = view.is_complex ? stored_of(kDLFloat, raw.bits / 2) : stored_of(raw.code, raw.bits);
  view.device = kOtherDevice;
  if (raw.device_type == kDLCpu) view.device = cuda::device_of_host();
  if (raw.device_type == kDLCuda) view.device = raw.device_id;
  view.dims = raw.ndim;
  view.shape = raw.shape;
  view.strides = raw.strides;
  return true;
}

bool view_by_attributes(PyObject* object, TensorView& view) {
  try {
    const auto tensor = py::reinterpret_borrow<py::object>(object);
    const auto dtype = py::str(tensor.attr("dtype")).cast<std::string>();
    view.is_complex = dtype == "torch.complex64" || dtype == "torch.complex128";
    view.type = Stored::kUnknown;
    for (const Stored type : {Stored::kFloat32, Stored::kFloat64, Stored::kBFloat16,
                              Stored::kFloat16, Stored::kInt16}) {
      if (dtype == std::string("torch.") + name_of(type)) view.type = type;
    }
    if (dtype == "torch.complex64") view.type = Stored::kFloat32;
    if (dtype == "torch.complex128") view.type = Stored::kFloat64;
    const auto device = tensor.attr("device").attr("type").cast<std::string>();
    view.device = kOtherDevice;
    if (device == "cpu") view.device = cuda::device_of_host();
    if (device == "cuda") view.device = tensor.attr("device").attr("index").cast<int>();
    view.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<std::uintptr_t>());
    view.storage = tensor.attr("shape").cast<std::vector<std::int64_t>>();
    const auto strides = tensor.attr("stride")().cast<std::vector<std::int64_t>>();
    view.dims = static_cast<int>(strides.size());
    view.storage.insert(view.storage.end(), strides.begin(), strides.end());
    view.shape = view.storage.data();
    view.strides = view.storage.data() + view.dims;
    return true;
  } catch (const py::error_already_set&) {
    return false;
  }
}

}  // namespace

std::int64_t TensorView::count() const {
  std::int64_t product = is_complex ? 2 : 1;
  for (int i = 0; i < dims; ++i) product *= shape[i];
  return product;
}

bool TensorView::is_compact() const {
  std::int64_t product = 1, reach = 0;
  for (int i = 0; i < dims; ++i) {
    product *= shape[i];
    reach += (shape[i] - 1) * strides[i];
  }
  return product == 0 || product == reach + 1;
}

bool TensorView::is_aligned() const {
  return reinterpret_cast<std::uintptr_t>(data) % static_cast<unsigned>(size_of(type)) == 0;
}

void connect(py::object exchange_capsule, py::object tensor_type, py::object parameter_type) {
  torch.exchange = nullptr;
  if (!exchange_capsule.is_none()) {
    const auto* table = static_cast<const ExchangeTable*>(
        PyCapsule_GetPointer(exchange_capsule.ptr(), "dlpack_exchange_api"));
    if (!table) throw py::error_already_set();
    if (table->header.major == 1 && table->tensor_from_object) torch.exchange = table;
  }
  torch.grad = find_getter(tensor_type, "grad");
  torch.is_neg = find_method(tensor_type, "is_neg");
  torch.is_conj = find_method(tensor_type, "is_conj");
  torch.tensor_type = tensor_type.release().ptr();
  torch.parameter_type = parameter_type.release().ptr();
  if (!torch.local_tensor) torch.local_tensor = PyUnicode_InternFromString("_local_tensor");
}

void connect_handles(const std::optional<std::string>& library, py::object open) {
  Py_CLEAR(open_handles);
  if (!library || open.is_none()) return;
  void* const found = dlopen(library->c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (found && find_handles(found, handles)) open_handles = open.release().ptr();
}

void HeldTensors::add(py::object tensor, const TensorView& seen) {
  tensors_.push_back(std::move(tensor));
  held_.push_back({nullptr, seen.data, seen.count(), 0, seen.type, seen.shape});
}

void HeldTensors::open() {
  if (!open_handles) return;
  const auto capsules = py::reinterpret_borrow<py::function>(open_handles)(py::cast(tensors_));
  std::size_t next = 0;
  for (const auto& capsule : capsules) {
    Held& held = held_.at(next++);
    if (held.handle) handles.close(std::exchange(held.handle, nullptr));
    held.handle = PyCapsule_GetPointer(capsule.ptr(), PyCapsule_GetName(capsule.ptr()));
    if (!held.handle) throw py::error_already_set();
    handles.count(held.handle, &held.count);
    handles.dtype(held.handle, &held.dtype);
  }
}

void HeldTensors::clear() {
  for (const Held& held : held_) {
    if (held.handle) handles.close(held.handle);
  }
  held_.clear();
  // What goes with a tensor may come back here.
  const auto tensors = std::exchange(tensors_, {});
}

bool HeldTensors::is_in_place(std::size_t at) const {
  const Held& held = held_[at];
  if (!held.handle) {
    TensorView now;
    return view_of(tensors_[at].ptr(), now) && now.data == held.data && now.type == held.type &&
           now.count() == held.count;
  }
  void* data = nullptr;
  std::int64_t count = -1;
  std::int32_t dtype = -1;
  return handles.data(held.handle, &data) == 0 && data == held.data &&
         handles.count(held.handle, &count) == 0 && count == held.count &&
         handles.dtype(held.handle, &dtype) == 0 && dtype == held.dtype;
}

void HeldTensors::prefetch(std::size_t at) const {
  if (at >= held_.size()) return;
  __builtin_prefetch(held_[at].handle);
  prefetch_tensor(held_[at].hint, false);
}

// The shape lies in the tensor's object, 64 bytes or so from its beginning; a storage's object was
// most likely allocated just before.
void prefetch_tensor(const void* shape, bool with_storage) {
  const auto at = reinterpret_cast<std::uintptr_t>(shape);  // of any value: no access can fault
  for (std::uintptr_t line = at - (with_storage ? 5 : 1) * 64; line <= at + 128; line += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(line));
  }
}

void connect_dtensor(py::object dtensor_type) { torch.dtensor_type = dtensor_type.release().ptr(); }

bool is_plain(PyObject* tensor) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  return type == torch.tensor_type || type == torch.parameter_type;
}

bool is_dtensor(PyObject* tensor) {
  return torch.dtensor_type && reinterpret_cast<PyObject*>(Py_TYPE(tensor)) == torch.dtensor_type;
}

PyObject* local_of(PyObject* tensor) {
  if (!is_dtensor(tensor)) return tensor;
  PyObject* local = PyObject_GetAttr(tensor, torch.local_tensor);
  if (!local) throw py::error_already_set();
  Py_DECREF(local);  // the DTensor holds it
  return local;
}

py::object grad_of(PyObject* tensor) {
  static PyObject* const kGrad = PyUnicode_InternFromString("grad");
  PyObject* const grad = torch.grad && is_plain(tensor)
                             ? torch.grad->get(tensor, torch.grad->closure)
                             : PyObject_GetAttr(tensor, kGrad);
  if (!grad) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(grad);
}

bool is_unresolved(PyObject* tensor, bool is_complex) {
  return answers_true(tensor, torch.is_neg, "is_neg") ||
         (is_complex && answers_true(tensor, torch.is_conj, "is_conj"));
}

bool view_of(PyObject* tensor, TensorView& view) {
  return torch.exchange ? view_by_table(tensor, view) : view_by_attributes(tensor, view);
}

}  // namespace flatstep
