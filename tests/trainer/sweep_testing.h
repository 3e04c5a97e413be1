#pragma once
// A folder of its own with a base configuration and sweep files.

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "trainer/sweep/sweep_variants.h"

namespace tessera::testing {

class SweepFiles : public ::testing::Test {
 protected:
  std::filesystem::path folder = std::filesystem::temp_directory_path() / ("tessera_sweep_" + std::to_string(::getpid()));

  void SetUp() override {
    std::filesystem::create_directories(folder / "sweeps");
    write("base.yaml",
          "model: {layers: 2, heads: 2, width: 32, context: 64, vocabulary: 300}\nattention: {tile: {query: 16, key: 16}}\n"
          "train: {steps: 20, tokens_per_step: 512, micro_batch: 2}\n");
  }
  void TearDown() override { std::filesystem::remove_all(folder); }

  void write(const std::string& name, const std::string& text) const { std::ofstream(folder / name, std::ios::binary) << text; }

  /// The sweep of a file sweeps/s.yaml with base ../base.yaml and this.
  Sweep sweep(const std::string& yaml, const std::vector<std::string>& sets = {}) const {
    return expand_sweep(parse_sweep_file("base: ../base.yaml\n" + yaml, folder / "sweeps/s.yaml", sets));
  }
  std::vector<std::string> names(const std::string& yaml, const std::vector<std::string>& sets = {}) const {
    std::vector<std::string> out;
    for (const SweepRun& run : sweep(yaml, sets).runs) out.push_back(run.name);
    return out;
  }
  /// The message of its ConfigError, without the folder; "" when there is none.
  std::string error(const std::string& yaml, const std::vector<std::string>& sets = {}) const {
    try {
      sweep(yaml, sets);
    } catch (const ConfigError& e) {
      std::string text = e.what();
      const std::string prefix = folder.string() + "/sweeps/";
      for (std::size_t at; (at = text.find(prefix)) != std::string::npos;) text.erase(at, prefix.size());
      return text;
    }
    return "";
  }
};

}  // namespace tessera::testing
