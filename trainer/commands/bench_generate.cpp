// tessera bench generate: decoding with cached keys and values beside recomputing the whole text, and beside what reading weights and cache once
// takes.

#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <iostream>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>

#include "trainer/commands/bench.h"
#include "trainer/commands/commands.h"
#include "trainer/config.h"
#include "trainer/device.h"

namespace tessera {
namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

struct Options : BenchOptions {
  std::string file;
  std::int64_t prompt = 256, tokens = 32, batch = 1;
  bool fast = false;
};

/// GB/s that all threads together read from memory; of a GPU, that a copy reads and writes.
double memory_gbytes(Ops& ops, double seconds) {
  if (ops.kind() != DeviceKind::cpu) return measure_speed_of_light(ops, seconds).copy_gbytes;
  constexpr std::int64_t kPiece = 1 << 16, kPieces = 1 << 10, kSums = 32;  // 256 MiB: more than caches hold; sums enough to hide the adds' latency
  const std::vector<float> values(kPiece * kPieces, 1.0f);
  double total = 0;
  const double ms = best_ms(seconds, [&] {
#pragma omp parallel for schedule(static) reduction(+ : total)
    for (std::int64_t piece = 0; piece < kPieces; ++piece) {
      const float* from = values.data() + piece * kPiece;
      float sums[kSums] = {};
      for (std::int64_t i = 0; i < kPiece; i += kSums)
#pragma omp simd
        for (std::int64_t l = 0; l < kSums; ++l) sums[l] += from[i + l];
      for (const float s : sums) total += s;
    }
  });
  if (total == 0) throw std::logic_error("bench generate: nothing was read");  // the sum is used, so it is computed
  return static_cast<double>(values.size() * sizeof(float)) / ms * 1e-6;
}

/// Bytes of keys and values that one token at `position` sees, over all layers and heads.
double cache_bytes(const ModelConfig& m, std::int64_t position, DType type) {
  double keys = 0;
  for (int l = 0; l < m.layers; ++l)
    for (int h = 0; h < m.heads; ++h)
      for (std::int64_t j = 0; j <= position; ++j) keys += m.attention.pattern.visible(l, h, position, j);
  return keys * 2 * static_cast<double>(m.head_size()) * static_cast<double>(size_of(type));
}

Json measure(const Options& o, const Config& c, Ops& ops) {
  const ModelConfig& m = c.model;
  if (o.prompt + o.tokens > m.context)
    throw ConfigError(fmt::format("--prompt {} and --tokens {} are more than model.context, {}", o.prompt, o.tokens, m.context));
  MemoryPlan plan;
  Gpt model(m, ops, plan, {.micro_batch = 1, .tokens = o.prompt + o.tokens, .training = false, .cache = o.batch});
  plan.allocate(ops);
  model.bind();
  model.initialize(c.run.seed);

  std::mt19937_64 random(c.run.seed);
  std::vector<std::int32_t> text;
  for (std::int64_t t = 0; t < o.prompt + o.tokens; ++t)
    text.push_back(static_cast<std::int32_t>(random() % static_cast<std::uint64_t>(m.vocabulary)));
  const std::span<const std::int32_t> all(text), prompt = all.first(static_cast<std::size_t>(o.prompt));
  const std::int64_t middle = o.prompt + o.tokens / 2;  // where a token is as dear as in the mean

  const double prefill_ms = best_ms(o.seconds, [&] { model.prefill(0, prompt); });
  double decode_ms = std::numeric_limits<double>::infinity();  // of a step: one token of each sequence
  const auto start = Clock::now();
  for (int runs = 0; runs < 3 || std::chrono::duration<double>(Clock::now() - start).count() < 4 * o.seconds; ++runs) {
    for (std::int64_t s = 0; s < o.batch; ++s) model.prefill(s, prompt);
    const auto before = Clock::now();
    for (std::int64_t t = o.prompt; t < o.prompt + o.tokens; ++t) {
      std::vector<Gpt::NextToken> next;
      for (std::int64_t s = 0; s < o.batch; ++s) next.push_back({s, text[static_cast<std::size_t>(t)]});
      model.decode(next);
    }
    decode_ms = std::min(decode_ms, std::chrono::duration<double, std::milli>(Clock::now() - before).count() / static_cast<double>(o.tokens));
  }
  const double recompute_ms = best_ms(o.seconds, [&] { model.next_logits(all.first(static_cast<std::size_t>(middle))); });

  const DType type = compute_type(ops.kind());
  const auto element = static_cast<std::int64_t>(size_of(type));
  // Every parameter once a step: the tied embedding as the classifier. Of learned positions only a row.
  const std::int64_t learned = m.positions == Positions::learned ? m.context * m.width : 0;
  const double weights = static_cast<double>((model.layout().count - learned) * element), cache = cache_bytes(m, middle, type);
  const double gbytes = memory_gbytes(ops, o.seconds), bytes = weights + static_cast<double>(o.batch) * cache;
  const double decode_rate = static_cast<double>(o.batch) / decode_ms * 1e3, light = static_cast<double>(o.batch) / bytes * gbytes * 1e9;
  return {{"device", ops.device_name()},
          {"type", name_of(type)},
          {"timing", timing_of(ops)},
          {"parameters", model.layout().count},
          {"prompt_tokens", o.prompt},
          {"tokens", o.tokens},
          {"batch", o.batch},
          {"batch_invariant", ops.kind() != DeviceKind::cpu && !o.fast},
          {"prefill_tokens_per_s", static_cast<double>(o.prompt) / prefill_ms * 1e3},
          {"decode_ms", decode_ms},
          {"decode_tokens_per_s", decode_rate},
          {"recompute_tokens_per_s", 1e3 / recompute_ms},
          {"speedup", decode_rate * recompute_ms * 1e-3},
          {"weight_bytes", weights},
          {"cache_bytes_per_sequence", cache},
          {"planned_bytes", plan.total_bytes()},
          {"memory_gbytes", gbytes},
          {"speed_of_light_tokens_per_s", light},
          {"share_of_light", decode_rate / light}};
}

void print(const Json& r) {
  const auto number = [&](const char* key) { return r[key].get<double>(); };
  fmt::print("{}: {:.1f} M parameters, untrained; prompt {} tokens, {} more, {} at once{} ({})\n\n", r["device"].get<std::string>(),
             number("parameters") * 1e-6, r["prompt_tokens"].get<std::int64_t>(), r["tokens"].get<std::int64_t>(), r["batch"].get<std::int64_t>(),
             r["batch_invariant"].get<bool>() ? ", a token as the whole text gives it" : "", r["timing"].get<std::string>());
  fmt::print("prefill          {:.1f} tokens/s\n", number("prefill_tokens_per_s"));
  fmt::print("decode           {:.2f} tokens/s, {:.2f} ms a step\n", number("decode_tokens_per_s"), number("decode_ms"));
  fmt::print("recomputation    {:.2f} tokens/s: the cache makes it {:.1f} x as fast\n", number("recompute_tokens_per_s"), number("speedup"));
  fmt::print("speed of light   {:.2f} tokens/s: {:.1f} MB of weights a step and {:.2f} MB of cache a text at {:.1f} GB/s as measured here\n",
             number("speed_of_light_tokens_per_s"), number("weight_bytes") * 1e-6, number("cache_bytes_per_sequence") * 1e-6,
             number("memory_gbytes"));
  fmt::print("                 decode reaches {:.0f} % of it\n", 100 * number("share_of_light"));
}

void run(const Options& o, std::vector<std::string> sets) {
  sets.push_back("device=" + o.device);
  Config c = load_config(o.file, sets);
  resolve_vocabulary(c, vocabulary_for_bench(c), "tessera bench generate");
  const auto ops = make_ops(c.device, o.threads, !o.fast);
  if (o.fast && ops->kind() == DeviceKind::cpu) fmt::print(stderr, "tessera: note: {}\n", kFastOnCpu);
  const Json r = measure(o, c, *ops);
  if (o.json) {
    std::cout << r.dump(2) << "\n";
  } else {
    print(r);
  }
}

}  // namespace

