#include "trainer/sweep/sweep_run.h"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstring>
#include <deque>
#include <filesystem>
#include <fstream>
#include <list>
#include <memory>

#include "data/files.h"
#include "trainer/run_folder.h"
#include "trainer/signals.h"
#include "trainer/statistics.h"
#include "trainer/sweep/child_process.h"

namespace tessera {

namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

constexpr std::size_t kTail = 1 << 16;    // bytes of a run's output that are kept for its last error
constexpr std::int64_t kTimedSteps = 12;  // of budget.minutes; the first ones read files and touch memory
constexpr std::int64_t kUntimedSteps = 2;

/// What is under way of a run.
struct Job {
  const CheckedRun* checked;
  Config config;
  bool timing = false;
  RunDemand demand;
  std::vector<std::size_t> gpus;
  std::unique_ptr<ChildProcess> process;
  std::string tail;
  int log = -1;
  Clock::time_point started;

  const std::string& name() const { return checked->run.name; }
};

/// Seconds a step of a run that was timed: the median, so that what else the host did then counts little.
double seconds_a_step(const std::string& metrics) {
  std::ifstream file(metrics);
  std::vector<double> seconds;
  for (std::string line; std::getline(file, line);) {
    const Json row = Json::parse(line, nullptr, false);
    if (row.is_object() && row.value("step", std::int64_t{0}) > kUntimedSteps) seconds.push_back(row.value("step_ms", 0.0) / 1e3);
  }
  if (const auto middle = median(std::move(seconds))) return *middle;
  throw std::runtime_error(fmt::format("{}: no steps in it", metrics));
}

/// The last step in metrics.jsonl, from its end.
std::int64_t step_of(const std::string& metrics) {
  constexpr std::streamoff kEnd = 1 << 18;  // several rows, also with values of many heads
  std::ifstream file(metrics, std::ios::binary | std::ios::ate);
  if (const std::streamoff size = file.tellg(); file && size > kEnd)
    file.seekg(size - kEnd);
  else
    file.seekg(0);
  std::int64_t step = 0;
  for (std::string line; std::getline(file, line);) {
    const Json row = Json::parse(line, nullptr, false);
    if (row.is_object()) step = row.value("step", step);
  }
  return step;
}

class SweepRunner {
 public:
  SweepRunner(const Sweep& sweep, const SweepCheck& check, const HostRoom& host, Console& console)
      : sweep_(sweep), host_(host), folder_(sweep.file), ledger_(host, sweep.file.resources.at_once), console_(console), total_(check.runs.size()) {
    for (const CheckedRun& run : check.runs)
      if (run.state.kind == RunState::Kind::finished)
        ++finished_;
      else
        waiting_.push_back(&run);
  }

  void run() {
    make_folder(folder_.directory());
    const std::unique_ptr<FolderLock> lock = lock_folder();
    folder_.claim();
    remove_timings();
    if (finished_ > 0) console_.say("{} of {} runs are finished already", finished_, total_);
    while (true) {
      if (!stopping_ && signals_.requested()) stop();
      if (!stopping_) start_what_fits();
      if (active_.empty() && (stopping_ || waiting_.empty())) break;
      wait();
      for (auto job = active_.begin(); job != active_.end();) {
        listen(*job);
        const auto code = job->process->ended();
        if (!code) {
          ++job;
          continue;
        }
        listen(*job);  // what it printed last
        ended(*job, *code);
        job = active_.erase(job);
      }
      show();
    }
    conclude();
  }

 private:
  const Sweep& sweep_;
  const HostRoom host_;
  const SweepFolder folder_;
  RoomLedger ledger_;
  Console& console_;
  StopSignals signals_;
  const std::size_t total_;
  const std::string self_ = fs::read_symlink("/proc/self/exe").string();  // now: a new build may replace it
  std::deque<const CheckedRun*> waiting_;
  std::list<Job> active_;
  std::size_t finished_ = 0;
  std::vector<std::pair<std::string, std::string>> failed_;  // names, errors
  std::vector<std::string> stopped_;
  std::vector<std::string> in_use_;  // said already
  Clock::time_point shown_{};
  bool stopping_ = false;

