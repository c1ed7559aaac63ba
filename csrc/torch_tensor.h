// What flatstep reads of a torch tensor, without linking torch: through the C table that torch
// offers since 2.10 (DLPack's exchange interface), or through Python attributes before.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "registry.h"

namespace flatstep {

struct TensorView {
  void* data = nullptr;
  Stored type = Stored::kUnknown;  // of a complex tensor: of its parts
  bool is_complex = false;
  bool on_cpu = false;
  int dims = 0;
  const std::int64_t* shape = nullptr;    // in elements of the tensor
  const std::int64_t* strides = nullptr;  // likewise
  std::vector<std::int64_t> storage;      // of shape and strides, where torch does not own them

  // In stored values: a complex element is two.
  std::int64_t count() const;
};

// Asks for the lines of the object that a tensor's shape lies in. The address is only a hint.
void prefetch_tensor(const void* shape);

// exchange_capsule: torch.Tensor.__dlpack_c_exchange_api__ or None. tensor_type, parameter_type:
// the classes whose instances are plain memory; dtensor_type: the class whose _local_tensor is,
// or None where torch has not loaded it.
void connect(pybind11::object exchange_capsule, pybind11::object tensor_type,
             pybind11::object parameter_type);
// library: the path of torch's, loaded already; open_handles: the Python function that makes
// handles. None for either: tensors are held without.
void connect_handles(const std::optional<std::string>& library, pybind11::object open_handles);
void connect_dtensor(pybind11::object dtensor_type);

// Whether the tensor is an instance of just Tensor or Parameter, and so its own memory.
bool is_plain(PyObject* tensor);
// The local tensor of a DTensor, the tensor itself otherwise (both borrowed).
PyObject* local_of(PyObject* tensor);
bool is_dtensor(PyObject* tensor);

// False (and no Python error) where the memory cannot be described.
bool view_of(PyObject* tensor, TensorView& view);

// Tensors that are held and looked at again and again. Where torch has handles of its stable C
// interface (aoti_torch/c/shim.h), a look costs a quarter of view_of.
class HeldTensors {
 public:
  HeldTensors() = default;
  HeldTensors(const HeldTensors&) = delete;
  HeldTensors& operator=(const HeldTensors&) = delete;
  ~HeldTensors() { clear(); }

  void add(pybind11::object tensor) { tensors_.push_back(std::move(tensor)); }
  // To be called once after the last add().
  void open();
  void clear();

  std::size_t size() const { return tensors_.size(); }
  // As view_of; the device is not looked at: memory on another has another address.
  bool view(std::size_t at, TensorView& view) const;
  void prefetch(std::size_t at) const;

 private:
  std::vector<pybind11::object> tensors_;
  std::vector<void*> handles_;
  std::vector<const void*> hints_;
};

}  // namespace flatstep
