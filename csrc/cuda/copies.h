// The copy engine in PTX, for compute capability 9.0 and newer: bulk copies between an array and
// shared memory. All sizes and addresses are multiples of 16 bytes.
//
// https://docs.nvidia.com/cuda/parallel-thread-execution, "cp.async.bulk" and "mbarrier".
#pragma once

#include <cstdint>

namespace flatstep::cuda {

struct BulkCopies {
  using Arrived = std::uint64_t;  // an mbarrier: whether a stage's bytes are there

  static __device__ char* memory() {
    extern __shared__ __align__(128) char stages[];
    return stages;
  }

  // For one thread that arrives.
  static __device__ void init(Arrived& arrived) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared(&arrived)) : "memory");
  }

  // What this thread has written to shared memory can be read by the copies that are asked for
  // later, by it or by another thread behind __syncthreads().
  static __device__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

  static __device__ void expect(Arrived& arrived, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared(&arrived)),
                 "r"(bytes)
                 : "memory");
  }

  static __device__ void load(void* to, const void* from, int bytes, Arrived& arrived) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
        "[%3];" ::"r"(shared(to)),
        "l"(global(from)), "r"(bytes), "r"(shared(&arrived))
        : "memory");
  }

  // Until the phase of that parity is over.
  static __device__ void wait(Arrived& arrived, unsigned parity) {
    unsigned over = 0;
    while (!over) {
      asm volatile(
          "{\n"
          ".reg .pred over;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
          "selp.u32 %0, 1, 0, over;\n"
          "}"
          : "=r"(over)
          : "r"(shared(&arrived)), "r"(parity)
          : "memory");
    }
  }

  static __device__ void store(void* to, const void* from, int bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global(to)),
                 "r"(shared(from)), "r"(bytes)
                 : "memory");
  }

  // Ends a group of this thread's stores.
  static __device__ void commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

  // Until all groups but the newest kLeft have read shared memory.
  template <int kLeft>
  static __device__ void wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kLeft) : "memory");
  }

  static __device__ void wait_written() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }

 private:
  static __device__ unsigned shared(const void* at) {
    return static_cast<unsigned>(__cvta_generic_to_shared(at));
  }
  static __device__ std::uint64_t global(const void* at) { return __cvta_generic_to_global(at); }
};

}  // namespace flatstep::cuda
