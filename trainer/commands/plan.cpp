// tessera plan: what a run will take, from the same plan that a run allocates.

#include <fmt/core.h>

#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "trainer/commands/commands.h"
#include "trainer/config.h"
#include "trainer/run_plan.h"

namespace tessera {

namespace {

using Json = nlohmann::ordered_json;

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
    const Json plan = plan_run(config, options->ranks);
    std::cout << (options->json ? plan.dump(2) + "\n" : plan_text(plan));
  });
}

}  // namespace tessera
