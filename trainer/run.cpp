#include "trainer/run.h"

#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <limits>
#include <memory>
#include <optional>

#include "data/files.h"
#include "data/loader.h"
#include "data/tokenizer.h"
#include "trainer/checkpoint.h"
#include "trainer/collective.h"
#include "trainer/device.h"
#include "trainer/evaluate.h"
#include "trainer/fault.h"
#include "trainer/generate.h"
#include "trainer/host_threads.h"
#include "trainer/metrics.h"
#include "trainer/open_data.h"
#include "trainer/preflight.h"
#include "trainer/progress.h"
#include "trainer/rank_layout.h"
#include "trainer/run_folder.h"
#include "trainer/schedule.h"
#include "trainer/schema.h"
#include "trainer/signals.h"
#include "trainer/step.h"
#include "trainer/step_record.h"
#include "trainer/tensorboard/event_file.h"
#include "trainer/threshold_control.h"
#include "trainer/train_state.h"
#include "trainer/warm_start.h"

namespace tessera {
namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

class Trainer {
 public:
  Trainer(const Config& config, bool resume, Communicator& comm);
  void run();

 private:
  void prepare();
  StepReport step(std::int64_t t);
  void evaluate(double step_seconds, Json& row);
  void log(std::int64_t t, const StepReport& report, const AttentionCounts& counts, Json row);
  void sample(std::int64_t t);
  void save();
  std::string nonfinite_message() const;
  double planned_bytes() const;  // of memory, on this rank's device
  void restart_clock();
  bool can_evaluate() const {
    return std::ranges::any_of(evaluators_, [](const Evaluator& e) { return e.batches() > 0; });
  }
  bool due(std::int64_t every, std::int64_t t) const { return every > 0 && t % every == 0; }

  Config config_;
  const bool resume_;
  Communicator& comm_;  // the launcher's, for host values
  Console console_;
  FaultInjector fault_;
  StopSignals signals_;
  RunFolder folder_;
  Start start_;
  InitialCheckpoint init_;  // what the parameters started from, now or before --resume
  RunPosition position_;
  std::int64_t first_step_ = 0;  // steps done before this start
  std::int64_t saved_ = -1;      // step of the newest checkpoint
  std::int64_t proven_ = -1;     // of the newest one after which a step was finite
  std::int64_t sequences_per_step_ = 0;
  RankLayout ranks_;

