// The threads that an update runs on: torch's own where torch lends them, else a pool of ours.
#pragma once

#include <cstdint>

namespace flatstep {

// The functions of torch's stable C interface (torch/csrc/stable/c/shim.h, torch 2.10 and newer).
struct TorchThreads {
  using Task = void (*)(std::int64_t begin, std::int64_t end, void* context);
  int (*parallel_for)(std::int64_t begin, std::int64_t end, std::int64_t grain, Task task,
                      void* context) = nullptr;
  int (*num_threads)(std::uint32_t* count) = nullptr;
};

// Looks the functions up in the library at path, which must be loaded already. False where they
// are absent, or where path is null: then the pool of ours serves.
bool use_torch_threads(const char* path);

// How many threads torch would use now: 1 in a forked child, whose parent's threads do not exist.
// fallback answers where torch's function is absent.
int available_threads(int fallback);

// Calls task(i, context) for i in [0, count), on count threads at most; the caller is one.
void run_on_threads(int count, void (*task)(int index, void* context), void* context);

}  // namespace flatstep
