// tessera plan: what a run will take, from the same plan that a run allocates.

#include <fmt/core.h>

#include <algorithm>
#include <charconv>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "trainer/commands/commands.h"
#include "trainer/commands/plan.h"
#include "trainer/config.h"
#include "trainer/run_plan.h"
#include "trainer/sequence_costs.h"
#include "trainer/simulate.h"

namespace tessera {

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

namespace {

using Json = nlohmann::ordered_json;

/// What a run takes.
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
  for (const auto& [key, bytes] : plan["bytes_per_rank"].items()) {
    std::string name = key;
    std::ranges::replace(name, '_', ' ');
    row("  " + name, grouped(bytes.get<std::int64_t>()), human_bytes(bytes.get<double>()));
  }
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

/// "8,64" as {8, 64}.
std::vector<int> numbers_of_gpus(const std::string& text) {
  std::vector<int> numbers;
  for (std::size_t at = 0; at <= text.size();) {
    const std::size_t end = std::min(text.find(',', at), text.size());
    int n = 0;
    const auto [stop, error] = std::from_chars(text.data() + at, text.data() + end, n);
    if (error != std::errc() || stop != text.data() + end || n < 1 || n > 1 << 20)
      throw ConfigError(fmt::format("--gpus {:.60}: expected whole numbers from 1 to {} with a comma between each two, as 8,64", text, 1 << 20));
    numbers.push_back(n);
    at = end + 1;
  }
  return numbers;
}

}  // namespace

void add_plan_command(CLI::App& app) {
  struct Options {
    std::string file;
    std::vector<std::string> sets;
    int ranks = 1, sequence = 0;
    bool json = false, simulate = false;
    std::string gpus = "8";
    std::int64_t context = 0;
    SimulatedCluster cluster;
    std::vector<std::string> rates;
  };
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("plan", "Memory and work of a run, before it: parameters, bytes on each rank, FLOPs, messages");
  command->add_option("CONFIG.yaml", options->file, "YAML configuration")->type_name("")->required();
  auto* ranks = command->add_option("--ranks", options->ranks, "MPI ranks of the run")->type_name("N")->check(CLI::Range(1, 1 << 20));
  ranks->capture_default_str();
  command->add_option("--sequence", options->sequence, "Only what this many ranks of a sequence would compute and send, or how fast (--simulate)")
      ->type_name("S")
      ->check(CLI::Range(1, 1024));
  command->add_option("--set", options->sets, "Set a key, after the file; the last one counts")->type_name("KEY=VALUE")->expected(1)->take_all();
  command->add_flag("--json", options->json, "Print JSON");
  auto* simulate_flag =
      command->add_flag("--simulate", options->simulate, "Predict the time of a step on GPUs, for every layout and exchange")->excludes(ranks);
  const auto simulated = [&](const char* name, auto& value, const char* meaning) {
    return command->add_option(name, value, meaning)->needs(simulate_flag)->group("With --simulate");
  };
  simulated("--gpus", options->gpus, "Numbers of GPUs")->type_name("N,N,...")->capture_default_str();
  simulated("--context", options->context, "Tokens a sequence, instead of model.context")->type_name("T")->check(CLI::Range(1, 1 << 20));
  simulated("--node-size", options->cluster.node_size, "GPUs of a node")->type_name("N")->check(CLI::Range(1, 1 << 20))->capture_default_str();
  const auto speed = number_in(1e-3, 1e9);
  simulated("--link-gbps", options->cluster.link_gbps, "Gbit/s a GPU sends inside its node")->type_name("X")->check(speed)->capture_default_str();
  simulated("--node-gbps", options->cluster.node_gbps, "Gbit/s a GPU sends to other nodes")->type_name("X")->check(speed)->capture_default_str();
  simulated("--latency-us", options->cluster.latency_us, "Microseconds of a round of messages")
      ->type_name("X")
      ->check(number_in(0, 1e9))
      ->capture_default_str();
  simulated("--rate", options->rates, "Set a rate that the prediction prints among what it assumes")
      ->type_name("NAME=VALUE")
      ->expected(1)
      ->take_all();
  command->footer(
      "Needs no data when model.vocabulary or data.tokenizer (bytes, gpt2, bpe:FILE) says the vocabulary.\n"
      "Example:\n"
      "  tessera plan configs/quickstart.yaml --ranks 2 --set data.tokenizer=gpt2\n"
      "  tessera plan configs/long-context.yaml --sequence 4\n"
      "  tessera plan configs/long-context.yaml --simulate --gpus 8,64 --context 131072 --set data.tokenizer=gpt2");
  command->callback([options, ranks] {
    std::vector<std::string> sets = options->sets;
    if (options->context > 0) sets.push_back(fmt::format("model.context={}", options->context));
    Config config = load_config(options->file, sets);
    for (const auto& notice : config.notices)  // --sequence and --simulate use what has no effect on the run itself
      if ((options->sequence == 0 && !options->simulate) || notice.find("parallel.sequence 1") == std::string::npos)
        fmt::print(stderr, "tessera: note: {}\n", notice);
    const auto print = [&](const Json& result, const auto& text) { std::cout << (options->json ? result.dump(2) + "\n" : text(result)); };
    if (options->simulate) {
      SimulatedRates rates;
      for (const auto& rate : options->rates) set_rate(rates, rate);
      find_vocabulary(config);
      print(simulate(config, numbers_of_gpus(options->gpus), options->sequence, options->cluster, rates), simulation_text);
    } else if (options->sequence > 0) {
      if (ranks->count() > 0 && options->ranks % options->sequence != 0)
        throw ConfigError(
            fmt::format("--ranks {}: {} ranks share a sequence; expected a multiple of {}", options->ranks, options->sequence, options->sequence));
      print({{"sequence", plan_sequence(config, options->sequence)}}, [](const Json& plan) { return sequence_text(plan["sequence"]); });
    } else {
      print(plan_run(config, options->ranks),
            [](const Json& plan) { return plan_text(plan) + (plan.contains("sequence") ? sequence_text(plan["sequence"]) : ""); });
    }
  });
}

}  // namespace tessera