  TrainingData data_;
  std::string tokenizer_file_;  // rank 0: its contents
  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<TrainState> state_;
  std::unique_ptr<TrainStep> step_;
  std::unique_ptr<Loader> loader_;
  std::vector<Evaluator> evaluators_;     // of each dataset
  std::optional<FolderLock> lock_;        // rank 0
  std::optional<MetricsFile> metrics_;    // rank 0
  std::optional<EventFile> events_;       // rank 0, where there is something to write
  std::vector<HostBatch> micro_batches_;  // this rank's of a step
  std::vector<std::uint64_t> counters_;   // of the last step, all ranks
  Clock::time_point began_;               // of the loop
  Clock::time_point step_began_;
  double peak_flops_ = 0;  // of all ranks; 0: not known
};

Trainer::Trainer(const Config& config, bool resume, Communicator& comm)
    : config_(config), resume_(resume), comm_(comm), console_(Console::mode_for(comm.rank())), fault_(comm.rank()), folder_{config.run.dir} {
  prepare();
}

void Trainer::prepare() {
  const int rank = comm_.rank(), ranks = comm_.size();
  agree(comm_, [&] {
    data_ = open_training_data(config_.data);
    check_ranks(config_, ranks);
    if (data_.synthetic) return resolve_vocabulary(config_, data_.synthetic->vocabulary, data_.names());
    tokenizer_ = open_tokenizer(data_.first(), config_.data.tokenizer);
    if (rank == 0)
      tokenizer_file_ = read_file(data_.first().directory + "/tokenizer.json");  // now: the folder may be gone when a checkpoint wants it
    resolve_vocabulary(config_, data_.first().vocabulary, data_.first().directory);
  });
  sequences_per_step_ = config_.train.tokens_per_step / config_.model.context;

  // The start is rank 0's decision: the others may not see the folder as it does at the same moment.
  agree(comm_, [&] {
    if (rank != 0) return;
    // The lock comes first: a run that is just ending may be about to write its last checkpoint.
    if (std::filesystem::is_directory(folder_.directory)) lock_.emplace(folder_.directory);
    start_ = find_start(folder_, resume_, config_, provenance_of(data_));
  });
  start_.checkpoint = comm_.broadcast(start_.checkpoint, 0);
  WarmStart warm;
  if (start_.checkpoint.empty() && !config_.run.init.empty()) {
    agree(comm_, [&] { warm = plan_warm_start(config_, tokenizer_ ? tokenizer_->hash() : ""); });
    // The newest checkpoint of a run may change while it trains: rank 0's is everybody's.
    const std::string path = comm_.broadcast(warm.from.path, 0);
    agree(comm_, [&] {
      if (warm.from.path != path)
        throw std::runtime_error(fmt::format("run.init {}: {} for one rank, {} for another", config_.run.init, path, warm.from.path));
    });
    init_ = warm.from;
  }
  for (const std::string& notice : config_.notices) console_.say("note: {}", notice);
  for (const std::string& notice : start_.notices) console_.say("note: {}", notice);
  for (const std::string& notice : warm.notices) console_.say("note: {}", notice);

  ranks_ = lay_out_ranks(comm_, config_.parallel.sequence);
  const int threads = threads_for_rank(comm_, config_.run.threads);
  device_ = std::make_unique<Device>(config_.device, threads, config_.parallel, comm_);
  Ops& ops = device_->ops();
  agree(comm_, [&] { state_ = std::make_unique<TrainState>(config_, ops, rank, ranks, ranks_.place); });
  preflight({.host = comm_,
             .device = device_->comm(),
             .ops = ops,
             .planned_bytes = state_->plan.total_bytes(),
             .heads = config_.model.heads,
             .width = config_.model.width,
             .partners = exchange_partners(ranks_, state_->model.options().sequence.exchange)});
  agree(comm_, [&] {
    state_->plan.allocate(ops);
    state_->bind(ops, device_->comm(), ranks_.members);
    step_ = std::make_unique<TrainStep>(*state_, ops, device_->comm());
    if (start_.checkpoint.empty()) {
      state_->initialize(config_.run.seed);
      if (!init_.path.empty()) apply_warm_start(warm, config_, *state_, ops);
    } else {
      const CheckpointInfo info = read_checkpoint_info(start_.checkpoint);
      position_ = info.position;
      init_ = info.init;
      load_model(start_.checkpoint, state_->model, ops, &state_->optimizer);
      load_optimizer(start_.checkpoint, state_->model.layout(), state_->optimizer, ops);
      saved_ = first_step_ = position_.step;
    }
    LoaderOptions o;
    o.context = config_.model.context;
    o.micro_batch = config_.train.micro_batch;
    o.sequences_per_step = sequences_per_step_;
    o.rank = ranks_.group;
    o.ranks = ranks_.groups;
    if (config_.parallel.sequence > 1) o.places = state_->model.positions();
    o.seed = config_.run.seed;
    o.first_step = static_cast<std::uint64_t>(position_.step);
    o.prefetch = config_.data.prefetch;
    if (data_.synthetic) {
      loader_ = std::make_unique<Loader>(*data_.synthetic, o);
      const SyntheticSource validation(*data_.synthetic, o.context, SyntheticSource::Split::validation, o.seed);
      evaluators_.emplace_back(validation, config_.train.micro_batch, o.places);
      return;
    }
    loader_ = std::make_unique<Loader>(data_.parts, o);
    for (const MixPart& part : data_.parts)
      evaluators_.emplace_back(part.data, part.data.validation, *tokenizer_, config_.model.context, config_.train.micro_batch, o.places);
  });
  micro_batches_.resize(static_cast<std::size_t>(sequences_per_step_ / ranks_.groups / config_.train.micro_batch));
  peak_flops_ = ranks * (config_.run.peak_tflops > 0 ? config_.run.peak_tflops * 1e12 : ops.peak_flops());

  agree(comm_, [&] {
    if (rank != 0) return;
    make_folder(folder_.directory);
    if (!lock_) lock_.emplace(folder_.directory);
    open_run_folder(folder_, config_, position_.step);
    metrics_.emplace(folder_.metrics());
    if (config_.tensorboard.enabled && position_.step < config_.train.steps) events_.emplace(folder_.directory, position_.step + 1);
  });

  const ModelConfig& m = config_.model;
  console_.say("model     {} parameters: {} layers, {} heads of {}, width {}, context {}, vocabulary {}", format_count(state_->model.layout().count),
               m.layers, m.heads, m.head_size(), m.width, m.context, m.vocabulary);
  console_.say("device    {}, {} rank{}, {} a rank", ops.device_name(), ranks, ranks == 1 ? "" : "s", format_bytes(planned_bytes()));
  if (config_.parallel.sequence > 1) {
    const auto most = comm_.max(state_->batch.shape()[1]), least = -comm_.max(-state_->batch.shape()[1]);
    console_.say("sequence  {} ranks share each: exchange {}, {} tokens a rank", config_.parallel.sequence,
                 name_of(state_->model.options().sequence.exchange), most == least ? std::to_string(most) : fmt::format("{} to {}", least, most));
  }
  if (data_.synthetic)
    console_.say("data      {}: {} steps of {} sequences, made up as they are needed", write_synthetic(data_.synthetic).dump(), config_.train.steps,
                 sequences_per_step_);
  for (std::size_t i = 0; i < data_.parts.size(); ++i) {
    const DatasetInfo& part = data_.parts[i].data;
    const Sampler sampler(part.train.tokens, m.context, sequences_per_step_, config_.run.seed);
    const std::string share = data_.parts.size() == 1 ? "" : fmt::format(", {:.4g} % of the sequences", 100 * data_.share(i));
    console_.say("data      {}: {} training tokens ({}){}, {:.2f} passes in {} steps of {} tokens", part.directory, format_count(part.train.tokens),
                 part.tokenizer_name, share,
                 data_.share(i) * static_cast<double>(config_.train.steps * sequences_per_step_) / static_cast<double>(sampler.sequences()),
                 config_.train.steps, config_.train.tokens_per_step);
    if (evaluators_[i].batches() == 0) console_.say("note: {} has no validation split: nothing is evaluated on it", part.directory);
  }
  console_.say("run       {}, {}", folder_.directory,
               !start_.checkpoint.empty() ? fmt::format("going on after step {}", position_.step)
               : !init_.path.empty()      ? fmt::format("from the parameters of {}", init_.path)
                                          : std::string("from scratch"));
}

double Trainer::planned_bytes() const {
  return static_cast<double>(state_->plan.total_bytes() + library_bytes(device_->ops().kind()) +
                             connection_bytes(config_, comm_.size(), state_->model.options().sequence.exchange));
}

void Trainer::run() {
  began_ = step_began_ = Clock::now();
  if (position_.step >= config_.train.steps) {
    console_.say("step {} of {} is done already: nothing to do. More: --set train.steps=N", position_.step, config_.train.steps);
    return;
  }
  while (position_.step < config_.train.steps) {
    const std::int64_t t = position_.step + 1;
    const bool last = t == config_.train.steps;
    const StepReport report = step(t);
    position_.step = t;
    position_.tokens += config_.train.tokens_per_step;
    position_.updates += report.skipped ? 0 : 1;
    position_.skipped += report.skipped ? 1 : 0;
    position_.nonfinite_in_a_row = report.skipped ? position_.nonfinite_in_a_row + 1 : 0;
    if (!report.skipped) proven_ = saved_;
    const AttentionCounts counts(config_.model, counters_, sequences_per_step_, config_.model.context);

    Json extra = Json::object();
    const bool evaluates = (last || due(config_.eval.every, t)) && can_evaluate(), samples = due(config_.sample.every, t);
    if (evaluates) evaluate(report.seconds, extra);
    log(t, report, counts, std::move(extra));
    if (position_.nonfinite_in_a_row >= config_.train.max_nonfinite) {
      agree(comm_, [&] {
        if (comm_.rank() == 0) throw std::runtime_error(nonfinite_message());
      });
    }
    if (samples) sample(t);
    const bool stop = comm_.max(signals_.requested() ? 1 : 0) != 0;
    // A skipped step changed nothing that would be worth a checkpoint.
    const bool saves = last || stop || (due(config_.checkpoint.every, t) && !report.skipped);
    if (saves) save();
    if (evaluates || samples || saves) restart_clock();
    if (stop && !last) {
      console_.say("stopped{}{} after step {}. Continue: tessera train {} --resume", *signals_.name() ? " by " : "", signals_.name(), t,
                   folder_.config());
      return;
    }
  }
  console_.say("done: {} steps, {} tokens in {}{}. Checkpoint: {}/{}", config_.train.steps, format_count(static_cast<double>(position_.tokens)),
               format_duration(seconds_since(began_)), position_.skipped ? fmt::format(", {} steps skipped", position_.skipped) : "",
               folder_.checkpoints(), checkpoint_name(saved_));
  if (const double used = static_cast<double>(device_memory_used(device_->ops())); used > 0)
    console_.say("memory: {} in use on the device, {} planned", format_bytes(used), format_bytes(planned_bytes()));
}

std::string Trainer::nonfinite_message() const {
  const auto path = [&](std::int64_t step) { return folder_.checkpoints() + "/" + checkpoint_name(step); };
  const bool good = proven_ >= 0 && std::filesystem::exists(path(proven_));
  return fmt::format(
      "{} steps in a row, up to step {}, had a loss or gradient that is not finite. {}{}. A smaller optimizer.lr or a "
      "longer optimizer.warmup, in another run.dir, may help",
      position_.nonfinite_in_a_row, position_.step, good ? "The last good checkpoint is " + path(proven_) : "There is no good checkpoint",
      saved_ > proven_ ? fmt::format(" ({} is newer, and no step after it was good)", path(saved_)) : "");
}

/// What is not a step does not count as one.
void Trainer::restart_clock() {
  device_->ops().synchronize();
  step_began_ = Clock::now();
}

StepReport Trainer::step(std::int64_t t) {
  StepReport report;
  // The loss is the sum over all target tokens of all ranks divided by their number, once: so the number must be known before the backward pass.
  std::uint64_t targets = 0;
  for (HostBatch& batch : micro_batches_) {
    batch = loader_->next();
    targets += batch.target_tokens;
  }
  report.data_wait = loader_->take_wait_seconds();
  all_reduce_sum(comm_, {&targets, 1});
  const double scale = 1.0 / static_cast<double>(std::max<std::uint64_t>(1, targets));

  step_->begin();
  fault_.strike(t);
  if (fault_.due(FaultInjector::Kind::nan, t)) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    device_->ops().upload(state_->model.gradients().slice(0, 1), &nan);  // what is added to it stays so
  }
  const std::uint64_t sent_before = device_->comm().sent_bytes();
  TrainStep::Sums sums = step_->gradients(micro_batches_, static_cast<float>(scale));
  if (config_.parallel.sequence > 1) {
    report.exchanged = device_->comm().sent_bytes() - sent_before;
    all_reduce_sum(comm_, {&report.exchanged, 1});
  }
  report.loss = sums.loss * scale;
  report.grad_norm = sums.grad_norm;
  report.lr = learning_rate(config_.optimizer, config_.train.steps, t);
  report.skipped = !std::isfinite(report.loss) || !std::isfinite(report.grad_norm);
  counters_ = std::move(sums.counters);
  // From here on the device may still be at work when the host has gone on, to logging and to the next batches.
  if (!report.skipped) {
    const OptimizerConfig& o = config_.optimizer;
    step_->update({report.lr, o.beta1, o.beta2, o.eps, o.weight_decay, o.clip, position_.updates + 1});
    const AttentionConfig& a = config_.model.attention;
    if (a.gate != Gate::softmax && a.threshold.mode == ThresholdMode::controlled)
      control_thresholds(state_->model, device_->ops(), AttentionCounts(config_.model, counters_, sequences_per_step_, config_.model.context), t,
                         config_.train.steps);
  }
  // So a step's time is from one such point to the next.
  const Clock::time_point now = Clock::now();
  report.seconds = std::chrono::duration<double>(now - step_began_).count();
  step_began_ = now;
  return report;
}

