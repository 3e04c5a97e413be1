// tessera bench step: training steps (forward, backward, optimizer) on made-up tokens, beside what the device can do at best in the same run.

#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>

#include "trainer/commands/bench.h"
#include "trainer/config.h"
#include "trainer/device.h"
#include "trainer/metrics.h"
#include "trainer/statistics.h"
#include "trainer/step.h"
#include "trainer/train_state.h"

#ifdef TESSERA_HAS_CUDA
#include <cuda_profiler_api.h>
#endif

namespace tessera {
namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

struct Options : BenchOptions {
  std::string file;
  std::vector<std::string> sets;
  int steps = 0;
  bool profile = false, no_graph = false;
};

/// Tokens without meaning: the work of a step depends on them only through the attention's sparsity.
HostBatch synthetic_batch(const Config& c, std::uint64_t number) {
  HostBatch b;
  b.batch = c.train.micro_batch;
  b.tokens = c.model.context;
  std::mt19937_64 random(c.run.seed + number);
  const auto vocabulary = static_cast<std::uint64_t>(c.model.vocabulary);
  for (std::int64_t i = 0; i < b.batch * b.tokens; ++i) {
    b.token.push_back(static_cast<std::int32_t>(random() % vocabulary));
    b.target.push_back(static_cast<std::int32_t>(random() % vocabulary));
    b.position.push_back(static_cast<std::int32_t>(i % b.tokens));
    b.document_start.push_back(0);
  }
  b.target_tokens = static_cast<std::uint64_t>(b.batch * b.tokens);
  return b;
}

/// A training state and its steps, all on the device.
struct Problem {
  Problem(const Config& config, Ops& device, bool records)
      : c(config), ops(device), comm(make_single_communicator()), state(c, ops, 0, 1), step(state, ops, *comm, records) {
    state.plan.allocate(ops);
    state.bind(ops, *comm);
    state.initialize(c.run.seed);
    batches.push_back(synthetic_batch(c, 0));
  }

  std::int64_t micro_batches() const { return c.train.tokens_per_step / tokens(); }
  std::int64_t tokens() const { return c.train.micro_batch * c.model.context; }  // of a micro-batch
  float scale() const { return 1.0f / static_cast<float>(c.train.tokens_per_step); }

  /// As a run does it, but for the thresholds, which stay, and the learning rate of 0: what is measured must not depend on how long it has run.
  TrainStep::Sums whole_step() {
    step.begin();
    TrainStep::Sums sums = step.gradients(batches, scale());
    update();
    return sums;
  }
  void update() { step.update({.lr = 0, .clip = c.optimizer.clip, .update = 1}); }

