// The choice of the instruction set at run time.
#include "cpu/isa.h"

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

namespace flatstep {
namespace {

const Isa* best_isa() {
  const Isa* const* isa = kIsas;
  while (!(*isa)->supported()) ++isa;
  return *isa;
}

std::atomic<const Isa*>& chosen() {
  static std::atomic<const Isa*> isa = best_isa();
  return isa;
}

}  // namespace

bool always_supported() { return true; }

const Isa& current_isa() { return *chosen().load(std::memory_order_relaxed); }

void use_isa(const char* name) {
  std::string names;
  for (const Isa* const* isa = kIsas; *isa; ++isa) {
    if (std::strcmp((*isa)->name, name) == 0) {
      if ((*isa)->supported()) {
        chosen() = *isa;
        return;
      }
      throw std::invalid_argument("instruction set '" + std::string(name) +
                                  "' is in this build, but this processor does not have it");
    }
    names += (names.empty() ? "" : ", ") + std::string((*isa)->name);
  }
  throw std::invalid_argument("instruction set '" + std::string(name) +
                              "' is not in this build, which has: " + names);
}

}  // namespace flatstep
