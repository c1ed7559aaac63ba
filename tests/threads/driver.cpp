// Updates and norms from several host threads at once, each on several threads of the pool, for
// tools/race.sh to run under ThreadSanitizer. The results must be those of one thread.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/threads.h"
#include "cpu/update.h"
#include "registry.h"

namespace {

using namespace flatstep;

constexpr int kHosts = 4, kRounds = 60;
constexpr std::size_t kSize = (4 << 15) + 77;  // enough for five threads

struct Model {
  std::vector<float> param, grad, first, second;
  double norm = 0;

  Model() : param(kSize), grad(kSize), first(kSize), second(kSize) {
    for (std::size_t i = 0; i < kSize; ++i) {
      param[i] = static_cast<float>(i % 101) / 7;
      grad[i] = static_cast<float>(i % 13) - 6;
    }
  }

  void train(int threads) {
    const RuleInfo& rule = find_rule("adam");
    const std::vector<double> hyper = {1e-3, 0.9, 0.999, 1e-8, 0.01};
    for (int round = 1; round <= kRounds; ++round) {
      const Scalars scalars = rule.prepare(hyper.data(), round, 1);
      const Arrays arrays = {param.data(), grad.data(), {first.data(), second.data()}};
      const Work work = {arrays, scalars.data(), layouts()[0], 0, nullptr, nullptr, 0, {}};
      const auto half = static_cast<std::int64_t>(kSize / 2);
      Work rest = work;
      rest.arrays = {
          param.data() + half, grad.data() + half, {first.data() + half, second.data() + half}};
      const Kernel kernel = find_kernel(rule, 0, 0);
      run_update({{work, half, kernel, false},
                  {rest, static_cast<std::int64_t>(kSize) - half, kernel, false}},
                 threads);
      const auto count = static_cast<std::int64_t>(kSize);
      norm += run_norms({{param.data(), Stored::kFloat32, count}}, round % 2, threads)[0];
    }
  }

  bool operator==(const Model& other) const {
    return std::memcmp(param.data(), other.param.data(), kSize * sizeof(float)) == 0 &&
           std::memcmp(second.data(), other.second.data(), kSize * sizeof(float)) == 0 &&
           norm == other.norm;
  }
};

}  // namespace

int main() {
  use_torch_threads(nullptr);
  Model alone;
  alone.train(1);
  std::vector<Model> models(kHosts);
  std::vector<std::thread> hosts;
  for (int i = 0; i < kHosts; ++i) hosts.emplace_back([&, i] { models[i].train(2 + i); });
  for (std::thread& host : hosts) host.join();
  for (const Model& model : models) {
    if (!(model == alone)) {
      std::puts("the results differ from those of one thread");
      return 1;
    }
  }
  std::printf("%d threads stepped side by side, with the bits of one\n", kHosts);
}