  const Config& c;
  Ops& ops;
  std::unique_ptr<Communicator> comm;
  TrainState state;
  TrainStep step;
  std::vector<HostBatch> batches;
};

/// Median milliseconds of whole steps, one after another: at least `least`, until `seconds` have passed. The host waits once a step, for loss and
/// norm.
double whole_step_ms(Problem& p, int least, double seconds, int& measured) {
  while (static_cast<std::int64_t>(p.batches.size()) < p.micro_batches()) p.batches.push_back(synthetic_batch(p.c, p.batches.size()));
  for (int n = 0; n < 3; ++n) p.whole_step();  // kernels are chosen, then the work is recorded
  p.ops.synchronize();
  std::vector<double> times;
  const auto start = Clock::now();
  for (auto last = start; static_cast<int>(times.size()) < least || std::chrono::duration<double>(last - start).count() < seconds;) {
    p.whole_step();
    const auto now = Clock::now();
    times.push_back(std::chrono::duration<double, std::milli>(now - last).count());
    last = now;
  }
  p.ops.synchronize();
  measured = static_cast<int>(times.size());
  return median(std::move(times)).value();
}

Json measure(const Options& o, const Config& c, Ops& ops) {
  Problem p(c, ops, !o.no_graph);
  const Batch batch = p.state.batch.upload(ops, p.batches[0]);
  const auto micro_batch = [&] { p.state.model.forward_backward(batch, p.scale()); };
  p.state.model.zero_counters();
  micro_batch();
  std::vector<std::uint64_t> counters(static_cast<std::size_t>(p.state.model.counters().numel()));
  ops.download(counters.data(), p.state.model.counters());
  const AttentionShares shares = AttentionCounts(c.model, counters, c.train.micro_batch, c.model.context).all();

  const double seconds = o.steps > 0 ? std::min(1.0, o.seconds) : o.seconds;
  const double forward_ms = time_ms(ops, seconds, [&] { p.state.model.forward(batch); });
  const auto recorded = o.no_graph ? nullptr : ops.record(micro_batch);  // as a run does it, where the device records
  const double micro_batch_ms = time_ms(ops, seconds, [&] { recorded ? recorded->replay() : micro_batch(); });
  p.whole_step();
  const double update_ms = time_ms(ops, seconds, [&] {
    p.step.begin();
    p.state.optimizer.reduce(p.state.plan[p.state.sums]);
    p.update();
  });
  int steps = 0;
  const double composed_ms = static_cast<double>(p.micro_batches()) * micro_batch_ms + update_ms;
  const double step_ms = o.steps > 0 ? whole_step_ms(p, o.steps, o.seconds, steps) : composed_ms;

  const double tokens_per_s = static_cast<double>(c.train.tokens_per_step) / step_ms * 1e3;
  const Gpt::Flops flops = p.state.model.flops_per_token();
  const double useful = tokens_per_s * (flops.dense + flops.attention_causal * (1 - shares.tile_skip_rate)),
               dense = tokens_per_s * (flops.dense + flops.attention_causal),
               peak = c.run.peak_tflops > 0 ? c.run.peak_tflops * 1e12 : ops.peak_flops();
  const std::size_t libraries = library_bytes(ops.kind());
  Json bytes = Json::object();
  for (int n = 0; n < kMemoryCategories; ++n) bytes[name_of(static_cast<MemoryCategory>(n))] = p.state.plan.bytes(static_cast<MemoryCategory>(n));
  if (libraries > 0) bytes["device libraries"] = libraries;
  Json r = {{"device", ops.device_name()},
            {"type", name_of(compute_type(ops.kind()))},
            {"timing", timing_of(ops)},
            {"parameters", p.state.model.layout().count},
            {"vocabulary", c.model.vocabulary},
            {"context", c.model.context},
            {"tokens_per_step", c.train.tokens_per_step},
            {"micro_batch_tokens", p.tokens()},
            {"micro_batches", p.micro_batches()},
            {"forward_ms", forward_ms},
            {"micro_batch_ms", micro_batch_ms},
            {"recorded", recorded != nullptr},  // a micro-batch's work, and replayed
            {"update_ms", update_ms},
            {"step_ms", step_ms},
            {"steps_measured", steps},  // 0: step_ms is the sum of its parts
            {"tokens_per_s", tokens_per_s},
            {"gflops", useful / 1e9},
            {"gflops_dense_equivalent", dense / 1e9},
            {"edge_sparsity", shares.edge_sparsity},
            {"tile_skip_rate", shares.tile_skip_rate},
            {"tile", {c.model.attention.tile_query, c.model.attention.tile_key}},
            {"planned_bytes", p.state.plan.total_bytes() + libraries},
            {"planned_bytes_by_category", bytes}};
  if (peak > 0) {
    r["mfu"] = useful / peak;
    r["mfu_dense_equivalent"] = dense / peak;
  }
  if (const std::size_t used = device_memory_used(ops); used > 0) r["used_bytes"] = used;
  return r;
}

void print(const Json& r) {
  const auto number = [&](const char* key) { return r[key].get<double>(); };
  const auto integer = [&](const char* key) { return r[key].get<std::int64_t>(); };
  fmt::print("device           {}\n", r["device"].get<std::string>());
  fmt::print("parameters       {}, vocabulary {}, context {}\n", integer("parameters"), integer("vocabulary"), integer("context"));
  fmt::print("memory           {:.2f} GiB planned{}\n", number("planned_bytes") / (1 << 30),
             r.contains("used_bytes") ? fmt::format(", {:.2f} GiB in use on the device, by all processes", number("used_bytes") / (1 << 30)) : "");
  fmt::print("step             {:.1f} ms for {} tokens, {}\n", number("step_ms"), integer("tokens_per_step"),
             integer("steps_measured") > 0 ? fmt::format("median of {} whole steps", integer("steps_measured")) : "from its parts:");
  fmt::print("  micro-batch    {:.2f} ms for {} tokens ({} a step{}): forward {:.2f} ms, the rest backward\n", number("micro_batch_ms"),
             integer("micro_batch_tokens"), integer("micro_batches"), r["recorded"].get<bool>() ? ", as a CUDA graph" : "", number("forward_ms"));
  fmt::print("  update         {:.2f} ms\n", number("update_ms"));
  fmt::print("speed            {:.0f} tokens/s\n", number("tokens_per_s"));
  if (r.contains("mfu"))
    fmt::print("MFU              {:.1f} % useful, {:.1f} % dense-equivalent\n", 100 * number("mfu"), 100 * number("mfu_dense_equivalent"));
  fmt::print("useful work      {:.1f} GFLOP/s (dense-equivalent {:.1f}), {:.0f} % of a large product's rate\n", number("gflops"),
             number("gflops_dense_equivalent"), 100 * number("share_of_gemm"));
  fmt::print("speed of light   {}\n", r["speed_of_light"].get<std::string>());
  fmt::print("attention        edge sparsity {:.4f}, tile skip rate {:.4f} ({} x {}; untrained model, made-up tokens)\n", number("edge_sparsity"),
             number("tile_skip_rate"), r["tile"][0].get<int>(), r["tile"][1].get<int>());
}

/// One micro-batch and one update between cudaProfilerStart and cudaProfilerStop, with everything chosen and grown before.
void profile(const Config& c, Ops& ops) {
  if (ops.kind() != DeviceKind::cuda) throw ConfigError("--profile marks a step for a GPU profiler: expected --device cuda");
#ifdef TESSERA_HAS_CUDA
  Problem p(c, ops, false);
  const Batch batch = p.state.batch.upload(ops, p.batches[0]);
  const auto step = [&] {  // call by call: profilers tell less of recorded work
    p.step.begin();
    p.state.model.forward_backward(batch, p.scale());
    p.state.optimizer.reduce(p.state.plan[p.state.sums]);
    p.update();
    ops.synchronize();
  };
  step();
  cudaProfilerStart();
  step();
  cudaProfilerStop();
  fmt::print("{}: one micro-batch of {} tokens and one update, between cudaProfilerStart and cudaProfilerStop\n", ops.device_name(), p.tokens());
#else
  (void)c;
#endif
}

void run(const Options& o) {
  std::vector<std::string> sets = o.sets;
  if (!o.device.empty()) sets.push_back("device=" + o.device);
  sets.push_back("parallel.sequence=1");  // one process: whole sequences
  Config c = load_config(o.file, sets);
  resolve_vocabulary(c, vocabulary_for_bench(c), "tessera bench step");
  check_ranks(c, 1);
  const auto ops = make_ops(c.device, o.threads);
  if (o.profile) return profile(c, *ops);
  Json result = measure(o, c, *ops);
  const SpeedOfLight light = measure_speed_of_light(*ops, std::min(1.0, o.seconds));  // now that the model's memory is free
  result["gemm_gflops"] = light.gemm_gflops;
  result["share_of_gemm"] = result["gflops"].get<double>() / light.gemm_gflops;
  result["copy_gbytes"] = light.copy_gbytes;
  result["speed_of_light"] = text_of(light, *ops);
  if (o.json) {
    std::cout << result.dump(2) << "\n";
  } else {
    print(result);
  }
}

}  // namespace