void add_bench_generate(CLI::App& bench) {
  auto o = std::make_shared<Options>();
  CLI::App* command = bench.add_subcommand("generate", "Tokens made a second, with cached keys and values and without, and the memory's limit");
  command->add_option("--config", o->file, "YAML configuration (default: 4 layers of width 256, context 512)")->type_name("FILE");
  command->add_option("--set", "Set a key, after the file; the last one counts")->type_name("KEY=VALUE")->expected(1)->take_all();
  const CLI::Range size(1, 1 << 24);
  command->add_option("--prompt", o->prompt, "Tokens of the prompt")->type_name("N")->check(size)->capture_default_str();
  command->add_option("--tokens", o->tokens, "Tokens made after it")->type_name("N")->check(size)->capture_default_str();
  command->add_option("--batch", o->batch, "Texts at once")->type_name("N")->check(CLI::Range(std::int64_t{1}, kFewRows))->capture_default_str();
  command->add_flag("--fast", o->fast,
                    "As tessera generate --fast: on a GPU, for speed rather than for the bits of the whole text's pass. No effect on the CPU");
  o->add_to(*command);
  command->footer(
      "Recomputation is timed at the length that the texts have in the middle of the run.\n"
      "Example:\n"
      "  tessera bench generate --config configs/gpt2-small-sparse.yaml --set attention.threshold.init=4 --prompt 512 --tokens 64 --batch 8");
  command->callback([o, command] {
    std::vector<std::string> sets;
    if (o->file.empty()) sets = {"model.layers=4", "model.heads=4", "model.width=256", "model.context=512"};
    for (const std::string& set : command->get_option("--set")->results()) sets.push_back(set);
    run(*o, sets);
  });
}

}  // namespace tessera
