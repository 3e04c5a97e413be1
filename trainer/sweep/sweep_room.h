#pragma once
// How many runs of a sweep this host has room for at a time: CPU cores, GPUs, memory.

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "trainer/sweep/sweep_file.h"

namespace tessera {

/// What a run takes while it runs.
struct RunDemand {
  int cores = 0, gpus = 0;
  std::size_t memory = 0;  // bytes of the host, with device cpu
};

/// What the host has.
struct HostRoom {
  int cores = 1;
  std::vector<std::string> gpus;  // as CUDA_VISIBLE_DEVICES names them
  std::size_t gpu_memory = 0;     // bytes of the smallest of them; 0: not known
  std::size_t memory = 0;         // bytes that are free
};

/// Cores by affinity and quota; GPUs by CUDA_VISIBLE_DEVICES where it is set, else by nvidia-smi, which also says their memory. A host without
/// nvidia-smi has no GPU.
HostRoom this_host();

/// Of a run on `ranks` of which each plans `bytes_per_rank`. A processor's run takes ranks x run.threads cores; where run.threads is 0, an even share
/// of the host between resources.at_once runs (all of it when that is not given).
RunDemand demand_of(const Config& config, const SweepFile::Resources& resources, std::size_t bytes_per_rank, const HostRoom& host);
/// Why the host could not hold such a run even alone; "" when it can, or when that is not known.
std::string room_problem(const Config& config, const SweepFile::Resources& resources, std::size_t bytes_per_rank, const HostRoom& host);

/// What of the host's room is taken.
class RoomLedger {
 public:
  RoomLedger(HostRoom host, int at_once) : host_(std::move(host)), at_once_(at_once) { taken_.resize(host_.gpus.size()); }

  /// Takes room for a run and returns its GPUs (indices); nothing when there is none now. Alone, a run is always let in.
  std::optional<std::vector<std::size_t>> take(const RunDemand& demand);
  void give_back(const RunDemand& demand, const std::vector<std::size_t>& gpus);
  /// "0,3": the value of CUDA_VISIBLE_DEVICES.
  std::string names(const std::vector<std::size_t>& gpus) const;

 private:
  HostRoom host_;
  int at_once_, runs_ = 0, cores_ = 0;
  std::size_t memory_ = 0;
  std::vector<bool> taken_;
};

}  // namespace tessera