void add_bench_step(CLI::App& bench) {
  auto o = std::make_shared<Options>();
  o->device = "";
  o->sets = {"model.layers=4", "model.heads=4", "model.width=256", "model.context=512", "train.micro_batch=4", "train.tokens_per_step=8192"};
  CLI::App* command = bench.add_subcommand("step", "Training steps on made-up tokens: speed, memory, and the device's limits");
  command->add_option("--config", o->file, "YAML configuration (default: 4 layers of width 256, context 512, 8192 tokens a step)")->type_name("FILE");
  command->add_option("--set", "Set a key, after the file; the last one counts")->type_name("KEY=VALUE")->expected(1)->take_all();
  command
      ->add_option(
          "--steps", o->steps,
          "Time whole steps: at least so many, until --seconds have passed (each part then takes at most a second). 0: a step is the sum of its "
          "parts")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  command->add_flag("--no-graph", o->no_graph,
                    "Call a micro-batch's kernels one by one, where a run records them on a GPU as a CUDA graph and replays it");
  command->add_flag("--profile", o->profile, "One micro-batch and one update, marked for ncu or nsys (tests/bench/profile_step.py); no timing");
  o->add_to(*command);
  command->get_option("--device")->description("Not given: as the configuration says")->default_str("");
  command->footer(
      "An untrained model has about half of its edges active and computes every tile; --set attention.threshold.init=4 leaves few.\n"
      "Examples:\n"
      "  tessera bench step --config configs/quickstart.yaml --set attention.threshold.init=4 --json\n"
      "  tessera bench step --config configs/gpt2-medium-sparse.yaml --set train.micro_batch=32 --steps 4 --seconds 10");
  command->callback([o, command] {
    if (!o->file.empty()) o->sets.clear();
    const auto sets = command->get_option("--set")->results();
    o->sets.insert(o->sets.end(), sets.begin(), sets.end());
    run(*o);
  });
}

}  // namespace tessera
