#include "cpu/update.h"

#include <algorithm>
#include <cstring>

#include "cpu/floating_point.h"
#include "cpu/threads.h"

namespace flatstep {
namespace {

// Shares begin at multiples of this within a segment: whole cache lines in every layout.
constexpr std::int64_t kCut = 64;
// What is updated before its gradient is cleared: small enough to be in the first cache still.
constexpr std::int64_t kClearBlock = 2048;

void run_part(const Segment& segment, std::int64_t begin, std::int64_t end) {
  if (!segment.cleared) return segment.kernel(segment.arrays, begin, end, segment.scalars);
  for (std::int64_t at = begin; at < end; at += kClearBlock) {
    const std::int64_t stop = std::min(at + kClearBlock, end);
    segment.kernel(segment.arrays, at, stop, segment.scalars);
    std::memset(static_cast<char*>(segment.cleared) + at * segment.cleared_size, 0,
                static_cast<std::size_t>((stop - at) * segment.cleared_size));
  }
}

struct Shares {
  const std::vector<Segment>& segments;
  std::int64_t total;
  int count;

  std::int64_t bound(int index) const {
    return total / count * index + total % count * index / count;
  }

  void run(int index) const {
    const IeeeMode ieee;
    const std::int64_t begin = bound(index), end = bound(index + 1);
    std::int64_t start = 0;  // of the segment, in elements of the whole update
    for (const Segment& segment : segments) {
      if (start >= end) break;
      const std::int64_t first = cut(segment, begin - start), last = cut(segment, end - start);
      if (first < last) run_part(segment, first, last);
      start += segment.count;
    }
  }

  static std::int64_t cut(const Segment& segment, std::int64_t at) {
    if (at <= 0) return 0;
    return at >= segment.count ? segment.count : at / kCut * kCut;
  }
};

int useful_threads(std::int64_t elements, int threads) {
  const std::int64_t most = elements / kElementsPerThread + 1;
  return static_cast<int>(std::clamp<std::int64_t>(most, 1, std::max(threads, 1)));
}

}  // namespace

void run_update(const std::vector<Segment>& segments, int threads) {
  std::int64_t total = 0;
  for (const Segment& segment : segments) total += segment.count;
  Shares shares{segments, total, useful_threads(total, threads)};
  run_on_threads(
      shares.count, [](int index, void* context) { static_cast<Shares*>(context)->run(index); },
      &shares);
}

void run_traffic(const std::vector<float*>& streams, int written, std::int64_t count, int threads) {
  struct Task {
    float* const* streams;
    Traffic traffic;
    std::int64_t cuts;
    int shares;

    void run(int index) const {
      traffic(streams, cuts * index / shares * kCut, cuts * (index + 1) / shares * kCut);
    }
  };
  const std::size_t at = streams.size() * (kMaxStreams + 1) + static_cast<std::size_t>(written);
  Task all{streams.data(), current_isa().traffic[at], count / kCut, useful_threads(count, threads)};
  run_on_threads(
      all.shares, [](int index, void* context) { static_cast<Task*>(context)->run(index); }, &all);
}

}  // namespace flatstep
