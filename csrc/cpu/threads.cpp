#include "cpu/threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace flatstep {
namespace {

TorchThreads torch_threads;
std::atomic<bool> is_forked_child = false;

// The shares of one update. Whoever comes takes the next one, so that each runs exactly once
// even where a pool fails half-way and the caller has to finish.
class Job {
 public:
  Job(int count, void (*task)(int index, void* context), void* context)
      : count_(count), task_(task), context_(context) {}

  bool run_next() {
    const int index = next_++;
    if (index < count_) task_(index, context_);
    return index < count_;
  }

  void run_rest() {
    while (run_next()) {
    }
  }

 private:
  const int count_;
  void (*const task_)(int index, void* context);
  void* const context_;
  std::atomic<int> next_ = 0;
};

// Threads that wait for one job at a time; a caller that finds them taken works alone.
class Pool {
 public:
  // Never destroyed: its threads may outlive every static.
  static Pool& get() {
    static Pool* pool = new Pool;
    return *pool;
  }

  void help(int helpers, Job& job) {
    const std::unique_lock<std::mutex> only(busy_, std::try_to_lock);
    if (!only) return job.run_rest();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      hire(helpers);
      job_ = &job;
      wanted_ = helpers;
      ++generation_;
    }
    wake_.notify_all();
    job.run_rest();
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;
    done_.wait(lock, [this] { return active_ == 0; });
  }

 private:
  void hire(int helpers) {
    try {
      while (static_cast<int>(workers_.size()) < helpers) {
        workers_.emplace_back(&Pool::work, this, generation_);
      }
    } catch (const std::exception&) {
      // The system gives no more threads: those that there are do the work.
    }
  }

  void work(std::uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (wanted_ == 0) continue;
      --wanted_;
      ++active_;
      Job& job = *job_;
      lock.unlock();
      job.run_rest();
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  int wanted_ = 0;
  int active_ = 0;
  std::uint64_t generation_ = 0;
};

void run_range(std::int64_t begin, std::int64_t end, void* job) {
  for (std::int64_t i = begin; i < end; ++i) static_cast<Job*>(job)->run_next();
}

}  // namespace

bool use_torch_threads(const char* path) {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });
  static_cast<void>(registered);
  torch_threads = {};
  void* library = path ? dlopen(path, RTLD_LAZY | RTLD_NOLOAD) : nullptr;
  if (!library) return false;
  TorchThreads found;
  found.parallel_for =
      reinterpret_cast<decltype(found.parallel_for)>(dlsym(library, "torch_parallel_for"));
  found.num_threads =
      reinterpret_cast<decltype(found.num_threads)>(dlsym(library, "torch_get_num_threads"));
  if (!found.parallel_for || !found.num_threads) return false;
  torch_threads = found;
  return true;
}

int available_threads(int fallback) {
  if (is_forked_child) return 1;
  std::uint32_t count = 0;
  if (torch_threads.num_threads && torch_threads.num_threads(&count) == 0 && count > 0) {
    return static_cast<int>(count);
  }
  return fallback;
}

void run_on_threads(int count, void (*task)(int index, void* context), void* context) {
  Job job(count, task, context);
  if (count > 1 && !is_forked_child) {
    if (torch_threads.parallel_for) {
      torch_threads.parallel_for(0, count, 1, &run_range, &job);
    } else {
      Pool::get().help(count - 1, job);
    }
  }
  job.run_rest();
}

}  // namespace flatstep
