#include "torch_tensor.h"

#include <pybind11/stl.h>

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