  std::unique_ptr<FolderLock> lock_folder() const {
    try {
      return std::make_unique<FolderLock>(folder_.directory());
    } catch (const std::runtime_error&) {
      throw std::runtime_error(fmt::format(
          "{}: another `tessera sweep run` is at work in it now. Wait for it, stop it, or set dir: to another folder", folder_.directory()));
    }
  }

  void stop() {
    stopping_ = true;
    console_.say("{}: the runs finish their step and write a checkpoint; once more ends them at once", signals_.name());
    for (const Job& job : active_) job.process->signal(SIGUSR1);
  }

  void start_what_fits() {
    for (auto next = waiting_.begin(); next != waiting_.end();) {
      const CheckedRun& run = **next;
      // What a sweep that was killed left behind is about to end by itself.
      if (folder_in_use(folder_.run(run.run.name))) {
        if (std::ranges::find(in_use_, run.run.name) == in_use_.end()) {
          console_.say("{}: another process is at work in its folder; waiting for it", run.run.name);
          in_use_.push_back(run.run.name);
        }
        ++next;
        continue;
      }
      const RunDemand demand = demand_of(run.run.config, sweep_.file.resources, run.bytes_per_rank(), host_);
      const auto gpus = ledger_.take(demand);
      if (!gpus) return;  // in order: a large run is not overtaken for ever
      next = waiting_.erase(next);
      Job job;
      job.checked = &run;
      job.config = run.run.config;
      job.timing = !run.steps_known;
      job.demand = demand;
      job.gpus = *gpus;
      active_.push_back(std::move(job));
      if (!begin(active_.back())) active_.pop_back();
    }
  }

