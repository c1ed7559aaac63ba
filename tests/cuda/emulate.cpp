// The emulated loop for ctypes: tests/test_cuda_loop.py.
#include "emulate.h"

#include "cuda/form.h"

extern "C" {

int launch_size() { return sizeof(flatstep::cuda::Launch); }
int inline_rows() { return flatstep::cuda::kInlineRows; }
int row_alignment() { return static_cast<int>(flatstep::cuda::kRowAlignment); }

void emulate(const flatstep::cuda::Launch* launch, int layout, int variant, int blocks) {
  using namespace flatstep::cuda;
  emulation::run_update(layout, variant, *launch, static_cast<unsigned>(blocks));
}

// That have been loaded into stages so far.
int emulated_tiles() { return flatstep::cuda::emulation::EmulatedCopies::tiles(); }

// What FLATSTEP_CUDA_FORM says: whether it is the bulk form, most blocks, stages, a tile's bytes;
// false where it cannot be read.
bool read_form(const char* text, int* form) {
  try {
    const auto [in_bulk, blocks, pipeline] = flatstep::cuda::form_of(text);
    form[0] = in_bulk;
    form[1] = blocks;
    form[2] = pipeline.stages;
    form[3] = pipeline.tile;
  } catch (const std::invalid_argument&) {
    return false;
  }
  return true;
}

void emulate_count(const flatstep::cuda::Launch* launch, int blocks) {
  using namespace flatstep::cuda;
  emulation::run(&count<>, *launch, static_cast<unsigned>(blocks));
}

}  // extern "C"
