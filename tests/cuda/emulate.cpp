// The emulated loop for ctypes: tests/test_cuda_loop.py.
#include "emulate.h"

extern "C" {

int launch_size() { return sizeof(flatstep::cuda::Launch); }
int inline_rows() { return flatstep::cuda::kInlineRows; }
int row_alignment() { return static_cast<int>(flatstep::cuda::kRowAlignment); }

void emulate(const flatstep::cuda::Launch* launch, int layout, int variant, int blocks) {
  using namespace flatstep::cuda;
  emulation::run(emulation::find(layout, variant, *launch), *launch, static_cast<unsigned>(blocks));
}

void emulate_count(const flatstep::cuda::Launch* launch, int blocks) {
  using namespace flatstep::cuda;
  emulation::run(&count<>, *launch, static_cast<unsigned>(blocks));
}

}  // extern "C"
