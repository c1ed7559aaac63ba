// The floating-point mode of a thread: IEEE defaults while a kernel runs, the caller's after.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace flatstep {

// torch.set_flush_denormal changes one thread's mode and not another's: without this the bits
// would depend on the thread that an element falls to.
class IeeeMode {
 public:
  IeeeMode() : saved_(read()) { write(kIeee); }
  ~IeeeMode() { write(saved_); }
  IeeeMode(const IeeeMode&) = delete;
  IeeeMode& operator=(const IeeeMode&) = delete;

 private:
#if defined(__x86_64__)
  using Register = unsigned;
  static constexpr Register kIeee = 0x1f80;  // every exception masked, round to nearest
  static Register read() { return _mm_getcsr(); }
  static void write(Register mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
  using Register = std::uint64_t;
  static constexpr Register kIeee = 0;
  static Register read() {
    Register mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void write(Register mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
  using Register = int;
  static constexpr Register kIeee = 0;
  static Register read() { return 0; }
  static void write(Register) {}
#endif

  Register saved_;
};

}  // namespace flatstep
