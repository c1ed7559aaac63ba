// Updates and norms from several host threads at once, each on several threads of the pool, for
// tools/race.sh to run under ThreadSanitizer. The results must be those of one thread. The kernels
// are small ones of its own: what is looked at is who runs which share of them.
#include <cstdio>
#include <thread>
#include <vector>

#include "cpu/threads.h"
#include "cpu/update.h"

namespace flatstep {
namespace {

constexpr int kHosts = 4, kRounds = 40;
constexpr std::int64_t kSize = (4 << 15) + 77;  // enough for five threads

void descend(const Work& work, std::int64_t begin, std::int64_t end) {
  auto* const param = static_cast<float*>(work.arrays.param);
  const auto* const grad = static_cast<const float*>(work.arrays.grad);
  for (std::int64_t i = begin; i < end; ++i) param[i] -= 0.01f * grad[i];
}

void sums(const void* grad, Stored, std::int64_t count, std::int64_t begin, std::int64_t end, bool,
          double* norms) {
  const auto* const values = static_cast<const float*>(grad);
  for (std::int64_t tile = begin; tile < end; ++tile, ++norms) {
    *norms = 0;
    for (std::int64_t i = tile * kNormTile; i < (tile + 1) * kNormTile && i < count; ++i) {
      *norms += values[i];
    }
  }
}

const KernelTables kTables = {{}, {}, &sums, {}};
const Isa kOwn = {"driver", &always_supported, &kTables};

struct Model {
  std::vector<float> param = std::vector<float>(kSize, 1);
  std::vector<float> grad = std::vector<float>(kSize);
  double norm = 0;

  void train(int threads) {
    constexpr std::int64_t kHalf = kSize / 2;
    const Types types = {Stored::kFloat32, Stored::kFloat32, Stored::kFloat32};
    for (int round = 1; round <= kRounds; ++round) {
      for (std::int64_t i = 0; i < kSize; ++i) grad[i] = static_cast<float>(i % 13 - round);
      const Arrays first = {param.data(), grad.data(), {}};
      const Arrays second = {param.data() + kHalf, grad.data() + kHalf, {}};
      run_update(
          {{{first, nullptr, types, 0, nullptr, nullptr, 0, {}}, kHalf, &descend, true},
           {{second, nullptr, types, 0, nullptr, nullptr, 0, {}}, kSize - kHalf, &descend, false}},
          threads);
      norm += run_norms({{param.data(), Stored::kFloat32, kSize}}, false, threads)[0];
    }
  }
};

}  // namespace

const Isa* const kIsas[] = {&kOwn, nullptr};

}  // namespace flatstep

int main() {
  using namespace flatstep;
  use_torch_threads(nullptr);
  Model alone;
  alone.train(1);
  std::vector<Model> models(kHosts);
  std::vector<std::thread> hosts;
  for (int i = 0; i < kHosts; ++i) hosts.emplace_back([&models, i] { models[i].train(2 + i); });
  for (std::thread& host : hosts) host.join();
  for (const Model& model : models) {
    if (model.param != alone.param || model.norm != alone.norm) {
      std::puts("the results differ from those of one thread");
      return 1;
    }
  }
  std::printf("%d threads stepped side by side, with the bits of one\n", kHosts);
}
