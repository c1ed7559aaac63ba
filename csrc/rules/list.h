// A list of types, to be walked by folds.
#pragma once

namespace flatstep {

template <class... Items>
struct List {
  static constexpr int kCount = sizeof...(Items);
};

}  // namespace flatstep
