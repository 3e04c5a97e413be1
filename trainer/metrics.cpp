#include "trainer/metrics.h"

#include <fmt/core.h>

#include <filesystem>
#include <fstream>
#include <stdexcept>

namespace tessera {
using Json = nlohmann::ordered_json;

std::int64_t causal_tiles(std::int64_t tokens, int tile_query, int tile_key) {
  std::int64_t tiles = 0;
  for (std::int64_t first = 0; first < tokens; first += tile_query) {
    const std::int64_t last_query = std::min(first + tile_query, tokens) - 1;
    tiles += last_query / tile_key + 1;
  }
  return tiles;
}

AttentionCounts::AttentionCounts(const ModelConfig& config, std::vector<std::uint64_t> counters, std::int64_t sequences, std::int64_t tokens)
    : layers_(config.layers), heads_(config.heads), counters_(std::move(counters)) {
  if (counters_.size() != static_cast<std::size_t>(layers_) * heads_ * kAttentionCounters)
    throw std::logic_error("attention counters of another model");
  const double n = static_cast<double>(sequences), t = static_cast<double>(tokens);
  causal_edges_ = n * t * (t + 1) / 2;
  causal_tiles_ = n * static_cast<double>(causal_tiles(tokens, config.attention.tile_query, config.attention.tile_key));
  queries_ = n * t;
}

std::uint64_t AttentionCounts::at(int layer, int head, int counter) const {
  return counters_[(static_cast<std::size_t>(layer) * heads_ + head) * kAttentionCounters + counter];
}

AttentionShares AttentionCounts::shares(int first_row, int rows) const {
  double edges = 0, tiles = 0, empty = 0;
  for (int r = first_row; r < first_row + rows; ++r) {
    edges += static_cast<double>(at(0, r, kActiveEdges));
    tiles += static_cast<double>(at(0, r, kActiveTiles));
    empty += static_cast<double>(at(0, r, kEmptyRows));
  }
  return {1 - edges / (rows * causal_edges_), 1 - tiles / (rows * causal_tiles_), empty / (rows * queries_)};
}

std::vector<std::vector<double>> AttentionCounts::active_share() const {
  std::vector<std::vector<double>> share(static_cast<std::size_t>(layers_));
  for (int l = 0; l < layers_; ++l)
    for (int h = 0; h < heads_; ++h) share[l].push_back(static_cast<double>(at(l, h, kActiveEdges)) / causal_edges_);
  return share;
}

void MetricsFile::cut(const std::string& path, std::int64_t step) {
  if (!std::filesystem::exists(path)) return;
  const std::string text = read_file(path);
  std::string kept;
  for (std::size_t from = 0, end; (end = text.find('\n', from)) != std::string::npos; from = end + 1) {
    const std::string line = text.substr(from, end - from + 1);
    const Json row = Json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (row.is_object() && row.contains("step") && row["step"].is_number_integer() && row["step"].get<std::int64_t>() <= step) kept += line;
  }
  if (kept != text) write_file(path, kept);
}

Json MetricsFile::last(const std::string& path) {
  std::ifstream file(path);
  Json last;
  for (std::string line; std::getline(file, line);) {
    Json row = Json::parse(line, nullptr, false);
    if (row.is_object()) last = std::move(row);
  }
  return last;
}

std::optional<double> MetricsFile::number(const Json& row, const char* key) {
  const auto found = row.find(key);
  if (found == row.end() || !found->is_number()) return {};
  return found->get<double>();
}

std::vector<Json> MetricsFile::rows(const std::string& path, std::vector<std::string>* notices) {
  std::vector<Json> rows;
  std::ifstream file(path);
  std::int64_t number = 0, step = 0;
  std::vector<std::int64_t> bad;
  std::string problem;  // of the first bad line
  for (std::string line; std::getline(file, line);) {
    ++number;
    Json row = Json::parse(line, nullptr, false);
    std::string found;
    if (!row.is_object()) {
      if (file.eof()) break;
      found = "not a JSON object";
    } else if (!row.contains("step") || !row["step"].is_number_integer()) {
      found = "no \"step\" that is a whole number";
    } else if (row["step"].get<std::int64_t>() <= step) {
      found = fmt::format("step {} after step {}", row["step"].get<std::int64_t>(), step);
    }
    if (found.empty()) {
      step = row["step"].get<std::int64_t>();
      rows.push_back(std::move(row));
      continue;
    }
    if (bad.empty()) problem = found;
    bad.push_back(number);
  }
  if (notices && bad.size() == 1) notices->push_back(fmt::format("{}:{}: {}; the line is left out", path, bad[0], problem));
  if (notices && bad.size() > 1)
    notices->push_back(
        fmt::format("{}:{}: {}; the line is left out, and {} more, the last of them line {}", path, bad[0], problem, bad.size() - 1, bad.back()));
  return rows;
}

}  // namespace tessera
