// tessera inspect: what a shard, a dataset, a checkpoint or a run is; with --verify, whether every byte of it is as it was written.

#include <fmt/core.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <iostream>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "data/dataset.h"
#include "data/hdf5_file.h"
#include "trainer/checkpoint.h"
#include "trainer/commands/commands.h"
#include "trainer/config.h"
#include "trainer/metrics.h"
#include "trainer/progress.h"
#include "trainer/run_folder.h"
#include "trainer/schema.h"

namespace tessera {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

std::uint64_t folder_bytes(const std::string& directory) {
  std::uint64_t bytes = 0;
  for (const auto& entry : fs::recursive_directory_iterator(directory))
    if (entry.is_regular_file()) bytes += entry.file_size();
  return bytes;
}

/// The part of a configuration that says what a model is.
Json highlights(const Config& config) {
  const Json all = Json::parse(to_json(config));
  Json some = Json::object();
  for (const char* section : {"model", "attention"})
    if (all.contains(section)) some[section] = all[section];
  return some;
}

Json describe_checkpoint(const std::string& directory) {
  const CheckpointInfo info = read_checkpoint_info(directory);
  const Config config = parse_stored_config(info.config, directory + "/model.h5");
  Json dataset = {{"path", info.dataset.path},
                  {"tokenizer", info.dataset.tokenizer_name},
                  {"tokenizer_hash", info.dataset.tokenizer_hash},
                  {"vocabulary", info.dataset.vocabulary},
                  {"train_tokens", info.dataset.train_tokens}};
  if (config.data.synthetic) dataset = {{"synthetic", write_synthetic(config.data.synthetic)}, {"vocabulary", info.dataset.vocabulary}};
  for (const Provenance::Part& part : info.dataset.mix)
    dataset["mix"].push_back({{"path", part.path}, {"share", part.share}, {"train_tokens", part.train_tokens}});
  Json described{{"kind", "checkpoint"},           {"path", directory},
                 {"step", info.position.step},     {"updates", info.position.updates},
                 {"tokens", info.position.tokens}, {"skipped_steps", info.position.skipped},
                 {"parameters", info.parameters},  {"bytes", folder_bytes(directory)},
                 {"optimizer_files", info.ranks},  {"resumable", info.ranks > 0},  // without optimizer state it is weights alone
                 {"created", info.created},        {"dataset", dataset}};
  if (!info.init.path.empty()) described["init"] = {{"checkpoint", info.init.path}, {"step", info.init.step}, {"sha256", info.init.sha256}};
  described["config"] = highlights(config);
  return described;
}

Json describe_run(const std::string& directory) {
  const RunFolder folder{directory};
  Json checkpoints = Json::array(), incomplete = Json::array();
  for (const CheckpointEntry& e : list_checkpoints(folder.checkpoints())) (e.complete ? checkpoints : incomplete).push_back(e.step);
  Json run{{"kind", "run"},
           {"path", directory},
           {"bytes", folder_bytes(directory)},
           {"checkpoints", checkpoints},
           {"incomplete_checkpoints", incomplete},
           {"last_metrics", MetricsFile::last(folder.metrics())}};
  if (fs::exists(folder.config())) {
    const Config config = load_stored_config(folder.config());
    run["steps"] = config.train.steps;
    run["data"] = config.data.synthetic ? write_synthetic(config.data.synthetic) : Json(config.data.path);
    for (const MixEntry& entry : config.data.mix) {
      if (!run["data"].is_array()) run["data"] = Json::array();
      run["data"].push_back({{"path", entry.path}, {"weight", entry.weight}});
    }
    run["config"] = highlights(config);
  }
  return run;
}

/// Nested values as indented "key  value" lines.
void print(const Json& value, int depth = 0) {
  for (const auto& [key, v] : value.items()) {
    const std::string name = std::string(2 * depth, ' ') + key;
    if (v.is_object() && !v.empty()) {
      fmt::print("{}\n", name);
      print(v, depth + 1);
    } else if (key == "bytes" && v.is_number()) {
      fmt::print("{:<30}{} ({})\n", name, v.dump(), format_bytes(v.get<double>()));
    } else {
      fmt::print("{:<30}{}\n", name, v.is_string() ? v.get<std::string>() : v.dump());
    }
  }
}

struct Subject {
  std::function<std::string(bool json)> describe;
  std::function<std::vector<std::string>()> verify;
};

/// What is damaged may hold bytes that are no UTF-8: they are replaced.
std::string to_text(const Json& value) { return value.dump(2, ' ', false, Json::error_handler_t::replace); }

Subject recognise(const std::string& path, const SampleOptions& samples) {
  const auto described = [](auto make) {
    return [make](bool json) {
      const Json value = make();
      if (json) return to_text(value);
      print(value);
      return std::string();
    };
  };
  if (!fs::exists(path)) throw ConfigError(path + ": no such file or folder");
  if (fs::is_regular_file(path) && samples.count == 0) {
    if (is_shard(path)) return {[path](bool json) { return describe_shard(path, json); }, [path] { return verify_shard(path); }};
    throw ConfigError(path + ": not a shard of tokens. Expected a shard (.h5), or the folder of a dataset, a checkpoint or a run");
  }
  if (fs::exists(path + "/dataset.json"))
    return {[path, samples](bool json) { return describe_dataset(path, json, samples); }, [path] { return verify_dataset(path); }};
  if (samples.count > 0) throw ConfigError(path + ": --samples shows documents of a dataset; expected the folder of one (with dataset.json)");
  if (fs::exists(path + "/COMPLETE.json") || fs::exists(path + "/model.h5")) {
    const std::string checkpoint = resolve_checkpoint(path);
    return {described([checkpoint] { return describe_checkpoint(checkpoint); }), [checkpoint] { return verify_checkpoint(checkpoint); }};
  }
  if (RunFolder{path}.holds_run())
    return {described([path] { return describe_run(path); }), [path] {
              std::vector<std::string> problems;
              for (const CheckpointEntry& e : list_checkpoints(RunFolder{path}.checkpoints()))
                if (e.complete) std::ranges::copy(verify_checkpoint(e.directory), std::back_inserter(problems));
              return problems;
            }};
  if (!fs::is_directory(path) || (list_checkpoints(path).empty() && list_checkpoints(path + "/checkpoints").empty()))
    throw ConfigError(
        path +
        ": nothing of Tessera's. Expected a shard (.h5), or the folder of a dataset (with dataset.json, which `tessera prepare` writes last), "
        "a checkpoint (COMPLETE.json) or a run (config.yaml)");
  const std::string checkpoint = resolve_checkpoint(path);  // a checkpoints folder: its newest
  return {described([checkpoint] { return describe_checkpoint(checkpoint); }), [checkpoint] { return verify_checkpoint(checkpoint); }};
}

}  // namespace

