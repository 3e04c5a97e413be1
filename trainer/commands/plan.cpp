// tessera plan: what a run will take, from the same plan that a run allocates.

#include <fmt/core.h>

#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "data/dataset.h"
#include "data/tokenizer.h"
#include "trainer/commands/commands.h"
#include "trainer/config.h"
#include "trainer/device.h"
#include "trainer/open_data.h"
#include "trainer/train_state.h"

namespace tessera {

namespace {

using Json = nlohmann::ordered_json;

std::optional<TrainingData> data_if_there(const Config& config) {
  if (!has_training_data(config.data)) return {};
  return open_training_data(config.data);
}

/// The vocabulary from the data, or from what the configuration says of it.
void find_vocabulary(Config& config, const std::optional<TrainingData>& data) {
  const std::string& tokenizer = config.data.tokenizer;
  if (data) {
    open_tokenizer(data->first(), tokenizer);  // a run would refuse another one, and so does its plan
    resolve_vocabulary(config, data->first().vocabulary, data->first().directory);
  } else if (config.model.vocabulary != 0) {
    resolve_vocabulary(config, config.model.vocabulary, "");
  } else if (tokenizer == "bytes") {
    resolve_vocabulary(config, load_tokenizer(tokenizer)->vocabulary(), tokenizer);
  } else if (tokenizer == "gpt2" || tokenizer.starts_with("gpt2:")) {
    resolve_vocabulary(config, 50257, tokenizer);  // the published vocabulary: 256 bytes, 50,000 merges, <|endoftext|>
  } else if (tokenizer.starts_with("bpe:")) {
    resolve_vocabulary(config, load_tokenizer(tokenizer)->vocabulary(), tokenizer);
  } else {
    std::string missing = config.data.path.empty() ? "data.path is not set" : fmt::format("there is no {}/dataset.json", config.data.path);
    if (!config.data.mix.empty()) missing = "not every folder of data.mix has a dataset.json";
    throw ConfigError(fmt::format(
        "the vocabulary is not known: {}. Set model.vocabulary, data.tokenizer (bytes, gpt2 or bpe:FILE), or data.path to a prepared dataset",
        missing));
  }
}

Json make_plan(Config& config, int ranks) {
  check_ranks(config, ranks);
  const auto data = data_if_there(config);
  find_vocabulary(config, data);
  // Reserves, and allocates nothing: any operations will do. Every rank's slices are equal.
  const auto ops = make_cpu_ops(1);
  const TrainState state(config, *ops, 0, ranks);

  const ParameterLayout& layout = state.model.layout();
  const Gpt::Flops flops = state.model.flops_per_token();
  const std::int64_t tokens = config.train.tokens_per_step * config.train.steps;
  Json bytes = Json::object();
  for (int c = 0; c < kMemoryCategories; ++c) bytes[name_of(static_cast<MemoryCategory>(c))] = state.plan.bytes(static_cast<MemoryCategory>(c));
  const std::size_t libraries = library_bytes(device_kind(config.device));
  if (libraries > 0) bytes["device_libraries"] = libraries;
  bytes["total"] = state.plan.total_bytes() + libraries;
  Json plan = {
      {"device", config.device},
      {"ranks", ranks},
      {"parameters", layout.count},
      {"parameters_decayed", layout.decayed_count},
      {"vocabulary", config.model.vocabulary},
      {"vocabulary_padded", config.model.vocabulary_padded},
      {"bytes_per_rank", bytes},
      {"checkpoint_bytes", 3 * layout.count * static_cast<std::int64_t>(sizeof(float))},  // parameters and the two moments
      {"flops_per_token", {{"dense_equivalent", flops.dense + flops.attention_causal}, {"pattern_visible", flops.dense + flops.attention_visible}}},
      {"tokens_per_step", config.train.tokens_per_step},
      {"micro_batches_per_step_and_rank", config.train.tokens_per_step / (config.model.context * config.train.micro_batch * ranks)},
      {"steps", config.train.steps},
      {"tokens", tokens},
      {"flops",
       {{"dense_equivalent", (flops.dense + flops.attention_causal) * static_cast<double>(tokens)},
        {"pattern_visible", (flops.dense + flops.attention_visible) * static_cast<double>(tokens)}}},
  };
  if (data) {
    const auto epochs = [&](double share, std::uint64_t of) { return of == 0 ? 0.0 : share * static_cast<double>(tokens) / static_cast<double>(of); };
    plan["data_tokens"] = data->train_tokens();
    plan["epochs"] = epochs(1, data->train_tokens());
    for (std::size_t i = 0; data->parts.size() > 1 && i < data->parts.size(); ++i) {
      const DatasetInfo& part = data->parts[i].data;
      plan["mix"].push_back({{"data", part.directory},
                             {"share", data->share(i)},
                             {"data_tokens", part.train.tokens},
                             {"epochs", epochs(data->share(i), part.train.tokens)}});
    }
  }
  return plan;
}

/// 1234567 as "1,234,567".
std::string grouped(std::int64_t n) {
  if (n < 1000) return std::to_string(n);
  return fmt::format("{},{:03}", grouped(n / 1000), n % 1000);
}

std::string human_bytes(double bytes) {
  const char* const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  int unit = 0;
  for (; bytes >= 1024 && unit < 5; ++unit) bytes /= 1024;
  return fmt::format("{:.{}f} {}", bytes, unit == 0 ? 0 : 1, units[unit]);
}

std::string plan_text(const Json& plan) {
  std::string text;
  const auto row = [&](const std::string& name, const std::string& value, const std::string& note = "") {
    text += fmt::format("{:<24}{:>20}{}{}\n", name, value, note.empty() ? "" : "  ", note);
  };
  const auto count = [&](const char* key) { return grouped(plan[key].get<std::int64_t>()); };
  row("parameters", count("parameters"),
      fmt::format("{} of them decayed; vocabulary {} padded to {}", count("parameters_decayed"), count("vocabulary"), count("vocabulary_padded")));
  text += fmt::format("bytes on each of {} rank{}, device {}\n", plan["ranks"].get<int>(), plan["ranks"] == 1 ? "" : "s",
                      plan["device"].get<std::string>());
  for (const auto& [name, bytes] : plan["bytes_per_rank"].items())
    row(name == "device_libraries" ? "  device libraries" : "  " + name, grouped(bytes.get<std::int64_t>()), human_bytes(bytes.get<double>()));
  row("checkpoint bytes", count("checkpoint_bytes"), human_bytes(plan["checkpoint_bytes"].get<double>()));
  text += "FLOPs a token, forward and backward\n";
  row("  dense-equivalent", fmt::format("{:.4g}", plan["flops_per_token"]["dense_equivalent"].get<double>()), "every causal edge");
  row("  pattern-visible", fmt::format("{:.4g}", plan["flops_per_token"]["pattern_visible"].get<double>()), "edges that attention.pattern admits");
  row("tokens a step", count("tokens_per_step"), fmt::format("{} micro-batches a rank", count("micro_batches_per_step_and_rank")));
  row("steps", count("steps"));
  row("tokens", count("tokens"),
      plan.contains("epochs") ? fmt::format("{:.2f} epochs of {} tokens", plan["epochs"].get<double>(), count("data_tokens")) : "");
  if (plan.contains("mix"))
    for (const Json& part : plan["mix"])
      row(fmt::format("  {:.4g} % of them", 100 * part["share"].get<double>()),
          grouped(static_cast<std::int64_t>(part["share"].get<double>() * plan["tokens"].get<double>())),
          fmt::format("{}: {:.2f} epochs of {} tokens", part["data"].get<std::string>(), part["epochs"].get<double>(),
                      grouped(part["data_tokens"].get<std::int64_t>())));
  row("FLOPs of the run", fmt::format("{:.4g}", plan["flops"]["dense_equivalent"].get<double>()), "dense-equivalent");
  return text;
}

}  // namespace

void add_plan_command(CLI::App& app) {
  struct Options {
    std::string file;
    std::vector<std::string> sets;
    int ranks = 1;
    bool json = false;
  };
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("plan", "Memory and work of a run, before it: parameters, bytes on each rank, FLOPs");
  command->add_option("CONFIG.yaml", options->file, "YAML configuration")->type_name("")->required();
  command->add_option("--ranks", options->ranks, "MPI ranks of the run")->type_name("N")->check(CLI::Range(1, 1 << 20))->capture_default_str();
  command->add_option("--set", options->sets, "Set a key, after the file; the last one counts")->type_name("KEY=VALUE")->expected(1)->take_all();
  command->add_flag("--json", options->json, "Print JSON");
  command->footer(
      "Needs no data when model.vocabulary or data.tokenizer (bytes, gpt2, bpe:FILE) says the vocabulary.\n"
      "Example:\n"
      "  tessera plan configs/quickstart.yaml --ranks 2 --set data.tokenizer=gpt2");
  command->callback([options] {
    Config config = load_config(options->file, options->sets);
    for (const auto& notice : config.notices) fmt::print(stderr, "tessera: note: {}\n", notice);
    const Json plan = make_plan(config, options->ranks);
    std::cout << (options->json ? plan.dump(2) + "\n" : plan_text(plan));
  });
}

}  // namespace tessera
