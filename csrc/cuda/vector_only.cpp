// The choice of a kernel in a build without the bulk form.
#include "cuda/form.h"
#include "cuda/kernels.h"

namespace flatstep::cuda {

Choice choose_kernel(int, int layout, int variant, Launch& launch) {
  static const Form form = chosen_form();
  if (form != Form{}) {
    throw std::runtime_error(std::string(kFormVariable) +
                             " is for builds that have both forms: unset it, or build with "
                             "-C cmake.define.FLATSTEP_CUDA_BULK=ON");
  }
  return {find_kernel(layout, variant, launch)};
}

}  // namespace flatstep::cuda
