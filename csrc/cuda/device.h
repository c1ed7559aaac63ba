// What the rest of the library asks of a GPU: whether one is there, and an update of rows on it.
#pragma once

#include <string>
#include <vector>

#include "cuda/launch.h"

namespace flatstep::cuda {

// How many GPUs can be used: none where this build has no CUDA, or no driver or GPU is there.
int device_count();
// Why there are none, and what to do about it; empty where there are some.
std::string absence();

// What memory of the CPU counts as: no GPU, but in the emulation that tests run.
int device_of_host();

// Rows of any kind kept on a device, for launches with more of them than their arguments hold.
// Written again only where a row has changed, in the order of the stream.
class Table {
 public:
  explicit Table(int device) : device_(device) {}
  Table(const Table&) = delete;
  Table& operator=(const Table&) = delete;
  ~Table();

  template <class AnyRow>
  const AnyRow* upload(const std::vector<AnyRow>& rows, void* stream) {
    return static_cast<const AnyRow*>(upload(rows.data(), rows.size() * sizeof(AnyRow), stream));
  }

 private:
  const void* upload(const void* rows, std::size_t bytes, void* stream);

  int device_;
  void* memory_ = nullptr;
  std::size_t room_ = 0;  // bytes
  std::vector<char> written_;
};

// One update on the device's stream, by the kernel of a layout and of a variant among all rules';
// returns before it is done. The launch says the types and extras, too. Fills in the launch's rows.
// One launch where no graph is being captured; under capture, where a table could be written again
// before the graph is replayed, one for every kInlineRows. Counts the steps of rows that have
// theirs on the device.
void run(int device, void* stream, int layout, int variant, Launch& launch,
         const std::vector<Row>& rows, Table& table);

// The norm of gradients on the device's stream, in room: a double for each of their tiles and for
// each of them. end says what becomes of it, and is told the rest. Returns before it is done.
void run_norm(int device, void* stream, bool largest, const std::vector<NormRow>& rows,
              double* room, NormEnd end, Table& table);

// The same of a total that is there already.
void finish_norm(int device, void* stream, const NormEnd& end);

}  // namespace flatstep::cuda
