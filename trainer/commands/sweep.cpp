// tessera sweep: many runs from one file.

#include <fmt/format.h>

#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "trainer/commands/commands.h"
#include "trainer/progress.h"
#include "trainer/sweep/sweep_report.h"
#include "trainer/sweep/sweep_run.h"
#include "trainer/text_table.h"

namespace tessera {

namespace {

using Json = nlohmann::ordered_json;

struct Options {
  std::string file;
  std::vector<std::string> sets;
  bool json = false, csv = false;
};

Sweep load(const Options& o) {
  Sweep sweep = expand_sweep(read_sweep_file(o.file, o.sets));
  for (const std::string& notice : sweep.notices) fmt::print(stderr, "tessera: note: {}\n", notice);
  return sweep;
}

SweepResults results_of(const Sweep& sweep) {
  SweepResults results = read_results(sweep);
  for (const std::string& notice : results.notices) fmt::print(stderr, "tessera: note: {}\n", notice);
  return results;
}

Json plan_json(const Sweep& sweep, const SweepCheck& check) {
  Json runs = Json::array();
  for (const CheckedRun& r : check.runs) {
    Json differs = Json::object();
    for (const auto& [key, value] : r.run.differs) differs[key] = value;
    runs.push_back({{"name", r.run.name},
                    {"variant", r.run.variant},
                    {"seed", r.run.config.run.seed},
                    {"differs", differs},
                    {"state", name_of(r.state.kind)},
                    {"parameters", r.plan["parameters"]},
                    {"bytes_per_rank", r.bytes_per_rank()},
                    {"flops_per_token", r.plan["flops_per_token"]},
                    {"steps", r.steps_known ? Json(r.run.config.train.steps) : Json(nullptr)},
                    {"tokens", r.steps_known ? r.plan["tokens"] : Json(nullptr)},
                    {"seconds", r.seconds > 0 ? Json(r.seconds) : Json(nullptr)}});
  }
  return {{"file", sweep.file.file},  {"folder", sweep.file.dir},  {"base", sweep.file.base}, {"ranks", sweep.file.resources.ranks}, {"runs", runs},
          {"skipped", sweep.skipped}, {"problems", check.problems}};
}

std::string plan_text(const Sweep& sweep, const SweepCheck& check) {
  std::vector<std::vector<std::string>> rows = {
      {"run", "state", "parameters", "memory a rank", "steps", "tokens", "time", "differs from the base in"}};
  double left = 0;
  bool known = true;
  for (const CheckedRun& r : check.runs) {
    std::vector<std::string> differs;
    for (const auto& [key, value] : r.run.differs) differs.push_back(setting_text(key, value));
    if (r.state.kind != RunState::Kind::finished) {
      known = known && r.seconds > 0;
      left += r.seconds * (1 - static_cast<double>(r.state.step) / static_cast<double>(std::max<std::int64_t>(1, r.state.steps)));
    }
    rows.push_back({r.run.name, name_of(r.state.kind), format_count(r.plan["parameters"]), format_bytes(static_cast<double>(r.bytes_per_rank())),
                    r.steps_known ? std::to_string(r.run.config.train.steps) : "timed", r.steps_known ? format_count(r.plan["tokens"]) : "-",
                    r.seconds > 0 ? fmt::format("~{}", format_duration(r.seconds)) : "-", fmt::format("{}", fmt::join(differs, ", "))});
  }
  std::string text = fmt::format("{}: {} runs in {}, {} rank{} each, from {}\n{}", sweep.file.file, sweep.runs.size(), sweep.file.dir,
                                 sweep.file.resources.ranks, sweep.file.resources.ranks == 1 ? "" : "s", sweep.file.base, text_table(rows));
  if (const std::string base = base_note(sweep); !base.empty()) text += base + "\n";
  if (!sweep.skipped.empty()) text += fmt::format("skip_if leaves out {}: {}\n", sweep.skipped.size(), fmt::join(sweep.skipped, "  "));
  if (left > 0 && known) text += fmt::format("about {} of training steps are left, one run after the other\n", format_duration(left));
  if (!known) text += "time is known once a run of the sweep has taken steps\n";
  return text;
}

void plan(const Options& o) {
  const Sweep sweep = load(o);
  const SweepCheck check = check_sweep(sweep, this_host(), false);
  if (o.json || !check.runs.empty()) std::cout << (o.json ? plan_json(sweep, check).dump(2) + "\n" : plan_text(sweep, check)) << std::flush;
  throw_if_any(sweep, check.problems);
}

void run(const Options& o) {
  const Sweep sweep = load(o);
  const HostRoom host = this_host();
  const SweepCheck check = check_sweep(sweep, host, true);
  throw_if_any(sweep, check.problems);
  Console console(Console::mode_for(0));
  run_sweep(sweep, check, host, console);
}

CLI::App* add(CLI::App& parent, const char* name, const char* what, const std::shared_ptr<Options>& o, void (*work)(const Options&)) {
  CLI::App* command = parent.add_subcommand(name, what);
  command->add_option("SWEEP.yaml", o->file, "Sweep file")->type_name("")->required();
  command->add_option("--set", o->sets, "Set a key of every run, as set: in the file; give the same to each command")
      ->type_name("KEY=VALUE")
      ->expected(1)
      ->take_all();
  command->callback([o, work] { work(*o); });
  return command;
}

}  // namespace

void add_sweep_command(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* sweep = app.add_subcommand("sweep", "Many runs from one file: ablations");
  sweep->require_subcommand(1);
  sweep->footer(
      "A sweep file names a configuration and what varies:\n"
      "  base: ../quickstart.yaml\n"
      "  grid: {attention.gate: [relu, relu2, softmax], attention.threshold.target_edge_sparsity: [0.9, 0.95]}\n"
      "  skip_if: [{attention.gate: softmax, attention.threshold.target_edge_sparsity: 0.9}]\n"
      "  seeds: [1, 2]\n"
      "  budget: {steps: 500}\n"
      "trainer/sweep/sweep_file.h describes all of it; configs/sweeps has examples.\n"
      "Example:\n"
      "  tessera sweep run configs/sweeps/tiny.yaml");
  add(*sweep, "plan", "The runs, what differs, memory and time; checks everything, writes nothing", o, plan)
      ->add_flag("--json", o->json, "Print JSON");
  add(*sweep, "run", "Run what is not finished yet, as many at a time as there is room for", o, run)
      ->footer(
          "Interrupted and failed runs go on from their newest checkpoint, finished ones stay as they are. SIGINT (Ctrl-C), SIGTERM: the runs write "
          "a\n"
          "checkpoint and end; a second one ends them at once. Exit code 1 when a run failed or is left.");
  add(*sweep, "status", "How far each run is, also while they run", o, [](const Options& options) {
    const Sweep s = load(options);
    const SweepResults results = results_of(s);
    std::cout << (options.json ? status_json(s, results).dump(2) + "\n" : status_text(s, results));
  })->add_flag("--json", o->json, "Print JSON");
  CLI::App* report =
      add(*sweep, "report", "What the finished runs found: loss with its spread over seeds, sparsity, speed, memory", o, [](const Options& options) {
        const Sweep s = load(options);
        const SweepResults results = results_of(s);
        std::cout << (options.json ? report_json(s, results).dump(2) + "\n" : options.csv ? report_csv(s, results) : report_text(s, results));
      });
  report->add_flag("--json", o->json, "Print JSON");
  report->add_flag("--csv", o->csv, "Print CSV")->excludes("--json");
}

}  // namespace tessera
