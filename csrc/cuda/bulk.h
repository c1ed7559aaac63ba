// The loop with bulk copies: the copy engine of compute capability 9.0 brings tiles of a row's
// arrays into shared memory and takes them back, and a block's threads update them there.
//
// The copies are a template argument, so that a test can run the loop with ones that check the
// order of the calls. What is too short or not aligned goes through the vectorised loop.
#pragma once

#include "cuda/kernel.h"

namespace flatstep::cuda {

// Stages of shared memory, each for one tile of every array. A tile is loaded into one while
// another is updated in place and a third is stored. One thread asks for all copies.
template <class L, class Copies>
class Pipe {
 public:
  static constexpr int kArrays = L::count_arrays();
  static constexpr int kElement = sizeof(typename L::P);
  static_assert(sizeof(typename L::G) == kElement && sizeof(typename L::S) == kElement);

  using Arrived = typename Copies::Arrived;

  __device__ Pipe(const Pipeline& shape, Arrived* arrived)
      : stages_(shape.stages), tile_(shape.tile), arrived_(arrived), memory_(Copies::memory()) {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < stages_; ++stage) Copies::init(arrived_[stage]);
      Copies::publish();
    }
    __syncthreads();
  }

  // Elements [begin, end) of a row; begin is a multiple of kRowAlignment.
  __device__ void run(const Launch& launch, const Row& row, std::int64_t begin, std::int64_t end,
                      const typename L::Prepared& k) {
    const std::int64_t size = tile_ / kElement;
    const std::int64_t tiles = all_aligned(row.arrays) ? (end - begin) / size : 0;
    if (threadIdx.x == 0) {
      for (int ahead = 0; ahead < stages_ - 1 && ahead < tiles; ++ahead) {
        load(row.arrays, begin + ahead * size);
      }
    }
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      Copies::wait(arrived_[updated_.stage], updated_.parity);
      char* const at = stage_at(updated_.stage);
      update(at, launch.clears, k);
      Copies::publish();
      __syncthreads();
      if (threadIdx.x == 0) {
        store(at, launch.clears, row.arrays, begin + tile * size);
        Copies::template wait_read<1>();  // the stage before this one is free
        const std::int64_t next = tile + stages_ - 1;
        if (next < tiles) load(row.arrays, begin + next * size);
      }
      updated_.advance(stages_);
    }
    const std::int64_t rest = begin + tiles * size;
    if (rest < end) L::template run<1>(launch, row, rest, end, k);
  }

  __device__ void finish() {
    if (threadIdx.x == 0) Copies::wait_written();
  }

 private:
  struct Place {
    int stage = 0;
    unsigned parity = 0;

    __device__ void advance(int stages) {
      if (++stage == stages) {
        stage = 0;
        parity ^= 1;
      }
    }
  };

  // Calls visit(array, place) for each array that the update has, in their order in a stage.
  template <class Visit>
  static __device__ void each(const Arrays& arrays, const Visit& visit) {
    visit(arrays.param, 0);
    visit(const_cast<void*>(arrays.grad), 1);
    int place = 2;
    for (int i = 0; i < L::kStates; ++i) {
      if (L::uses(i)) visit(arrays.state[i], place++);
    }
  }

  static __device__ bool all_aligned(const Arrays& arrays) {
    bool all = true;
    each(arrays, [&](const void* array, int) { all = all && is_aligned(array); });
    return all;
  }

  __device__ char* stage_at(int stage) const { return memory_ + stage * kArrays * tile_; }

  __device__ void load(const Arrays& arrays, std::int64_t first) {
    Arrived& arrived = arrived_[loaded_.stage];
    char* const to = stage_at(loaded_.stage);
    Copies::expect(arrived, kArrays * tile_);
    each(arrays, [&](void* array, int place) {
      Copies::load(to + place * tile_, static_cast<char*>(array) + first * kElement, tile_,
                   arrived);
    });
    loaded_.advance(stages_);
  }

  __device__ void store(const char* from, bool clears, const Arrays& arrays, std::int64_t first) {
    each(arrays, [&](void* array, int place) {
      if (place == 1 && !clears) return;  // the gradient
      Copies::store(static_cast<char*>(array) + first * kElement, from + place * tile_, tile_);
    });
    Copies::commit();
  }

  __device__ void update(char* stage, bool clears, const typename L::Prepared& k) const {
    using Vectors = typename L::Vectors;
    for (int at = static_cast<int>(threadIdx.x) * kAccessBytes; at < tile_;
         at += kThreads * kAccessBytes) {
      const auto vector = [&](auto& like, int place) -> auto& {
        return *reinterpret_cast<std::remove_reference_t<decltype(like)>*>(stage + place * tile_ +
                                                                           at);
      };
      Vectors vectors;
      vectors.p = vector(vectors.p, 0);
      vectors.g = vector(vectors.g, 1);
      int place = 2;
      for (int i = 0; i < L::kStates; ++i) {
        if (L::uses(i)) vectors.s[i] = vector(vectors.s[i], place++);
      }
      L::update(vectors, k);
      vector(vectors.p, 0) = vectors.p;
      if (clears) vector(vectors.g, 1) = {};
      place = 2;
      for (int i = 0; i < L::kStates; ++i) {
        if (L::uses(i)) vector(vectors.s[i], place++) = vectors.s[i];
      }
    }
  }

  int stages_, tile_;
  Arrived* arrived_;  // of each stage
  char* memory_;
  Place loaded_, updated_;  // the next tile's
};

template <class L, class Copies>
__global__ void __launch_bounds__(kThreads, kBlocks)
    update_in_bulk(const __grid_constant__ Launch launch) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  __shared__ typename L::Prepared shared;
  __shared__ typename Copies::Arrived arrived[kMostStages];
  Pipe<L, Copies> pipe(launch.pipeline, arrived);
  run_share<L>(launch, shared, pipe);
  pipe.finish();
#endif
}

}  // namespace flatstep::cuda
