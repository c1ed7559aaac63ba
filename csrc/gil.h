// Python's lock, let go of while a kernel runs.
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

namespace flatstep {

// Lets other threads of Python run while it lives.
class WithoutGil {
 public:
  WithoutGil() : thread_(PyEval_SaveThread()) {}
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

  ~WithoutGil() {
    // Python before 3.14 ends a thread that comes back while the process exits, by an unwinding
    // that no destructor survives. Later ones let it wait for the end, and so does this.
    try {
      PyEval_RestoreThread(thread_);
    } catch (...) {
      for (;;) pause();
    }
  }

 private:
  PyThreadState* thread_;
};

}  // namespace flatstep
