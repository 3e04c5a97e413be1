#include "trainer/sweep/sweep_room.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <sstream>

#include "kernels/ops.h"
#include "trainer/host_threads.h"
#include "trainer/progress.h"

namespace tessera {

namespace {

/// Lines that a command prints; none when it is not there.
std::vector<std::string> lines_of(const char* command) {
  std::vector<std::string> lines;
  std::string text;
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen(command, "r"), pclose);
  char buffer[4096];
  for (std::size_t n; pipe && (n = fread(buffer, 1, sizeof buffer, pipe.get())) > 0;) text.append(buffer, n);
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);)
    if (!line.empty()) lines.push_back(line);
  return lines;
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> out;
  std::istringstream in(text);
  for (std::string item; std::getline(in, item, ',');)
    if (!item.empty()) out.push_back(item);
  return out;
}

int threads_of(const Config& config) {
  if (config.run.threads > 0) return config.run.threads;
  const char* omp = std::getenv("OMP_NUM_THREADS");
  return omp ? std::max(0, std::atoi(omp)) : 0;
}

int gpus_of(const Config& config, const SweepFile::Resources& resources) {
  if (config.device != "cuda") return 0;
  if (resources.gpus > 0) return resources.gpus;
  return config.parallel.share_gpu ? 1 : resources.ranks;
}

}  // namespace

HostRoom this_host() {
  HostRoom host;
  const Placement place = this_placement();
  host.cores = fair_threads({place}, 0);
  host.memory = make_cpu_ops(1)->memory_available();
  // "0, 81559": index, MiB
  for (const std::string& line : lines_of("nvidia-smi --query-gpu=index,memory.total --format=csv,noheader,nounits 2>/dev/null")) {
    std::size_t index = 0, mib = 0;
    if (std::sscanf(line.c_str(), "%zu , %zu", &index, &mib) != 2) continue;
    host.gpus.push_back(std::to_string(index));
    host.gpu_memory = host.gpu_memory == 0 ? mib << 20 : std::min(host.gpu_memory, mib << 20);
  }
  if (const char* visible = std::getenv("CUDA_VISIBLE_DEVICES")) host.gpus = split(visible);
  return host;
}

RunDemand demand_of(const Config& config, const SweepFile::Resources& resources, std::size_t bytes_per_rank, const HostRoom& host) {
  RunDemand demand;
  demand.gpus = gpus_of(config, resources);
  if (config.device == "cuda") return demand;
  demand.memory = bytes_per_rank * static_cast<std::size_t>(resources.ranks);
  const int threads = threads_of(config);
  demand.cores = threads > 0 ? resources.ranks * threads : std::max(1, host.cores / std::max(1, resources.at_once));
  return demand;
}

std::string room_problem(const Config& config, const SweepFile::Resources& resources, std::size_t bytes_per_rank, const HostRoom& host) {
  const int gpus = gpus_of(config, resources);
  const auto bytes = [](std::size_t n) { return format_bytes(static_cast<double>(n)); };
  const std::size_t here = gpus > 0 ? host.gpu_memory : host.memory;
  // Of a host without GPUs nothing is known of those that the sweep is for.
  if (gpus > 0 && host.gpus.empty()) return "";
  if (gpus > static_cast<int>(host.gpus.size()))
    return fmt::format("a run takes {} GPU{}, and {} can be seen here", gpus, gpus == 1 ? "" : "s", host.gpus.size());
  const std::size_t sharing = static_cast<std::size_t>(gpus > 0 ? (resources.ranks + gpus - 1) / gpus : resources.ranks);
  if (here == 0 || bytes_per_rank * sharing <= here) return "";
  return fmt::format("needs {} of memory{}, and {} has {}. Use a smaller train.micro_batch, model.context or model{}",
                     bytes(bytes_per_rank * sharing), sharing > 1 ? fmt::format(" for {} ranks", sharing) : "", gpus > 0 ? "a GPU" : "this host",
                     bytes(here), gpus > 0 ? ", train.recompute, or more ranks" : "");
}

std::optional<std::vector<std::size_t>> RoomLedger::take(const RunDemand& demand) {
  const bool alone = runs_ == 0;
  if (!alone && at_once_ > 0 && runs_ >= at_once_) return {};
  if (!alone && (cores_ + demand.cores > host_.cores || memory_ + demand.memory > host_.memory)) return {};
  std::vector<std::size_t> gpus;
  for (std::size_t i = 0; i < taken_.size() && static_cast<int>(gpus.size()) < demand.gpus; ++i)
    if (!taken_[i]) gpus.push_back(i);
  if (!alone && static_cast<int>(gpus.size()) < demand.gpus) return {};
  for (const std::size_t i : gpus) taken_[i] = true;
  ++runs_;
  cores_ += demand.cores;
  memory_ += demand.memory;
  return gpus;
}

void RoomLedger::give_back(const RunDemand& demand, const std::vector<std::size_t>& gpus) {
  for (const std::size_t i : gpus) taken_[i] = false;
  --runs_;
  cores_ -= demand.cores;
  memory_ -= demand.memory;
}

std::string RoomLedger::names(const std::vector<std::size_t>& gpus) const {
  std::vector<std::string> names;
  for (const std::size_t i : gpus) names.push_back(host_.gpus[i]);
  return fmt::format("{}", fmt::join(names, ","));
}

}  // namespace tessera