void Trainer::evaluate(double step_seconds, Json& row) {
  state_->optimizer.await_all();
  // Before the evaluation takes the activations' memory. The micro-batches of a step are alike.
  const double attention = state_->model.attention_seconds(state_->batch.upload(device_->ops(), micro_batches_.back()));
  row["attention_share"] = std::min(1.0, attention * static_cast<double>(micro_batches_.size()) / step_seconds);
  std::vector<Evaluation> parts(evaluators_.size());
  for (std::size_t i = 0; i < evaluators_.size(); ++i)
    if (evaluators_[i].batches() > 0)
      parts[i] = evaluators_[i].run(state_->model, device_->ops(), comm_, ranks_, state_->batch, config_.eval.batches);
  const EvaluationRecord record = evaluation_record(data_, parts);
  row.update(record.row);
  for (const std::string& line : record.lines) console_.say("step {}/{}  {}", position_.step, config_.train.steps, line);
}

void Trainer::log(std::int64_t t, const StepReport& r, const AttentionCounts& counts, Json extra) {
  const bool heads_in_row = due(config_.log.heads_every, t);
  const bool heads_in_events =
      config_.tensorboard.enabled && (t == config_.train.steps || due(config_.eval.every, t) || due(config_.tensorboard.histogram_every, t));
  const bool heads = heads_in_row || heads_in_events;
  if (heads) state_->optimizer.await_all();  // learned ones may still be on their way from the ranks that own them
  if (comm_.rank() != 0) return;
  Json row = step_row(config_, r, counts, position_, state_->model.flops_per_token(), peak_flops_);
  if (t == first_step_ + 1) {
    row["planned_bytes"] = planned_bytes();
    if (const std::size_t used = device_memory_used(device_->ops()); used > 0) row["memory_bytes"] = used;
  }
  EventFile::Heads events;
  if (heads) events.values = head_values(state_->model, device_->ops(), counts);
  if (heads_in_row) row.update(events.values);
  row.update(extra);
  metrics_->append(row);
  if (heads_in_events)
    for (int l = 0; l < config_.model.layers; ++l) events.layers.push_back(counts.layer(l));
  if (events_) events_->append(row, heads_in_events ? &events : nullptr);

  const std::int64_t done = t - first_step_;
  const double eta = seconds_since(began_) / static_cast<double>(done) * static_cast<double>(config_.train.steps - t);
  console_.progress(step_line(row, config_.train.steps, eta), r.skipped || t == config_.train.steps || due(config_.log.every, t));
}

