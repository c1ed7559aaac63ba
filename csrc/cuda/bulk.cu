// The bulk form beside the vectorised one: a build with FLATSTEP_CUDA_BULK=ON.
#include <cuda_runtime.h>

#include "cuda/bulk.h"
#include "cuda/copies.h"
#include "cuda/form.h"
#include "cuda/kernels.h"
#include "cuda/variants.h"

namespace flatstep::cuda {
namespace {

struct BulkKernel {
  const void* kernel;
  int arrays;
};

struct BulkTable {
  BulkKernel kernels[Layouts::kCount][kVariants];
};

BulkTable make_table() {
  BulkTable table = {};
  visit_layouts(Layouts{}, [&]<class Layout>(int layout) {
    visit_variants(Rules{}, [&]<class Rule, unsigned kFlags>(int variant) {
      using L = Loop<Rule, kFlags, Layout>;
      table.kernels[layout][variant] = {
          reinterpret_cast<const void*>(&update_in_bulk<L, BulkCopies>), L::count_arrays()};
    });
  });
  return table;
}

bool has_copy_engine(int device) {
  int major = 0;
  return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major >= 9;
}

}  // namespace

Choice choose_kernel(int device, int layout, int variant, Launch& launch) {
  static const BulkTable table = make_table();
  const Form form = chosen_form();
  Choice choice = {find_kernel(layout, variant, launch), 0, form.blocks};
  if (!form.in_bulk || layout >= Layouts::kCount || launch.extras) return choice;
  if (!has_copy_engine(device)) {
    throw std::runtime_error("the bulk form needs a GPU of compute capability 9.0 or newer");
  }
  const BulkKernel& bulk = table.kernels[layout][variant];
  launch.pipeline = form.pipeline;
  choice.kernel = bulk.kernel;
  choice.shared = form.pipeline.stages * form.pipeline.tile * bulk.arrays;
  return choice;
}

}  // namespace flatstep::cuda
