// The copy engine on the host. Every copy is made as late as it may be, into memory that holds
// other bytes until then, and a call that the engine's rules forbid ends the program.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <vector>

namespace flatstep::cuda::emulation {

inline void require(bool holds, const char* rule) {
  if (holds) return;
  std::fprintf(stderr, "the emulated copy engine: %s\n", rule);
  std::abort();
}

inline constexpr int kMostShared = 226 << 10;  // bytes, beside a kernel's own

class EmulatedCopies {
  struct Copy {
    char* to;
    const char* from;
    int bytes;
  };

 public:
  struct Arrived {
    unsigned parity = 0;  // of the phase that is not over
    bool is_expected = false;
    int expected = 0, asked = 0;
    std::vector<Copy> copies;
  };

  static void begin_block(int bytes) {
    require(bytes <= kMostShared, "a block asks for more shared memory than Hopper gives it");
    block_.memory.assign(static_cast<std::size_t>(bytes) / sizeof(Line), Line{});
    block_.published.assign(kThreads, 0);
    block_.stored = 0;
  }

  static void end_block() {
    require(block_.groups.empty() && block_.open.empty(),
            "the block ended before its stores had read shared memory");
    for (const Arrived* arrived : block_.arrived) {
      require(!arrived->is_expected && arrived->copies.empty(),
              "the block ended before its loads had arrived");
    }
    block_.arrived.clear();
  }

  // That have been loaded so far, in all blocks.
  static int tiles() { return tiles_; }

  static char* memory() { return reinterpret_cast<char*>(block_.memory.data()); }

  static void init(Arrived& arrived) {
    const std::lock_guard lock(mutex_);
    arrived = {};
    block_.arrived.push_back(&arrived);
  }

  static void publish() {
    const std::lock_guard lock(mutex_);
    block_.published[threadIdx.x] += 1;
  }

  static void expect(Arrived& arrived, int bytes) {
    const std::lock_guard lock(mutex_);
    require(!arrived.is_expected, "one arrival ends a phase, and there were two");
    arrived.is_expected = true;
    arrived.expected = bytes;
    tiles_ += 1;
    changed_.notify_all();
  }

  static void load(void* to, const void* from, int bytes, Arrived& arrived) {
    const std::lock_guard lock(mutex_);
    const Copy copy = {static_cast<char*>(to), static_cast<const char*>(from), bytes};
    require_rules(copy, copy.to);
    for (const auto& group : block_.groups) {
      for (const Copy& store : group) {
        require(copy.to + bytes <= store.from || store.from + store.bytes <= copy.to,
                "a load overwrites what a store has not read");
      }
    }
    std::memset(to, 0xa5, static_cast<std::size_t>(bytes));
    arrived.copies.push_back(copy);
    arrived.asked += bytes;
    require(arrived.asked <= arrived.expected, "more bytes are loaded than are expected");
    changed_.notify_all();
  }

  static void wait(Arrived& arrived, unsigned parity) {
    std::unique_lock lock(mutex_);
    const auto is_over = [&] { return arrived.parity != parity; };
    const auto can_end = [&] { return arrived.is_expected && arrived.asked == arrived.expected; };
    require(
        changed_.wait_for(lock, std::chrono::seconds(60), [&] { return is_over() || can_end(); }),
        "the bytes that are waited for never arrive");
    if (is_over()) return;
    for (const Copy& copy : arrived.copies) make(copy);
    arrived = {};
    arrived.parity = parity ^ 1;
    changed_.notify_all();
  }

  static void store(void* to, const void* from, int bytes) {
    const std::lock_guard lock(mutex_);
    const Copy copy = {static_cast<char*>(to), static_cast<const char*>(from), bytes};
    require_rules(copy, copy.from);
    for (int thread = 0; thread < kThreads; ++thread) {
      const int others = block_.published[static_cast<std::size_t>(thread)] - (thread == 0);
      require(others > block_.stored, "a tile is stored before each thread has published its part");
    }
    block_.open.push_back(copy);
  }

  static void commit() {
    const std::lock_guard lock(mutex_);
    require_issuer();
    block_.groups.push_back(std::move(block_.open));
    block_.open = {};
    block_.stored += 1;
  }

  template <int kLeft>
  static void wait_read() {
    const std::lock_guard lock(mutex_);
    require_issuer();
    for (; block_.groups.size() > kLeft; block_.groups.pop_front()) {
      for (const Copy& copy : block_.groups.front()) make(copy);
    }
  }

  static void wait_written() { wait_read<0>(); }

 private:
  struct alignas(128) Line {
    char bytes[128];
  };

  struct Block {
    std::vector<Line> memory;
    std::vector<Arrived*> arrived;
    std::vector<int> published;  // by each thread
    int stored;                  // groups
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;  // that may not have read yet
  };

  static void make(const Copy& copy) {
    std::memcpy(copy.to, copy.from, static_cast<std::size_t>(copy.bytes));
  }

  static void require_issuer() {
    require(threadIdx.x == 0, "groups belong to the thread that made them");
  }

  // A copy with one end in shared memory.
  static void require_rules(const Copy& copy, const char* shared) {
    require_issuer();
    require(reinterpret_cast<std::uintptr_t>(copy.to) % 16 == 0 &&
                reinterpret_cast<std::uintptr_t>(copy.from) % 16 == 0 && copy.bytes % 16 == 0 &&
                copy.bytes > 0,
            "addresses and sizes are multiples of 16 bytes");
    const char* const end =
        reinterpret_cast<const char*>(block_.memory.data() + block_.memory.size());
    require(shared >= memory() && shared + copy.bytes <= end, "a stage is outside shared memory");
  }

  inline static std::mutex mutex_;
  inline static std::condition_variable changed_;
  inline static Block block_;
  inline static int tiles_ = 0;
};

}  // namespace flatstep::cuda::emulation