void Trainer::sample(std::int64_t t) {
  state_->optimizer.await_all();
  if (comm_.rank() != 0) return;
  GenerateOptions o;
  o.tokens = config_.sample.tokens;
  o.temperature = config_.sample.temperature;
  o.top_k = config_.sample.top_k;
  o.seed = config_.run.seed;
  std::string text = config_.sample.prompt;
  for (const std::uint32_t token : generate(state_->model, *tokenizer_, config_.sample.prompt, o)) tokenizer_->decode(token, text);
  write_file(folder_.sample(t), text + "\n");
}

void Trainer::save() {
  if (saved_ == position_.step) return;
  const Clock::time_point start = Clock::now();
  agree(comm_, [&] {
    if (metrics_) metrics_->sync();  // a checkpoint's metrics must not be lost when the checkpoint is not
    if (events_) events_->sync();
  });
  CheckpointRequest request;
  request.checkpoints = folder_.checkpoints();
  request.position = position_;
  request.config = to_yaml(config_);
  request.dataset = provenance_of(data_);
  request.init = init_;
  request.tokenizer = tokenizer_file_;
  // What a run of bad steps leaves must not push out the checkpoints from before it.
  request.keep = position_.nonfinite_in_a_row > 0 ? 0 : config_.checkpoint.keep;
  request.between_files = [&] { fault_.strike_saving(position_.step); };
  const std::string folder = save_checkpoint(request, state_->model, state_->optimizer, device_->ops(), comm_);
  saved_ = position_.step;
  console_.say("step {}/{}  checkpoint {} ({:.1f} s)", position_.step, config_.train.steps, folder, seconds_since(start));
}

}  // namespace

void train(const Config& config, bool resume, Communicator& comm) { Trainer(config, resume, comm).run(); }

}  // namespace tessera
