#pragma once
// What a run measures: the attention's counters as shares, and metrics.jsonl.

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "data/files.h"
#include "model/config.h"

namespace tessera {

/// Shares over some layers and heads. Edge sparsity = 1 - active / causal edges. Tile skip rate = 1 - active / causal tiles, where causal tiles
/// are those that hold an edge (i, j) with j <= i.
struct AttentionShares {
  double edge_sparsity = 0, tile_skip_rate = 0;
  double empty_rows = 0;  // queries without an active edge / queries
};

/// Counters of whole steps or evaluations, [layers, heads, kAttentionCounters], of `sequences` sequences of `tokens` tokens.
class AttentionCounts {
 public:
  AttentionCounts(const ModelConfig& config, std::vector<std::uint64_t> counters, std::int64_t sequences, std::int64_t tokens);

  AttentionShares all() const { return shares(0, layers_ * heads_); }
  AttentionShares layer(int l) const { return shares(l * heads_, heads_); }
  /// Active / causal edges, [layers][heads].
  std::vector<std::vector<double>> active_share() const;

  double causal_edges() const { return causal_edges_; }  // a layer and head
  std::uint64_t at(int layer, int head, int counter) const;

 private:
  AttentionShares shares(int first_row, int rows) const;
  int layers_, heads_;
  std::vector<std::uint64_t> counters_;
  double causal_edges_, causal_tiles_, queries_;
};

/// Tiles of a sequence of `tokens` that hold an edge (i, j) with j <= i.
std::int64_t causal_tiles(std::int64_t tokens, int tile_query, int tile_key);

/// metrics.jsonl: a JSON object a line. A number that is not finite is written as null.
class MetricsFile {
 public:
  /// Opens for appending. Throws std::runtime_error.
  explicit MetricsFile(const std::string& path) : file_(path) {}

  /// Throws std::runtime_error (disk full).
  void append(const nlohmann::ordered_json& row) { file_.append(row.dump() + "\n"); }
  void sync() { file_.sync(); }

  /// Drops, atomically, every row after `step`, and lines that are no rows (the last one of a killed run).
  static void cut(const std::string& path, std::int64_t step);
  /// The last whole row; null when there is none.
  static nlohmann::ordered_json last(const std::string& path);
  /// row[key] where it is a number.
  static std::optional<double> number(const nlohmann::ordered_json& row, const char* key);
  /// The rows whose steps go up from line to line; none when there is no such file. `notices`, where given, gets one that names file, first line and
  /// what is wrong with it when others are left out; a last line without its end is none, as a run that is at work, or was killed, leaves it.
  static std::vector<nlohmann::ordered_json> rows(const std::string& path, std::vector<std::string>* notices = nullptr);

 private:
  AppendedFile file_;
};

}  // namespace tessera
