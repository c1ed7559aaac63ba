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
  if (!segment.clears) return segment.kernel(segment.work, begin, end);
  auto* const grad = static_cast<char*>(const_cast<void*>(segment.work.arrays.grad));
  const int size = size_of(segment.work.types.grad);
  for (std::int64_t at = begin; at < end; at += kClearBlock) {
    const std::int64_t stop = std::min(at + kClearBlock, end);
    segment.kernel(segment.work, at, stop);
    std::memset(grad + at * size, 0, static_cast<std::size_t>((stop - at) * size));
  }
}

// Where one of so many equal shares of a total begins.
std::int64_t bound(std::int64_t total, int shares, int index) {
  return total / shares * index + total % shares * index / shares;
}

struct Shares {
  const std::vector<Segment>& segments;
  std::int64_t total;
  int count;

  void run(int index) const {
    const IeeeMode ieee;
    const std::int64_t begin = bound(total, count, index), end = bound(total, count, index + 1);
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

struct NormShares {
  const std::vector<Gradient>& gradients;
  TileNorms norms;
  bool largest;
  std::vector<std::int64_t> first;  // tile of each gradient, and the end
  std::vector<double> tiles;
  int count;

  void run(int index) {
    const IeeeMode ieee;
    const std::int64_t begin = bound(first.back(), count, index);
    const std::int64_t end = bound(first.back(), count, index + 1);
    const auto after = std::upper_bound(first.begin(), first.end(), begin);
    for (auto i = static_cast<std::size_t>(after - first.begin() - 1); i < gradients.size(); ++i) {
      const std::int64_t from = std::max(begin, first[i]), to = std::min(end, first[i + 1]);
      if (from >= to && first[i] >= end) break;
      const Gradient& gradient = gradients[i];
      norms(gradient.data, gradient.type, gradient.count, from - first[i], to - first[i], largest,
            tiles.data() + from);
    }
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

std::int64_t tile_count(std::int64_t count) { return (count + kNormTile - 1) / kNormTile; }

std::vector<double> run_tile_norms(const std::vector<Gradient>& gradients, bool largest,
                                   int threads) {
  NormShares shares{gradients, current_isa().tables->norms, largest, {0}, {}, 1};
  std::int64_t total = 0;
  for (const Gradient& gradient : gradients) {
    shares.first.push_back(shares.first.back() + tile_count(gradient.count));
    total += gradient.count;
  }
  shares.tiles.resize(static_cast<std::size_t>(shares.first.back()));
  shares.count = useful_threads(total, threads);
  run_on_threads(
      shares.count, [](int index, void* context) { static_cast<NormShares*>(context)->run(index); },
      &shares);
  return std::move(shares.tiles);
}

double add_norms(const double* norms, std::int64_t count, bool largest) {
  const IeeeMode ieee;
  double total = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    total = largest ? maximum(total, norms[i]) : total + norms[i];
  }
  return total;
}

std::vector<double> run_norms(const std::vector<Gradient>& gradients, bool largest, int threads) {
  const std::vector<double> tiles = run_tile_norms(gradients, largest, threads);
  std::vector<double> norms;
  const double* next = tiles.data();
  for (const Gradient& gradient : gradients) {
    const std::int64_t count = tile_count(gradient.count);
    norms.push_back(add_norms(next, count, largest));
    next += count;
  }
  return norms;
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
  Task all{streams.data(), current_isa().tables->traffic[at], count / kCut,
           useful_threads(count, threads)};
  run_on_threads(
      all.shares, [](int index, void* context) { static_cast<Task*>(context)->run(index); }, &all);
}

}  // namespace flatstep
