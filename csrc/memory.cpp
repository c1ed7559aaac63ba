#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

namespace flatstep {

bool advise_huge_pages([[maybe_unused]] void* at, [[maybe_unused]] std::size_t bytes,
                       [[maybe_unused]] bool wanted) {
#if defined(MADV_HUGEPAGE)
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto start = (reinterpret_cast<std::uintptr_t>(at) + page - 1) / page * page;
  const auto end = (reinterpret_cast<std::uintptr_t>(at) + bytes) / page * page;
  if (start >= end) return false;
  return madvise(reinterpret_cast<void*>(start), end - start,
                 wanted ? MADV_HUGEPAGE : MADV_NOHUGEPAGE) == 0;
#else
  return false;
#endif
}

}  // namespace flatstep
