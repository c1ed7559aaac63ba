// A build without CUDA.
#include <stdexcept>

#include "cuda/device.h"

namespace flatstep::cuda {

int device_count() { return 0; }

std::string absence() {
  return "this build of flatstep has no CUDA kernels; to get them, install it where nvcc is on the "
         "PATH: pip install --no-binary flatstep flatstep";
}

int device_of_host() { return kNoDevice; }

Table::~Table() = default;

const void* Table::upload(const void*, std::size_t, void*) { throw std::runtime_error(absence()); }

void run(int, void*, int, int, Launch&, const std::vector<Row>&, Table&) {
  throw std::runtime_error(absence());
}

void run_norm(int, void*, bool, const std::vector<NormRow>&, double*, NormEnd, Table&) {
  throw std::runtime_error(absence());
}

void finish_norm(int, void*, const NormEnd&) { throw std::runtime_error(absence()); }

}  // namespace flatstep::cuda
