#include "trainer/sweep/sweep_check.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <map>

#include "trainer/device.h"
#include "trainer/open_data.h"
#include "trainer/run_folder.h"
#include "trainer/run_plan.h"
#include "trainer/statistics.h"

namespace tessera {

namespace {

double flops_per_token(const CheckedRun& r) { return r.plan["flops_per_token"]["pattern_visible"].get<double>(); }

/// Seconds a token that a run has taken so far; 0: it has not.
double measured(const CheckedRun& r) {
  const auto& s = r.state.summary;
  return s && s->step > 0 ? s->seconds / (static_cast<double>(s->step) * static_cast<double>(s->config.train.tokens_per_step)) : 0;
}

/// Times at the speed that the run had, else its variant with other seeds, else the sweep's other runs by FLOPs.
void estimate(const Sweep& sweep, std::vector<CheckedRun>& runs) {
  std::map<std::string, std::vector<double>> by_variant;
  std::vector<double> per_flop;
  for (const CheckedRun& r : runs)
    if (const double t = measured(r); t > 0) {
      by_variant[r.run.variant].push_back(t);
      per_flop.push_back(t / flops_per_token(r));
    }
  for (CheckedRun& r : runs) {
    double a_token = measured(r);
    if (a_token == 0) a_token = median(by_variant[r.run.variant]).value_or(0);
    if (a_token == 0) a_token = median(per_flop).value_or(0) * flops_per_token(r);
    r.seconds = r.steps_known ? a_token * r.plan["tokens"].get<double>() : 60 * sweep.file.budget.minutes;
  }
}

}  // namespace

SweepCheck check_sweep(const Sweep& sweep, const HostRoom& host, bool to_run) {
  const SweepFolder folder(sweep.file);
  folder.check_owner();
  SweepCheck check;
  struct Planned {
    Config config;
    nlohmann::ordered_json plan;
    Provenance data{};  // to_run alone
  };
  std::map<std::string, Planned> planned;  // by variant: seeds take the same
  std::vector<std::string> seen;           // several runs have one mistake often, and it is enough to read once
  const auto problem = [&](const std::string& name, const std::string& text) {
    if (std::ranges::find(seen, text) != seen.end()) return;
    seen.push_back(text);
    check.problems.push_back(fmt::format("{}: {}", name, text));
  };
  for (const SweepRun& run : sweep.runs) {
    CheckedRun checked{run, {}, {}, sweep.file.budget.minutes == 0, 0};
    try {
      checked.state = state_of(folder, run);
      const auto& there = checked.state.summary;
      if (!checked.steps_known && there) {
        if (const double minutes = folder.minutes(); minutes != sweep.file.budget.minutes)
          problem(run.name,
                  fmt::format("{}: its runs have the steps of {}, not of budget.minutes {:g}. Put that back, set dir: to another folder, or "
                              "move the folder away",
                              folder.directory(), minutes > 0 ? fmt::format("budget.minutes {:g}", minutes) : "another budget",
                              sweep.file.budget.minutes));
        checked.run = with_steps(sweep, run, there->config.train.steps);
        checked.steps_known = true;
      }
      Config& config = checked.run.config;
      const std::string key = fmt::format("{} {}", run.variant, config.train.steps);
      auto plan = planned.find(key);
      if (plan == planned.end()) {
        Config of_variant = config;
        auto json = plan_run(of_variant, sweep.file.resources.ranks);
        Provenance data;
        if (to_run) data = provenance_of(open_training_data(config.data));
        if (const auto text = room_problem(config, sweep.file.resources, json["bytes_per_rank"]["total"].get<std::size_t>(), host); !text.empty())
          problem(run.name, text);
        plan = planned.emplace(key, Planned{of_variant, std::move(json), std::move(data)}).first;
      }
      config.model = plan->second.config.model;  // with the vocabulary
      checked.plan = plan->second.plan;
      if (to_run)
        if (const std::string text = device_problem(config.device); !text.empty())
          problem(run.name, fmt::format("device {}: {}; or set device cpu", config.device, text));
      // A folder that was made and never trained in may not know the vocabulary yet.
      Config known = there ? there->config : config;
      if (known.model.vocabulary == 0) known.model.vocabulary = config.model.vocabulary;
      const auto changes = sweep_changes(known, config);
      if (!changes.empty())
        problem(run.name,
                fmt::format("{} holds a run with another configuration: {}. Put that back, set dir: to another folder, or move the folder away",
                            folder.run(run.name), fmt::join(changes, "; ")));
      else if (const std::string text = to_run && there ? other_data_problem({folder.run(run.name)}, plan->second.data) : ""; !text.empty())
        problem(run.name, text + ". Put that data back, set dir: to another folder, or move the folder away");
      else if (!there && RunFolder{folder.run(run.name)}.holds_run())
        problem(run.name, fmt::format("{} holds a run without its config.yaml; move it away", folder.run(run.name)));
      check.runs.push_back(std::move(checked));
    } catch (const std::invalid_argument& e) {
      problem(run.name, e.what());
    }
  }
  estimate(sweep, check.runs);
  return check;
}

void throw_if_any(const Sweep& sweep, const std::vector<std::string>& problems) {
  Problems all(sweep.file.file);
  for (const std::string& text : problems) all.add(problems.size() == 1 ? sweep.file.file : "", "", text);
  all.throw_if_any();
}

}  // namespace tessera
