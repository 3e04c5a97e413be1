#pragma once
// Runs the tessera binary as a user does, alone and under mpirun, on a little text of the test's own.

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "data/files.h"

namespace tessera::testing {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

struct Result {
  int code = -1;       // exit status; 128 + signal
  std::string output;  // stdout and stderr together
  bool says(const std::string& text) const { return output.find(text) != std::string::npos; }
  int count(const std::string& text) const {
    int n = 0;
    for (std::size_t at = output.find(text); at != std::string::npos; at = output.find(text, at + 1)) ++n;
    return n;
  }
};

inline std::ostream& operator<<(std::ostream& out, const Result& r) { return out << "exit code " << r.code << ", output:\n" << r.output; }

/// A folder of its own with prepared text in data/ and a tiny configuration in tiny.yaml; removed at the end.
class RunTest : public ::testing::Test {
 protected:
  void SetUp() override {
    for (const char* variable : {"OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "OMPI_MCA_rmaps_base_oversubscribe"})
      setenv(variable, "1", 1);
    setenv("OMP_NUM_THREADS", "1", 1);  // tiny models: threads would only wait for each other
    folder = fs::temp_directory_path() / ("tessera_run_" + std::to_string(getpid()));
    fs::remove_all(folder);
    fs::create_directories(folder);
    write("text.txt", text());
    write("tiny.yaml", kConfig);
    const Result r = tessera("prepare --input text.txt --tokenizer bytes --output data --validation-fraction 0.1");
    ASSERT_EQ(r.code, 0) << r;
  }
  void TearDown() override { fs::remove_all(folder); }

  /// Sentences from a small grammar: enough to learn something in a few steps.
  static std::string text() {
    const char* words[] = {"the", "model", "reads", "a", "key", "and", "query", "of", "its", "context", "then", "writes", "tokens"};
    std::string out;
    std::uint64_t state = 12345;
    for (int sentence = 0; sentence < 1500; ++sentence) {
      for (int w = 0; w < 9; ++w) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        out += std::string(w ? " " : "") + words[(state >> 33) % 13];
      }
      out += ".\n";
    }
    return out;
  }

  void write(const std::string& name, const std::string& bytes) const { std::ofstream(folder / name, std::ios::binary) << bytes; }

  /// A shell command in the test's folder.
  Result shell(const std::string& command) const {
    Result r;
    FILE* pipe = popen(("cd " + folder.string() + " && { " + command + "; } 2>&1").c_str(), "r");
    char buffer[4096];
    for (std::size_t n; (n = fread(buffer, 1, sizeof buffer, pipe)) > 0;) r.output.append(buffer, n);
    const int status = pclose(pipe);
    r.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    return r;
  }
  Result tessera(const std::string& arguments, const std::string& environment = "") const {
    return shell(environment + " " TESSERA_BINARY " " + arguments);
  }
  Result tessera_on(int ranks, const std::string& arguments, const std::string& environment = "") const {
    return shell(environment + " mpirun --bind-to none -n " + std::to_string(ranks) + " " TESSERA_BINARY " " + arguments);
  }

  /// The rows of runs/NAME/metrics.jsonl; each step once and in order, or the test fails.
  std::vector<Json> metrics(const std::string& name) const {
    std::vector<Json> rows;
    std::ifstream file(folder / "runs" / name / "metrics.jsonl");
    for (std::string line; std::getline(file, line);) rows.push_back(Json::parse(line));
    for (std::size_t i = 0; i < rows.size(); ++i) EXPECT_EQ(rows[i]["step"], i + 1) << name;
    return rows;
  }
  /// All that a step computed, and nothing that it measured of time.
  static Json computed(const Json& row) {
    Json some;
    for (const char* key : {"step", "tokens", "loss", "lr", "grad_norm", "edge_sparsity", "tile_skip_rate", "empty_row_share", "skipped",
                            "skipped_total", "validation_loss", "bits_per_byte", "validation_accuracy", "accuracy_by_distance", "thresholds"})
      if (row.contains(key)) some[key] = row[key];
    return some;
  }
  /// Every step of both runs, bit for bit: JSON numbers are written with the digits that make the double.
  void expect_same_bits(const std::string& a, const std::string& b, std::size_t steps) const {
    const auto rows_a = metrics(a), rows_b = metrics(b);
    ASSERT_EQ(rows_a.size(), steps);
    ASSERT_EQ(rows_b.size(), steps);
    for (std::size_t i = 0; i < steps; ++i) ASSERT_EQ(computed(rows_a[i]).dump(), computed(rows_b[i]).dump());
  }
  std::vector<std::string> names(const std::string& directory) const {
    std::vector<std::string> found;
    for (const auto& entry : fs::directory_iterator(folder / directory)) found.push_back(entry.path().filename());
    std::sort(found.begin(), found.end());
    return found;
  }

  fs::path folder;

 private:
  static constexpr const char* kConfig = R"(
run: {dir: runs/default, threads: 1}
model: {layers: 2, heads: 2, width: 32, context: 32}
attention: {tile: {query: 16, key: 16}, threshold: {target_edge_sparsity: 0.8}}
data: {path: data}
train: {steps: 24, tokens_per_step: 256, micro_batch: 1}
optimizer: {lr: 0.003, warmup: 4}
eval: {every: 8, batches: 3}
checkpoint: {every: 5, keep: 2}
log: {heads_every: 4}
)";
};

}  // namespace tessera::testing
