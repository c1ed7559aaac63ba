#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/kernels.h"

namespace flatstep::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::string message = std::string(what) + ": " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion ||
      error == cudaErrorInvalidDeviceFunction) {
    message +=
        "; this build has kernels for compute capability 8.0 and newer, and needs a driver "
        "as new as its CUDA: build flatstep on this machine, or use torch.optim here";
  }
  throw std::runtime_error(message);
}

// The device is the current one while it lives.
class Guard {
 public:
  explicit Guard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    changed_ = device != previous_;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~Guard() {
    if (changed_) cudaSetDevice(previous_);
  }
  Guard(const Guard&) = delete;
  Guard& operator=(const Guard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// While it lives, this thread may allocate and free beside a stream that is being captured, which
// it does not touch; else the capture, of whatever thread, would be broken off.
class BesideCaptures {
 public:
  BesideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~BesideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  BesideCaptures(const BesideCaptures&) = delete;
  BesideCaptures& operator=(const BesideCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// As much shared memory for a kernel that takes some at its launch as the device gives a block.
void make_room(int device, const void* kernel, int wanted) {
  int most = 0;
  cudaFuncAttributes attributes;
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  most -= static_cast<int>(attributes.sharedSizeBytes);
  if (wanted > most) {
    throw std::runtime_error("stages * tile * arrays is " + std::to_string(wanted) +
                             " bytes, and a block has " + std::to_string(most) +
                             ": choose fewer stages or smaller tiles");
  }
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
        "making room for a kernel's stages");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared),
        "preferring shared memory to a cache");
}

// How many blocks of a kernel a device is to run at once.
int resident_blocks(int device, const Choice& choice) {
  static std::mutex mutex;
  static auto* const known = new std::map<std::tuple<int, const void*, int, int>, int>;
  const std::lock_guard lock(mutex);
  int& blocks = (*known)[{device, choice.kernel, choice.shared, choice.blocks}];
  if (blocks == 0) {
    int processors = 0, of_each = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
          "cudaDeviceGetAttribute");
    if (choice.shared > 0) make_room(device, choice.kernel, choice.shared);
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_each, choice.kernel, kThreads,
                                                        static_cast<std::size_t>(choice.shared)),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    if (choice.blocks > 0) of_each = std::min(of_each, choice.blocks);
    blocks = processors * std::max(of_each, 1);
  }
  return blocks;
}

template <class AnyLaunch>
void launch_kernel(const void* kernel, std::int64_t blocks, const AnyLaunch& launch,
                   cudaStream_t stream, int shared = 0) {
  void* arguments[] = {const_cast<AnyLaunch*>(&launch)};
  check(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments,
                         static_cast<std::size_t>(shared), stream),
        "launching an update");
}

// Whether rows are to be in a table, which could be written again before a captured graph is
// replayed.
bool goes_by_table(std::size_t rows, std::size_t inline_rows, cudaStream_t stream) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &capture), "cudaStreamIsCapturing");
  return rows > inline_rows && capture == cudaStreamCaptureStatusNone;
}

std::pair<int, std::string> find_devices() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaGetLastError();  // or the next caller is told
  if (error == cudaSuccess && count > 0) return {count, ""};
  if (error == cudaErrorInsufficientDriver) {
    return {0,
            "there is no NVIDIA driver, or one older than this build's CUDA: update the driver, or "
            "build flatstep with an older CUDA"};
  }
  return {0, "CUDA finds no GPU: " + std::string(cudaGetErrorString(error))};
}

const std::pair<int, std::string>& devices() {
  static const auto* const found = new std::pair<int, std::string>(find_devices());
  return *found;
}

}  // namespace

int device_count() { return devices().first; }

std::string absence() { return devices().second; }

int device_of_host() { return kNoDevice; }

Table::~Table() {
  if (!memory_) return;
  const BesideCaptures beside;
  int previous = 0;
  cudaGetDevice(&previous);
  cudaSetDevice(device_);
  cudaFree(memory_);  // waits for kernels that read it; fails, rightly, after the driver has gone
  cudaSetDevice(previous);
}

