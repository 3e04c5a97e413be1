#pragma once
// What an interrupted `tessera prepare` needs to go on: one small file, replaced as a whole every few seconds.

#include <chrono>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "data/prepare_pipeline.h"

namespace tessera {

struct PrepareOptions;

/// What the result depends on: a run may only go on with the same. Input files are known by name, size and time of change.
nlohmann::ordered_json settings_of(const Tokenizer& tokenizer, const PrepareOptions& options, const std::vector<std::string>& files);

class PrepareJournal {
 public:
  PrepareJournal(std::string file, nlohmann::ordered_json settings, double seconds);
  ~PrepareJournal();

  /// The state that was recorded. Throws std::invalid_argument when it is of other settings, naming what differs;
  /// std::runtime_error when it is damaged.
  nlohmann::ordered_json load() const;
  /// Whether it is time to record: every so many seconds, and soon after a shard is finished.
  bool due(bool shard_finished) const;
  void record(nlohmann::ordered_json state);

 private:
  using Clock = std::chrono::steady_clock;
  const std::string file_;
  const std::unique_ptr<nlohmann::ordered_json> settings_;
  const double seconds_;
  double cost_ = 0;  // seconds that recording took
  Clock::time_point last_ = Clock::now();
};

nlohmann::ordered_json to_json(const InputPosition& position);
InputPosition position_from(const nlohmann::ordered_json& json);

}  // namespace tessera
