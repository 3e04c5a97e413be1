// tessera eval --core: CORE of a checkpoint, alone or under mpirun.

#include "trainer/commands/eval_core.h"

#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <iostream>

#include "data/files.h"
#include "trainer/collective.h"
#include "trainer/core/report.h"
#include "trainer/host_threads.h"
#include "trainer/progress.h"

namespace tessera {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

/// Bundle, tasks and limit that fit together; nothing of the model is needed for it.
std::vector<CoreTask> choose_tasks(const CoreBundle& bundle, const EvalCoreOptions& o, CoreScope& scope) {
  std::vector<CoreTask> tasks;
  const std::vector<CoreTask> selected = select_tasks(bundle, o.tasks);
  for (const CoreTask& task : bundle.tasks) {
    const bool wanted = std::any_of(selected.begin(), selected.end(), [&](const CoreTask& s) { return s.label == task.label; });
    (!wanted ? scope.not_selected : task.missing ? scope.missing : tasks).push_back(task);
  }
  if (tasks.empty()) throw ConfigError(fmt::format("{}/eval_data: the items of every task are missing, as {}", o.bundle, bundle.tasks[0].file));
  const CoreTask& most = *std::max_element(tasks.begin(), tasks.end(), [](const CoreTask& a, const CoreTask& b) { return a.shots < b.shots; });
  if (o.limit > 0 && o.limit <= most.shots)
    throw ConfigError(fmt::format("--limit {}: task {} shows {} of these items before each other one; give at least {}", o.limit, most.label,
                                  most.shots, most.shots + 1));
  scope.limit = o.limit;
  return tasks;
}

}  // namespace

void add_eval_core_options(CLI::App& command, EvalCoreOptions& o) {
  CLI::Option* core = command.add_option("--core", o.bundle, "Measure CORE instead: a bundle of core.yaml, eval_meta_data.csv and eval_data/")
                          ->type_name("BUNDLE")
                          ->check([](const std::string& folder) { return folder.empty() ? "expected a folder" : ""; });
  command.add_option("--tasks", o.tasks, "Of CORE: only these, comma-separated")->type_name("A,B")->needs(core);
  command.add_option("--limit", o.limit, "Of CORE: this many items of each task, drawn as its reference does; 0: all")
      ->type_name("N")
      ->check(CLI::Range(0, 1 << 30))
      ->needs(core)
      ->capture_default_str();
  for (const char* other : {"--data", "--split", "--batches"}) core->excludes(command.get_option(other));
}

void eval_core(const std::string& checkpoint, const EvalCoreOptions& o, const OpenCheckpoint::Options& open_options, bool json,
               const std::string& output, Communicator& comm) {
  const auto start = Clock::now();
  OpenCheckpoint::Options options = open_options;
  options.threads = threads_for_rank(comm, open_options.threads);
  CoreScope scope;
  std::vector<CoreTask> tasks;
  agree(comm, [&] { tasks = choose_tasks(read_core_bundle(o.bundle), o, scope); });
  const OpenCheckpoint open(checkpoint, OpenCheckpoint::Use::evaluate, options, comm);
  agree(comm, [&] { require_text(open.info, "CORE"); });
  const BatchLimits limits{static_cast<std::size_t>(open.batch->shape()[0]), static_cast<std::size_t>(open.batch->shape()[1])};
  std::vector<CoreWork> works;
  agree(comm, [&] {
    for (const CoreTask& task : tasks) works.emplace_back(task, o.limit, *open.tokenizer, limits);
  });

  const bool speaks = comm.rank() == 0;
  if (speaks) {
    if (!open.notice.empty()) fmt::print(stderr, "tessera: note: {}\n", open.notice);
    for (const CoreTask& task : scope.missing)
      fmt::print(stderr, "tessera: note: {} is left out: there is no {} (nor .zst, .gz)\n", task.label, task.file);
    if (!json) {
      fmt::print("checkpoint      {} (step {})\n", open.info.directory, open.info.position.step);
      fmt::print("bundle          {}: {} tasks; context {}, {}\n\n{}\n", o.bundle, tasks.size(), limits.context, open.ops->device_name(),
                 core_table_head());
      std::fflush(stdout);
    }
  }

  double all_tokens = 0, done_tokens = 0;
  for (const CoreWork& work : works) all_tokens += work.tokens(comm.rank(), comm.size());
  std::FILE* const shown = json ? stderr : stdout;
  Console console(Console::mode_for(comm.rank(), shown), shown);
  const auto scoring = Clock::now();
  const ScoreBatch score = score_with(*open.model, *open.ops, *open.batch);
  std::vector<CoreRow> rows;
  for (const CoreWork& work : works) {
    const double before = done_tokens, own = work.tokens(comm.rank(), comm.size());
    CoreRow row{&work, score_task(work, *open.tokenizer, limits, score, comm, [&](double tokens) {
                  done_tokens += tokens;
                  const double seconds = seconds_since(scoring);
                  console.progress(fmt::format("{} {:.0f} %  task {} of {}  {} tok/s  ETA {}", work.task.label, 100 * (done_tokens - before) / own,
                                               rows.size() + 1, works.size(), format_count(done_tokens * comm.size() / seconds),
                                               format_duration(seconds * (all_tokens - done_tokens) / done_tokens)),
                                   false);
                })};
    rows.push_back(std::move(row));
    if (!speaks) continue;
    console.clear();
    if (json) continue;
    fmt::print("{}\n", core_table_row(rows.back()));
    std::fflush(stdout);
  }
  if (!speaks) return;
  nlohmann::ordered_json result{{"checkpoint", open.info.directory},
                                {"step", open.info.position.step},
                                {"bundle", o.bundle},
                                {"context", limits.context},
                                {"device", open.ops->device_name()},
                                {"visit", open.config.model.attention.visit == Visit::all ? "all" : "active"}};
  result.update(core_json(rows, scope));
  result["seconds"] = seconds_since(start);
  if (!output.empty()) write_file(output, result.dump(2) + "\n");
  if (json) {
    std::cout << result.dump(2) << "\n";
    return;
  }
  fmt::print("\n{}", core_summary(rows, scope));
  fmt::print("time            {}\n", format_duration(seconds_since(start)));
}

}  // namespace tessera