const void* Table::upload(const void* rows, std::size_t bytes, void* stream) {
  if (bytes == written_.size() && std::memcmp(rows, written_.data(), bytes) == 0) return memory_;
  written_.clear();
  if (bytes > room_) {
    const BesideCaptures beside;
    if (memory_) check(cudaFree(memory_), "cudaFree");
    memory_ = nullptr;
    room_ = 0;
    check(cudaMalloc(&memory_, bytes), "allocating a table of parameters");
    room_ = bytes;
  }
  // From pageable memory: it has been read when a call returns, and may be freed. More than 64 KiB
  // at once could wait for what the stream has to do before.
  constexpr std::size_t kAtOnce = 64 << 10;
  const auto* const from = static_cast<const char*>(rows);
  for (std::size_t at = 0; at < bytes; at += kAtOnce) {
    check(
        cudaMemcpyAsync(static_cast<char*>(memory_) + at, from + at, std::min(kAtOnce, bytes - at),
                        cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream)),
        "copying a table of parameters");
  }
  written_.assign(from, from + bytes);
  return memory_;
}

void run(int device, void* on_stream, int layout, int variant, Launch& launch,
         const std::vector<Row>& rows, Table& table) {
  if (rows.empty()) return;
  const Guard guard(device);
  const auto stream = static_cast<cudaStream_t>(on_stream);
  const Choice choice = choose_kernel(device, layout, variant, launch);
  const std::int64_t most = resident_blocks(device, choice);
  const bool by_table = goes_by_table(rows.size(), kInlineRows, stream);
  const std::size_t at_once = by_table ? rows.size() : kInlineRows;
  for (std::size_t first = 0; first < rows.size(); first += at_once) {
    const std::size_t count = std::min(at_once, rows.size() - first);
    const std::int64_t begin = rows[first].begin;
    launch.rows = by_table ? table.upload(rows, on_stream) : nullptr;
    launch.row_count = static_cast<int>(count);
    launch.total = end_of(rows[first + count - 1]) - begin;
    for (std::size_t i = 0; !by_table && i < count; ++i) {
      launch.inline_rows[i] = rows[first + i];
      launch.inline_rows[i].begin -= begin;
    }
    const std::int64_t useful = (launch.total + kElementsPerBlock - 1) / kElementsPerBlock;
    launch_kernel(choice.kernel, std::clamp<std::int64_t>(useful, 1, most), launch, stream,
                  choice.shared);
    if (rows[first].step) {
      launch_kernel(count_kernel(), (launch.row_count + kThreads - 1) / kThreads, launch, stream);
    }
  }
}

void run_norm(int device, void* on_stream, bool largest, const std::vector<NormRow>& rows,
              double* room, NormEnd end, Table& table) {
  const Guard guard(device);
  const auto stream = static_cast<cudaStream_t>(on_stream);
  const std::int64_t tiles = rows.empty() ? 0 : end_of(rows.back());
  const std::int64_t most = resident_blocks(device, {tile_norm_kernel()});
  const bool by_table = goes_by_table(rows.size(), kInlineNormRows, stream);
  const std::size_t at_once = by_table ? rows.size() : kInlineNormRows;
  for (std::size_t first = 0; first < rows.size(); first += at_once) {
    const std::size_t count = std::min(at_once, rows.size() - first);
    NormLaunch launch = {};
    launch.rows = by_table ? table.upload(rows, on_stream) : nullptr;
    launch.row_count = static_cast<int>(count);
    launch.largest = largest;
    launch.begin = rows[first].begin;
    launch.end = end_of(rows[first + count - 1]);
    launch.of_tiles = room;
    launch.of_rows = room + tiles + first;
    if (!by_table) std::copy_n(rows.data() + first, count, launch.inline_rows);
    const std::int64_t useful = (launch.end - launch.begin + kTilesPerBlock - 1) / kTilesPerBlock;
    if (useful > 0) {
      launch_kernel(tile_norm_kernel(), std::min(useful, most), launch, stream);
    }
    launch_kernel(row_norm_kernel(), std::min<std::int64_t>(launch.row_count, most), launch,
                  stream);
  }
  end.largest = largest;
  end.adds = true;
  end.of_rows = room + tiles;
  end.row_count = static_cast<std::int64_t>(rows.size());
  launch_kernel(norm_end_kernel(), 1, end, stream);
}

void finish_norm(int device, void* stream, const NormEnd& end) {
  const Guard guard(device);
  launch_kernel(norm_end_kernel(), 1, end, static_cast<cudaStream_t>(stream));
}

}  // namespace flatstep::cuda
