// One update of tensors that are given anew each time, as a graph of torch.compile has them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

namespace flatstep {

// Lists of plain tensors on the CPU.
struct GroupTensors {
  pybind11::list params, grads;
  pybind11::list states;  // those of the first parameter, then those of the second, and so on
  pybind11::list steps;   // 0-dim, which are counted on; none where nobody counts
  pybind11::list fresh;   // 0-dim, not 0 where a step is the first, which are cleared; or none
};

// Updates the parameters. firsts: the number of each one's first element, for chance, or none.
// False, with nothing changed, where a gradient or a state lies in memory in another order than its
// parameter.
bool update_group(const std::string& rule, unsigned variant, const GroupTensors& tensors,
                  const std::vector<double>& hyper, double scale, int threads, double average_decay,
                  std::uint64_t seed, const std::vector<std::uint32_t>& firsts);

}  // namespace flatstep
