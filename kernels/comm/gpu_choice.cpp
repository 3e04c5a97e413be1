#include "kernels/comm/gpu_choice.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <set>
#include <stdexcept>

namespace tessera {
namespace {

[[noreturn]] void fail_without_own(const std::vector<VisibleGpus>& ranks, std::size_t rank) {
  const VisibleGpus& mine = ranks[rank];
  std::size_t on_host = 0;
  std::set<std::string> gpus;
  for (const VisibleGpus& r : ranks) {
    if (r.machine != mine.machine) continue;
    ++on_host;
    gpus.insert(r.addresses.begin(), r.addresses.end());
  }
  const auto plural = [](std::size_t n, const char* word) { return fmt::format("{} {}{}", n, word, n == 1 ? "" : "s"); };
  if (on_host > gpus.size()) {
    throw std::invalid_argument(
        fmt::format("host {} has {} and {}: each rank needs a GPU of its own. Start at most {} on it, or set parallel.share_gpu: true, with which "
                    "ranks take turns on a GPU (for tests: slow)",
                    mine.host, plural(on_host, "rank"), plural(gpus.size(), "GPU"), plural(gpus.size(), "rank")));
  }
  throw std::invalid_argument(
      fmt::format("rank {} on host {} sees {}, all taken by other ranks of the host ({} in all, {} on the host): let CUDA_VISIBLE_DEVICES show each "
                  "rank one of its own, or all ranks all of them; start fewer ranks on it; or set parallel.share_gpu: true (for tests: slow)",
                  rank, mine.host, plural(mine.addresses.size(), "GPU"), plural(gpus.size(), "GPU"), plural(on_host, "rank")));
}

}  // namespace

std::vector<int> choose_gpus(const std::vector<VisibleGpus>& ranks, bool share) {
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    const std::string problem = !ranks[r].problem.empty() ? ranks[r].problem : ranks[r].addresses.empty() ? "no GPU is visible" : "";
    if (!problem.empty()) throw std::invalid_argument(fmt::format("rank {} on host {} cannot use a GPU: {}", r, ranks[r].host, problem));
  }
  std::map<std::string, std::map<std::string, int>> users;  // by machine and address
  std::vector<int> chosen;
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    auto& used = users[ranks[r].machine];
    const auto& own = ranks[r].addresses;
    const auto least = std::min_element(own.begin(), own.end(), [&](const auto& a, const auto& b) { return used[a] < used[b]; });
    if (used[*least]++ > 0 && !share) fail_without_own(ranks, r);
    chosen.push_back(static_cast<int>(least - own.begin()));
  }
  return chosen;
}

}  // namespace tessera