  /// Starts a job's process; false, with its failure noted, when that cannot be.
  bool begin(Job& job) {
    try {
      std::error_code none;  // a disk that cannot be written is said below
      fs::remove(folder_.failure(job.name()), none);
      std::string file;
      if (job.timing) {
        job.config = timed(job);
        fs::remove_all(job.config.run.dir);
        file = job.config.run.dir + ".yaml";
        make_folder(folder_of(file));
      } else {
        make_folder(job.config.run.dir);
        file = RunFolder{job.config.run.dir}.config();
        // It was looked at before the sweep began, and may have waited since.
        if (fs::exists(file) && !sweep_changes(load_stored_config(file), job.config).empty())
          throw std::runtime_error(fmt::format("{} holds a run with another configuration by now", job.config.run.dir));
      }
      write_file(file, to_yaml(job.config));
      if (job.log < 0) job.log = open(folder_.log(job.name()).c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
      job.tail.clear();
      job.started = Clock::now();
      job.process = std::make_unique<ChildProcess>(command(job, file));
      console_.say("{}: {}", job.name(),
                   job.timing ? fmt::format("timing {} steps for a budget of {:g} minutes", kTimedSteps, sweep_.file.budget.minutes)
                              : fmt::format("{} to step {}{}", saved_step(job) > 0 ? "going on" : "training", job.config.train.steps,
                                            job.gpus.empty() ? "" : fmt::format(" on GPU {}", ledger_.names(job.gpus))));
      return true;
    } catch (const std::exception& e) {  // a disk that is full, a variant that does not resolve with the steps that were timed
      fail(job, e.what(), 1);
      release(job);
      return false;
    }
  }

  /// The first steps of a run, alone, with nothing but steps.
  Config timed(const Job& job) const {
    Config config = job.config;
    config.run.dir = folder_.timing(job.name());
    config.train.steps = kTimedSteps;
    config.optimizer.warmup = 0;
    config.optimizer.schedule = Schedule::constant;
    config.eval = {.every = 0, .batches = 1};
    config.checkpoint.every = config.sample.every = config.log.heads_every = 0;
    return config;
  }

  ChildProcess::Command command(const Job& job, const std::string& file) const {
    ChildProcess::Command c;
    const int ranks = sweep_.file.resources.ranks;
    if (ranks > 1) {  // as launch/train.sh does
      c.arguments = {"mpirun", "--bind-to", "none", "--oversubscribe", "-n", std::to_string(ranks)};
      if (geteuid() == 0) c.environment = {{"OMPI_ALLOW_RUN_AS_ROOT", "1"}, {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"}};
    }
    for (const std::string& word : {self_, std::string("train"), file, std::string("--resume")}) c.arguments.push_back(word);
    if (!job.gpus.empty()) c.environment.emplace_back("CUDA_VISIBLE_DEVICES", ledger_.names(job.gpus));
    // A share of the host where the configuration leaves the threads open.
    if (job.demand.cores > 0 && job.config.run.threads == 0)
      c.environment.emplace_back("OMP_NUM_THREADS", std::to_string(std::max(1, job.demand.cores / ranks)));
    return c;
  }

  void wait() {
    std::vector<pollfd> files;
    for (const Job& job : active_)
      if (job.process->output() >= 0) files.push_back({job.process->output(), POLLIN, 0});
    poll(files.data(), files.size(), 100);  // an end without output, a folder that becomes free, a signal just before: all within that time
  }

  void listen(Job& job) {
    job.process->read([&](std::string_view text) {
      // The log may be on a full disk; what the run said last is kept here all the same.
      if (job.log >= 0 && write(job.log, text.data(), text.size()) < 0) {
        close(job.log);
        job.log = -1;
      }
      job.tail += text;
      if (job.tail.size() > 2 * kTail) job.tail.erase(0, job.tail.size() - kTail);
    });
  }

  void release(Job& job) {
    ledger_.give_back(job.demand, job.gpus);
    if (job.log >= 0) close(job.log);
    job.log = -1;
  }

  void ended(Job& job, int code) {
    const double seconds = std::chrono::duration<double>(Clock::now() - job.started).count();
    if (job.timing && code == 0 && !stopping_ && decide_steps(job)) {
      if (begin(job)) active_.push_front(std::move(job));  // the caller takes this one out
      return;
    }
    if (!job.timing) {
      RunState state;
      try {
        state = state_of(folder_, job.checked->run);
      } catch (const std::exception& e) {  // its files are damaged
        job.tail += fmt::format("\nerror: {}\n", e.what());
        code = std::max(code, 1);
      }
      if (code == 0 && state.kind == RunState::Kind::finished) {
        ++finished_;
        const auto& loss = state.summary->validation_loss;
        console_.say("[{}/{}] {}: finished, {}{}", finished_ + failed_.size(), total_, job.name(),
                     loss ? fmt::format("validation loss {:.4f}, ", *loss) : "", format_duration(seconds));
        return release(job);
      }
      if (code == 0 || stopping_) {
        stopped_.push_back(job.name());
        console_.say("{}: stopped after step {} of {}", job.name(), state.step, state.steps);
        return release(job);
      }
    } else if (stopping_) {
      stopped_.push_back(job.name());
      return release(job);
    }
    fail(job, last_error(job.tail, code), code);
    release(job);
  }

  /// After its steps were timed: sets the job's real configuration.
  bool decide_steps(Job& job) {
    try {
      const double a_step = seconds_a_step(RunFolder{job.config.run.dir}.metrics());
      const auto steps = static_cast<std::int64_t>(std::max(1.0, std::floor(60 * sweep_.file.budget.minutes / a_step)));
      Config config = with_steps(sweep_, job.checked->run, steps).config;
      config.model = job.checked->run.config.model;  // with the vocabulary
      remove_timing(job.name());
      job.config = std::move(config);
      job.timing = false;
      console_.say("{}: {:.0f} ms a step make {} steps", job.name(), 1e3 * a_step, steps);
      return true;
    } catch (const std::exception& e) {
      job.tail += fmt::format("\nerror: {}\n", e.what());
      return false;
    }
  }

  void remove_timing(const std::string& name) const {
    std::error_code none;
    fs::remove_all(folder_.timing(name), none);
    fs::remove(folder_.timing(name) + ".yaml", none);
    fs::remove(fs::path(folder_.timing(name)).parent_path(), none);  // when it was the last
  }

  /// What a sweep that was killed left of them, and nothing else.
  void remove_timings() const {
    std::error_code none;
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(fs::path(folder_.timing("")), none))
      if (RunFolder{entry.path().string()}.holds_run() || fs::exists(entry.path().string() + ".yaml")) names.push_back(entry.path().filename());
    for (const std::string& name : names) remove_timing(name);
  }

  static std::int64_t saved_step(const Job& job) {
    const auto& summary = job.checked->state.summary;
    return summary ? summary->saved : 0;
  }

  void fail(const Job& job, const std::string& error, int code) {
    failed_.emplace_back(job.name(), error);
    console_.say("[{}/{}] {}: failed: {}", finished_ + failed_.size(), total_, job.name(), error);
    try {
      write_file(folder_.failure(job.name()),
                 Json{{"error", error}, {"exit_code", code}}.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n");
    } catch (const std::exception& e) {
      console_.say("{}: that is not on record for `tessera sweep status`: {}", job.name(), e.what());
    }
  }

  /// The line of progress, on a terminal.
  void show() {
    if (Clock::now() - shown_ < std::chrono::seconds(1)) return;
    shown_ = Clock::now();
    std::string text = fmt::format("{}/{} finished", finished_, total_);
    if (!failed_.empty()) text += fmt::format(", {} failed", failed_.size());
    for (const Job& job : active_) {
      text += fmt::format("  {} {}/{}", job.name(), step_of(RunFolder{job.config.run.dir}.metrics()), job.config.train.steps);
    }
    console_.progress(text, false);
  }

  void conclude() const {
    if (finished_ == total_) return console_.say("done: {} runs. Compare them: tessera sweep report {}", total_, sweep_.file.file);
    std::string text = fmt::format("{} of {} runs are finished", finished_, total_);
    if (!failed_.empty()) text += fmt::format(", {} failed", failed_.size());
    for (const auto& [name, error] : failed_) text += fmt::format("\n  {}: {} ({})", name, error, folder_.log(name));
    throw std::runtime_error(text + fmt::format("{}Go on: tessera sweep run {}", failed_.empty() ? ". " : "\n  ", sweep_.file.file));
  }
};

}  // namespace

std::string last_error(const std::string& output, int code) {
  static const std::string kMark = "error: ";
  std::string error;
  const std::size_t mark = output.rfind(kMark);
  // Of what follows, to the line that no longer belongs to it: several lines are indented below the first.
  for (std::size_t at = mark == std::string::npos ? mark : mark + kMark.size(); at < output.size();) {
    const std::size_t end = std::min(output.find('\n', at), output.size());
    if (!error.empty() && output[at] != ' ') break;
    error += fmt::format("{}{}", error.empty() ? "" : "\n", output.substr(at, end - at));
    at = end + 1;
  }
  if (code > 128) return fmt::format("ended by signal {} ({}){}", code - 128, strsignal(code - 128), error.empty() ? "" : "; " + error);
  if (!error.empty()) return error;
  std::size_t end = output.find_last_not_of(" \n");
  if (end == std::string::npos) return fmt::format("exit code {}, and nothing was printed", code);
  const std::size_t start = output.rfind('\n', end) + 1;  // npos + 1 is 0
  return fmt::format("exit code {}: {}", code, output.substr(start, end - start + 1));
}

void run_sweep(const Sweep& sweep, const SweepCheck& check, const HostRoom& host, Console& console) {
  SweepRunner(sweep, check, host, console).run();
}

}  // namespace tessera
