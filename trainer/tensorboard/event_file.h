#pragma once
// What TensorBoard shows of a run: an event file beside metrics.jsonl, written as the run goes. See record.h and event.proto for the format.
//
//   train/loss, validation/loss, ...   every number of a row of metrics.jsonl, as a scalar (f32) of its step
//   edge_sparsity/layer_NN,            scalars, in rows with values by layer and head
//   tile_skip_rate/layer_NN
//   active_share/layer_NN,             histograms over the layer's heads, in the same rows; those that the configuration has
//   thresholds/..., scales/..., self_biases/..., sink_biases/... (over heads and sinks)
//   occupancy/active_share             the same as an image: a row a layer, a column a head (occupancy.h)

#include <cstdint>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "data/files.h"
#include "trainer/metrics.h"

namespace tessera {

/// The events of one start of a run. A run that was resumed has several files, which TensorBoard reads as one.
class EventFile {
 public:
  /// Makes DIRECTORY/events.out.tfevents.SECONDS.NNNN, later in TensorBoard's order, that of names, than those there, and writes that a session
  /// starts with `first_step`: TensorBoard drops what earlier files have from that step on. Throws std::runtime_error (disk full).
  EventFile(const std::string& directory, std::int64_t first_step);

  struct Heads {
    std::vector<AttentionShares> layers;
    nlohmann::ordered_json values;  // {"active_share": [layers][heads], "thresholds": ..., ...}
  };
  /// One write of what `row`, as metrics.jsonl has it, and `heads` (nullptr: none) say of the step row["step"]. Throws std::runtime_error (disk
  /// full).
  void append(const nlohmann::ordered_json& row, const Heads* heads);
  void sync() { file_.sync(); }

  const std::string& path() const { return file_.path(); }

 private:
  AppendedFile file_;
  std::set<std::string> described_;  // tags whose description has been written
};

/// Whether a file's name is that of an event file.
bool is_event_file(const std::string& name);

}  // namespace tessera
