#include "torch_tensor.h"

#include <dlfcn.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <stdexcept>

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

enum DLCode : std::uint8_t { kDLFloat = 2, kDLBfloat = 4, kDLComplex = 5 };
constexpr std::int32_t kDLCpu = 1;

struct Torch {
  const ExchangeTable* exchange = nullptr;
  PyObject *tensor_type = nullptr, *parameter_type = nullptr, *dtensor_type = nullptr;
  PyObject* local_tensor = nullptr;  // the attribute's name
};
Torch torch;

// What is used of torch's handles; every function answers 0 where it succeeds.
struct HandleTable {
  int (*data)(void* handle, void** out);
  int (*dims)(void* handle, std::int64_t* out);
  int (*shape)(void* handle, const std::int64_t** out);
  int (*strides)(void* handle, const std::int64_t** out);
  int (*dtype)(void* handle, std::int32_t* out);
  int (*close)(void* handle);
  // The numbers of float32, float64, bfloat16, float16, complex64 and complex128.
  std::array<std::int32_t, 6> dtypes;
};
HandleTable handles;
PyObject* open_handles = nullptr;  // null: no handles

template <class Function>
bool find(void* library, const char* symbol, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, symbol));
  return function != nullptr;
}

bool find_handles(void* library, HandleTable& table) {
  const char* const names[] = {"float32", "float64",   "bfloat16",
                               "float16", "complex64", "complex128"};
  std::size_t next = 0;
  for (const char* name : names) {
    std::int32_t (*number)() = nullptr;
    if (!find(library, (std::string("aoti_torch_dtype_") + name).c_str(), number)) return false;
    table.dtypes[next++] = number();
  }
  return find(library, "aoti_torch_get_data_ptr", table.data) &&
         find(library, "aoti_torch_get_dim", table.dims) &&
         find(library, "aoti_torch_get_sizes", table.shape) &&
         find(library, "aoti_torch_get_strides", table.strides) &&
         find(library, "aoti_torch_get_dtype", table.dtype) &&
         find(library, "aoti_torch_delete_tensor_object", table.close);
}

bool view_by_handle(void* handle, TensorView& view) {
  std::int64_t dims = 0;
  std::int32_t dtype = -1;
  if (handles.data(handle, &view.data) || handles.dims(handle, &dims) ||
      handles.shape(handle, &view.shape) || handles.strides(handle, &view.strides) ||
      handles.dtype(handle, &dtype)) {
    return false;
  }
  constexpr Stored kStored[] = {Stored::kFloat32, Stored::kFloat64, Stored::kBFloat16,
                                Stored::kFloat16, Stored::kFloat32, Stored::kFloat64};
  view.dims = static_cast<int>(dims);
  view.type = Stored::kUnknown;
  for (std::size_t i = 0; i < handles.dtypes.size(); ++i) {
    if (dtype != handles.dtypes[i]) continue;
    view.type = kStored[i];
    view.is_complex = i >= 4;
  }
  return true;
}

Stored stored_of(int code, int bits) {
  if (code == kDLFloat && bits == 32) return Stored::kFloat32;
  if (code == kDLFloat && bits == 64) return Stored::kFloat64;
  if (code == kDLFloat && bits == 16) return Stored::kFloat16;
  if (code == kDLBfloat && bits == 16) return Stored::kBFloat16;
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
  view.on_cpu = raw.device_type == kDLCpu;
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
    for (const Stored type :
         {Stored::kFloat32, Stored::kFloat64, Stored::kBFloat16, Stored::kFloat16}) {
      if (dtype == std::string("torch.") + name_of(type)) view.type = type;
    }
    if (dtype == "torch.complex64") view.type = Stored::kFloat32;
    if (dtype == "torch.complex128") view.type = Stored::kFloat64;
    view.on_cpu = tensor.attr("device").attr("type").cast<std::string>() == "cpu";
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

void connect(py::object exchange_capsule, py::object tensor_type, py::object parameter_type) {
  torch.exchange = nullptr;
  if (!exchange_capsule.is_none()) {
    const auto* table = static_cast<const ExchangeTable*>(
        PyCapsule_GetPointer(exchange_capsule.ptr(), "dlpack_exchange_api"));
    if (!table) throw py::error_already_set();
    if (table->header.major == 1 && table->tensor_from_object) torch.exchange = table;
  }
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

void HeldTensors::open() {
  if (open_handles) {
    const auto capsules = py::reinterpret_borrow<py::function>(open_handles)(py::cast(tensors_));
    for (const auto& capsule : capsules) {
      handles_.push_back(PyCapsule_GetPointer(capsule.ptr(), PyCapsule_GetName(capsule.ptr())));
      if (!handles_.back()) throw py::error_already_set();
    }
  }
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    TensorView seen;
    hints_.push_back(view(i, seen) ? seen.shape : nullptr);
  }
}

void HeldTensors::clear() {
  for (void* handle : handles_) handles.close(handle);
  handles_.clear();
  tensors_.clear();
  hints_.clear();
}

bool HeldTensors::view(std::size_t at, TensorView& view) const {
  return handles_.empty() ? view_of(tensors_[at].ptr(), view) : view_by_handle(handles_[at], view);
}

void HeldTensors::prefetch(std::size_t at) const {
  if (at >= hints_.size()) return;
  __builtin_prefetch(handles_.empty() ? tensors_[at].ptr() : handles_[at]);
  prefetch_tensor(hints_[at]);
}

// The shape lies in the tensor's object; its storage's object was most likely allocated just
// before.
void prefetch_tensor(const void* shape) {
  const auto at = reinterpret_cast<std::uintptr_t>(shape);  // of any value: no access can fault
  for (std::uintptr_t line = at - 5 * 64; line <= at + 64; line += 64) {
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

bool view_of(PyObject* tensor, TensorView& view) {
  return torch.exchange ? view_by_table(tensor, view) : view_by_attributes(tensor, view);
}

}  // namespace flatstep
