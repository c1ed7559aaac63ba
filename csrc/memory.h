// Pages: the request for large ones, which most systems grant only to those that ask.
#pragma once

#include <cstddef>

namespace flatstep {

// Asks for (or, with wanted false, forbids) 2 MiB pages in the whole pages of [at, at + bytes).
// False where the system has none.
bool advise_huge_pages(void* at, std::size_t bytes, bool wanted);

}  // namespace flatstep
