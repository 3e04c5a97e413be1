// tessera bench step: whole training steps (forward, backward, optimizer) on made-up tokens, beside the speed of a large matrix product.

#include <fmt/core.h>

#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>

#include "trainer/commands/bench.h"
#include "trainer/config.h"
#include "trainer/metrics.h"
#include "trainer/train_state.h"

namespace tessera {
namespace {

using Json = nlohmann::ordered_json;

struct Options : BenchOptions {
  std::string file;
  std::vector<std::string> sets;
};

/// Tokens without meaning: the work of a step depends on them only through the attention's sparsity.
HostBatch synthetic_batch(const Config& c) {
  HostBatch b;
  b.batch = c.train.micro_batch;
  b.tokens = c.model.context;
  std::mt19937_64 random(c.run.seed);
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

Json measure(const Options& o) {
  Config c = load_config(o.file, o.sets);
  resolve_vocabulary(c, c.model.vocabulary > 0 ? c.model.vocabulary : 4096, "tessera bench step");
  const auto ops = o.make_ops();
  const auto comm = make_single_communicator();
  TrainState state(c, *ops, 0, 1);
  state.plan.allocate(*ops);
  state.model.bind();
  state.model.initialize(c.run.seed);
  const Batch batch = state.batch.upload(*ops, synthetic_batch(c));
  const std::int64_t tokens = c.train.micro_batch * c.model.context;
  const auto forward_backward = [&] {
    state.model.zero_counters();
    state.model.forward_backward(batch, 1.0f / static_cast<float>(tokens));
    ops->synchronize();
  };
  const auto update = [&] {
    state.optimizer.reduce(*ops, *comm, state.model.gradients());
    // No learning rate: the measurement must not depend on how long it has run.
    state.optimizer.apply(*ops, *comm, state.model.parameters(), state.model.gradients(), {.lr = 0, .update = 1});
    state.model.zero_gradients();
    ops->synchronize();
  };
  const double micro_batch_ms = best_ms(o.seconds, forward_backward);
  std::vector<std::uint64_t> counters(static_cast<std::size_t>(state.model.counters().numel()));
  ops->download(counters.data(), state.model.counters());
  const AttentionShares shares = AttentionCounts(c.model, counters, c.train.micro_batch, c.model.context).all();
  const double update_ms = best_ms(o.seconds, update);
  const double gemm = measure_sgemm_gflops(*ops, o.seconds);

  const std::int64_t micro_batches = c.train.tokens_per_step / tokens;
  const double step_ms = static_cast<double>(micro_batches) * micro_batch_ms + update_ms;
  const double tokens_per_s = static_cast<double>(c.train.tokens_per_step) / step_ms * 1e3;
  const Gpt::Flops flops = state.model.flops_per_token();
  const double useful = tokens_per_s * (flops.dense + flops.attention_causal * (1 - shares.tile_skip_rate)) / 1e9;
  return {{"device", ops->device_name()},
          {"parameters", state.model.layout().count},
          {"tokens_per_step", c.train.tokens_per_step},
          {"micro_batch_tokens", tokens},
          {"micro_batch_ms", micro_batch_ms},
          {"update_ms", update_ms},
          {"step_ms", step_ms},
          {"tokens_per_s", tokens_per_s},
          {"gflops", useful},
          {"gflops_dense_equivalent", tokens_per_s * (flops.dense + flops.attention_causal) / 1e9},
          {"sgemm_gflops", gemm},
          {"share_of_sgemm", useful / gemm},
          {"edge_sparsity", shares.edge_sparsity},
          {"tile_skip_rate", shares.tile_skip_rate},
          {"bytes", state.plan.total_bytes()}};
}

void print(const Json& r) {
  const auto number = [&](const char* key) { return r[key].get<double>(); };
  fmt::print("device           {}\n", r["device"].get<std::string>());
  fmt::print("parameters       {}, {} bytes of memory\n", r["parameters"].get<std::int64_t>(), r["bytes"].get<std::int64_t>());
  fmt::print("step             {:.1f} ms for {} tokens: micro-batches of {} tokens at {:.1f} ms, update {:.1f} ms\n", number("step_ms"),
             r["tokens_per_step"].get<std::int64_t>(), r["micro_batch_tokens"].get<std::int64_t>(), number("micro_batch_ms"), number("update_ms"));
  fmt::print("speed            {:.0f} tokens/s\n", number("tokens_per_s"));
  fmt::print("useful work      {:.1f} GFLOP/s, {:.0f} % of a large sgemm's {:.1f} GFLOP/s (dense-equivalent {:.1f})\n", number("gflops"),
             100 * number("share_of_sgemm"), number("sgemm_gflops"), number("gflops_dense_equivalent"));
  fmt::print("attention        edge sparsity {:.4f}, tile skip rate {:.4f} (untrained model, made-up tokens)\n", number("edge_sparsity"),
             number("tile_skip_rate"));
}

}  // namespace

void add_bench_step(CLI::App& bench) {
  auto o = std::make_shared<Options>();
  o->sets = {"model.layers=4", "model.heads=4", "model.width=256", "model.context=512", "train.micro_batch=4", "train.tokens_per_step=8192"};
  CLI::App* command = bench.add_subcommand("step", "Whole training steps on made-up tokens");
  command->add_option("--config", o->file, "YAML configuration (default: 4 layers of width 256, context 512, 4096 tokens)")->type_name("FILE");
  command->add_option("--set", "Set a key, after the file; the last one counts")->type_name("KEY=VALUE")->expected(1)->take_all();
  o->add_to(*command);
  command->footer(
      "Example:\n"
      "  tessera bench step --config configs/quickstart.yaml --set attention.threshold.init=4 --json");
  command->callback([o, command] {
    if (!o->file.empty()) o->sets.clear();
    const auto sets = command->get_option("--set")->results();
    o->sets.insert(o->sets.end(), sets.begin(), sets.end());
    const Json result = measure(*o);
    if (o->json) {
      std::cout << result.dump(2) << "\n";
    } else {
      print(result);
    }
  });
}

}  // namespace tessera
