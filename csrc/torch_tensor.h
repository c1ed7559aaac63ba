// What flatstep reads of a torch tensor, without linking torch: through the C table that torch
// offers since 2.10 (DLPack's exchange interface), or through Python attributes before.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "registry.h"

namespace flatstep {

// Where memory is: on the CPU, elsewhere, or on the GPU of a number.
inline constexpr int kCpu = cuda::kNoDevice, kOtherDevice = -2;

struct TensorView {
  void* data = nullptr;
  Stored type = Stored::kUnknown;  // of a complex tensor: of its parts
  bool is_complex = false;
  int device = kOtherDevice;
  int dims = 0;
  const std::int64_t* shape = nullptr;    // in elements of the tensor
  const std::int64_t* strides = nullptr;  // likewise
  std::vector<std::int64_t> storage;      // of shape and strides, where torch does not own them

  // In stored values: a complex element is two.
  std::int64_t count() const;

  // Whether the elements lie in as much memory as they need, in whatever order.
  bool is_compact() const;

  // Whether the address is a multiple of an element's size.
  bool is_aligned() const;
};

// Asks for the lines of the objects that a tensor is made of, given where its shape lies. The
// address is only a hint. with_storage: its storage is its own, and not one that many share.
void prefetch_tensor(const void* shape, bool with_storage);

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

// tensor.grad, a new reference.
pybind11::object grad_of(PyObject* tensor);
// tensor.is_neg() or tensor.is_conj(): whether memory holds other values than the tensor's.
bool is_unresolved(PyObject* tensor, bool is_complex);

// False (and no Python error) where the memory cannot be described.
bool view_of(PyObject* tensor, TensorView& view);

// Tensors that are held and looked at again and again. Where torch has handles of its stable C
// interface (aoti_torch/c/shim.h), a look costs a tenth of view_of.
class HeldTensors {
 public:
  HeldTensors() = default;
  HeldTensors(const HeldTensors&) = delete;
  HeldTensors& operator=(const HeldTensors&) = delete;
  ~HeldTensors() { clear(); }

  // data: where its memory is; seen: the rest of what it must stay.
  void add(pybind11::object tensor, const TensorView& seen);
  // To be called once after the last add().
  void open();
  void clear();

  std::size_t size() const { return tensors_.size(); }
  // Whether the tensor's memory is where it was, of the same type and size.
  bool is_in_place(std::size_t at) const;
  void prefetch(std::size_t at) const;

 private:
  struct Held {
    void* handle;
    const void* data;
    std::int64_t count;
    std::int32_t dtype;
    Stored type;
    const void* hint;
  };

  std::vector<pybind11::object> tensors_;
  std::vector<Held> held_;
};

}  // namespace flatstep
