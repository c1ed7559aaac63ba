// The tables of one instruction set's kernels, made by a walk over the rules and layouts.
#pragma once

#include "cpu/kernel.h"
#include "cpu/mixed.h"
#include "cpu/norm.h"

namespace flatstep {

template <class Target, int kRead, int kWritten>
void move_streams(float* const* streams, std::int64_t begin, std::int64_t end) {
  using V = typename Target::template Value<float>;
  constexpr int kLanes = Lanes<V>::kCount;
  for (std::int64_t at = begin; at + kLanes <= end; at += kLanes) {
    V sum = Lanes<V>::all(0);
    for (int i = 0; i < kRead; ++i) {
      prefetch(streams[i] + at);
      sum = sum + Lanes<V>::load(streams[i] + at);
    }
    for (int i = 0; i < kWritten; ++i) Lanes<V>::store(streams[i] + at, sum);
  }
}

template <class Target>
class TablesMaker {
 public:
  static constexpr KernelTables make() {
    TablesMaker maker;
    maker.add_layouts(Layouts{});
    maker.next_ = 0;
    maker.add_mixed<float>(Rules{});
    maker.add_mixed<double>(Rules{});
    maker.tables_.norms = &Norm<Target>::run;
    maker.add_traffic<1, 1>();
    return maker.tables_;
  }

 private:
  template <class... Layout>
  constexpr void add_layouts(List<Layout...>) {
    (add_rules<Layout>(Rules{}), ...);
  }

  template <class Layout, class... Rule>
  constexpr void add_rules(List<Rule...>) {
    (add_flags<Layout, Rule, 0>(), ...);
  }

  template <class Layout, class Rule, unsigned kFlags>
  constexpr void add_flags() {
    if constexpr (kFlags < Rule::kFlagEnd) {
      Kernel& kernel = tables_.kernels[next_++];
      if constexpr (Rule::allows(kFlags)) kernel = &Loop<Target, Rule, kFlags, Layout>::run;
      add_flags<Layout, Rule, kFlags + 1>();
    }
  }

  template <class T, class... Rule>
  constexpr void add_mixed(List<Rule...>) {
    (add_mixed_flags<T, Rule, 0>(), ...);
  }

  template <class T, class Rule, unsigned kFlags>
  constexpr void add_mixed_flags() {
    if constexpr (kFlags < Rule::kFlagEnd) {
      Kernel& kernel = tables_.mixed[next_++];
      if constexpr (Rule::allows(kFlags)) kernel = &Mixed<Target, Rule, kFlags, T>::run;
      add_mixed_flags<T, Rule, kFlags + 1>();
    }
  }

  template <int kRead, int kWritten>
  constexpr void add_traffic() {
    if constexpr (kRead <= kMaxStreams) {
      tables_.traffic[kRead * (kMaxStreams + 1) + kWritten] =
          &move_streams<Target, kRead, kWritten>;
      if constexpr (kWritten < kRead) {
        add_traffic<kRead, kWritten + 1>();
      } else {
        add_traffic<kRead + 1, 1>();
      }
    }
  }

  KernelTables tables_ = {};
  int next_ = 0;
};

}  // namespace flatstep