void add_inspect_command(CLI::App& app) {
  struct Options {
    std::string path;
    SampleOptions samples;
    bool verify = false, json = false;
  };
  auto o = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("inspect", "What a shard, a data folder, a checkpoint or a run is");
  command->add_option("PATH", o->path, "A shard (.h5), or the folder of a dataset, a checkpoint or a run")->type_name("")->required();
  command->add_flag("--verify", o->verify, "Read everything and compare every checksum; each bad file is named, and the exit code is 1");
  command->add_option("--samples", o->samples.count, "Of a dataset: print this many documents of each split, as text")
      ->type_name("N")
      ->check(CLI::Range(0, 1000))
      ->capture_default_str();
  command->add_option("--seed", o->samples.seed, "Which ones: same seed, same documents")
      ->type_name("S")
      ->check(CLI::Range(std::int64_t{0}, std::numeric_limits<std::int64_t>::max()))
      ->capture_default_str();
  command->add_flag("--json", o->json, "Print JSON");
  command->footer(
      "Examples:\n"
      "  tessera inspect data/mine --samples 3 --seed 1\n"
      "  tessera inspect runs/mine\n"
      "  tessera inspect data/mine --verify");
  command->callback([o] {
    const Subject subject = recognise(o->path, o->samples);
    std::vector<std::string> problems;
    if (o->verify) problems = subject.verify();
    // What is damaged may be beyond describing: then the list of bad files is the answer.
    if (problems.empty()) {
      std::string text = subject.describe(o->json);
      if (o->json && o->verify) {
        Json value = Json::parse(text);
        value["verified"] = true;
        text = to_text(value);
      }
      if (!text.empty()) std::cout << text << (text.ends_with('\n') ? "" : "\n");
      if (o->verify && !o->json) std::cout << "verified: every checksum matches\n";
      return;
    }
    if (o->json) {
      std::cout << to_text({{"path", o->path}, {"verified", false}, {"problems", problems}}) << "\n";
    } else {
      for (const std::string& problem : problems) std::cout << "bad: " << problem << "\n";
    }
    std::cout.flush();
    throw std::runtime_error(fmt::format("{}: {} problem{} found", o->path, problems.size(), problems.size() == 1 ? "" : "s"));
  });
}

}  // namespace tessera
