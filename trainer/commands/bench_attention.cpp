// tessera bench attention: how the time of the attention follows the tiles that it computes.
//
// Inputs are made so that a chosen share of the tiles has active edges, by the data and not by the pattern: every query tile has one of D
// directions, every key tile a random set of `share x D` of them, and an edge is active where the query's direction is in the key's set.

#include <fmt/core.h>

#include <cmath>
#include <cstring>
#include <iostream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>

#include "trainer/commands/bench.h"
#include "trainer/commands/commands.h"
#include "trainer/schema.h"

namespace tessera {

namespace {

using Json = nlohmann::ordered_json;

struct AttentionBench : BenchOptions {
  std::int64_t tokens = 4096, heads = 8, head_size = 64, batch = 1;
  std::string gate = "relu2", score = "cosine", normalizer = "sum", pattern = "causal", tile = "64";
  double active_share = 0.1;
};

/// The options as keys, each with its own name where it is wrong.
AttentionConfig configuration(const AttentionBench& o) {
  const auto cross = o.tile.find('x');
  const std::string query = o.tile.substr(0, cross), key = cross == std::string::npos ? query : o.tile.substr(cross + 1);
  const std::pair<const char*, std::string> assignments[] = {{"--tokens", fmt::format("model.context={}", o.tokens)},
                                                             {"--tokens", "train.micro_batch=1"},
                                                             {"--tokens", fmt::format("train.tokens_per_step={}", o.tokens)},
                                                             {"--device", "device=" + o.device},
                                                             {"--head-size", "model.heads=1"},
                                                             {"--head-size", fmt::format("model.width={}", o.head_size)},
                                                             {"--gate", "attention.gate=" + o.gate},
                                                             {"--score", "attention.score=" + o.score},
                                                             {"--normalizer", "attention.normalizer=" + o.normalizer},
                                                             {"--pattern", "attention.pattern=" + o.pattern},
                                                             {"--tile", "attention.tile.query=" + query},
                                                             {"--tile", "attention.tile.key=" + key},
                                                             {"--gate", "attention.threshold.mode=fixed"}};
  Problems problems("the options");
  std::vector<Value> values;
  for (const auto& [option, assignment] : assignments) {
    if (const auto value = read_set(assignment, problems, option)) values.push_back(*value);
  }
  problems.throw_if_any();
  return load_variant("", values).model.attention;
}

/// One problem on the device, and the calls on it.
struct Problem {
  Problem(Ops& ops, const AttentionBench& o, const AttentionConfig& config);

  Ops& ops;
  BenchMemory memory;
  std::unique_ptr<DeviceTiles> tiles;
  AttentionForward forward;
  AttentionBackward backward;

  std::vector<std::byte> bytes(const HeadsView& v) {
    const Tensor t{v.data, v.dtype, {forward.shape.batch * forward.shape.heads, forward.shape.tokens, forward.shape.head_size}};
    std::vector<std::byte> host(t.bytes());
    ops.download(host.data(), t);
    return host;
  }
};

Problem::Problem(Ops& device, const AttentionBench& o, const AttentionConfig& config) : ops(device), memory(device) {
  const std::int64_t B = o.batch, H = o.heads, T = o.tokens, D = o.head_size;
  const auto map = make_tile_map(config.pattern, 0, static_cast<int>(H), T, config.tile_query, config.tile_key);
  tiles = ops.upload_tiles(map);

  // A key tile's vector is the normalised sum of its `chosen` directions: 1 / sqrt(chosen) along each. Queries of a tile point along their
  // direction or against it, so that about half of the edges of an active tile are active.
  const auto chosen = std::clamp<std::int64_t>(std::llround(o.active_share * static_cast<double>(D)), 1, D);
  const double along = 1.0 / std::sqrt(static_cast<double>(chosen));
  const double length = config.score == Score::dot ? std::sqrt(static_cast<double>(D)) : 1.0;
  const double scale = config.score == Score::dot ? 1.0 / std::sqrt(static_cast<double>(D)) : config.scale_init;
  std::mt19937_64 rng(1);
  const auto noise = random_values(B * H * T * D, 4, true);
  const double noise_length = 0.1 * along / std::sqrt(static_cast<double>(D));
  std::vector<float> q(noise.size()), k(noise.size()), directions(D);
  std::vector<int> order(D);
  std::iota(order.begin(), order.end(), 0);
  // The GPU's kernels take vectors of unit length for the scores that are defined on those.
  const auto to_length = [&](float* vector) {
    double sum = 0;
    for (std::int64_t d = 0; d < D; ++d) sum += static_cast<double>(vector[d]) * static_cast<double>(vector[d]);
    const auto factor = static_cast<float>(length / std::sqrt(sum));
    for (std::int64_t d = 0; d < D; ++d) vector[d] *= factor;
  };
  std::int64_t direction = 0;
  for (std::int64_t head = 0; head < B * H; ++head)
    for (std::int64_t t = 0; t < T; ++t) {
      if (t % config.tile_query == 0) direction = static_cast<std::int64_t>(rng() % D);
      if (t % config.tile_key == 0) {
        std::shuffle(order.begin(), order.end(), rng);
        std::fill(directions.begin(), directions.end(), 0.0f);
        for (std::int64_t n = 0; n < chosen; ++n) directions[order[n]] = static_cast<float>(along);
      }
      const std::int64_t at = (head * T + t) * D, other = B * H * T * D - 1 - at;
      for (std::int64_t d = 0; d < D; ++d) {
        q[at + d] = static_cast<float>(noise_length) * noise[other - d];
        k[at + d] = directions[d] + static_cast<float>(noise_length) * noise[at + d];
      }
      q[at + direction] += rng() % 2 == 0 ? 1.0f : -1.0f;
      to_length(&q[at]);
      to_length(&k[at]);
    }
  const double top = scale * length * length * along;  // c s of an edge along a common direction
  const float tau = static_cast<float>(config.score == Score::fidelity ? 0.5 * along * along : 0.5 * top);

  const Shape all{B * H, T, D};
  const DType type = compute_type(ops.kind());
  const auto heads = [&](const Tensor& t) { return HeadsView{t.data, t.dtype, H * T * D, T * D, D}; };
  const std::int64_t query_tiles = map->query_tiles, words = bitmap_words(map->key_tiles);
  forward.shape = {B, H, T, D};
  forward.math = {
      .score = config.score, .gate = config.gate, .normalizer = config.normalizer, .length_alpha = config.length_alpha, .epsilon = config.epsilon};
  forward.tiles = tiles.get();
  forward.q = heads(memory.from(q, all, type));
  forward.k = heads(memory.from(k, all, type));
  forward.v = heads(memory.random(all, 2));
  forward.o = heads(memory.zeros(type, all));
  forward.scale = memory.from(std::vector<float>(H, static_cast<float>(scale)), {H});
  forward.threshold = memory.from(std::vector<float>(H, tau), {H});
  forward.z = memory.zeros(DType::f32, {B, H, T});
  forward.active_tiles = memory.zeros(DType::u32, {B, H, query_tiles, words});
  backward.d_o = heads(memory.random(all, 3));
  backward.dq = heads(memory.zeros(type, all));
  backward.dk = heads(memory.zeros(type, all));
  backward.dv = heads(memory.zeros(type, all));
  backward.workspace = memory.zeros(DType::f32, {attention_backward_workspace(forward.shape, config.tile_query)});
}

struct Timing {
  double forward_ms = 0, backward_ms = 0;
  std::vector<std::vector<std::byte>> outputs;  // o, dq, dk, dv
};

Timing measure(Problem& p, Visit visit, double seconds) {
  Timing t;
  p.forward.visit = visit;
  t.forward_ms = time_ms(p.ops, seconds, [&] { p.ops.attention_forward(p.forward); });
  p.backward.forward = p.forward;
  t.backward_ms = time_ms(p.ops, seconds, [&] { p.ops.attention_backward(p.backward); });
  for (const HeadsView& v : {p.forward.o, p.backward.dq, p.backward.dk, p.backward.dv}) t.outputs.push_back(p.bytes(v));
  return t;
}

Json run(const AttentionBench& o) {
  const AttentionConfig config = configuration(o);  // what is wrong with the options comes before what the device lacks
  const auto ops = o.make_ops();
  Problem p(*ops, o, config);
  const Timing all = measure(p, Visit::all, o.seconds), active = measure(p, Visit::active, o.seconds);
  const bool same_bits = all.outputs == active.outputs;

  p.forward.counters = p.memory.zeros(DType::u64, {o.heads, kAttentionCounters});
  ops->attention_forward(p.forward);
  std::vector<std::uint64_t> counters(static_cast<std::size_t>(p.forward.counters.numel()));
  ops->download(counters.data(), p.forward.counters);
  double total[kAttentionCounters] = {};
  for (std::size_t n = 0; n < counters.size(); ++n) total[n % kAttentionCounters] += static_cast<double>(counters[n]);

  // A tile's product is 2 tile_query tile_key D operations; forward has q k^T in each visible tile and a v in the computed ones,
  // backward five products in the computed ones (what an implementation recomputes beyond that is not counted).
  const TileMap& map = p.tiles->host();
  const SpeedOfLight light = measure_speed_of_light(*ops, o.seconds);
  const double product = 2.0 * map.tile_query * map.tile_key * static_cast<double>(o.head_size);
  const double visible = total[kVisibleTiles], computed = total[kActiveTiles];
  const auto gflops = [](double operations, double ms) { return operations / ms * 1e-6; };
  const auto direction = [](double all_ms, double active_ms, double all_gflops, double active_gflops) {
    return Json{
        {"all_ms", all_ms}, {"active_ms", active_ms}, {"ratio", active_ms / all_ms}, {"all_gflops", all_gflops}, {"active_gflops", active_gflops}};
  };
  const std::int64_t causal = [&] {
    std::int64_t tiles = 0;
    for (std::int64_t a = 0; a < map.query_tiles; ++a)
      tiles += std::min<std::int64_t>(map.key_tiles, (std::min(o.tokens, (a + 1) * map.tile_query) - 1) / map.tile_key + 1);
    return tiles * o.batch * o.heads;
  }();
  return {
      {"device", ops->device_name()},
      {"shape", {{"batch", o.batch}, {"heads", o.heads}, {"tokens", o.tokens}, {"head_size", o.head_size}}},
      {"attention", {{"score", o.score}, {"gate", o.gate}, {"normalizer", o.normalizer}, {"pattern", o.pattern}}},
      {"tile", {{"query", map.tile_query}, {"key", map.tile_key}}},
      {"causal_tiles", causal},
      {"visible_tiles", visible},
      {"active_tiles", computed},
      {"active_tile_share", visible > 0 ? computed / visible : 0.0},
      {"active_edge_share", total[kVisibleEdges] > 0 ? total[kActiveEdges] / total[kVisibleEdges] : 0.0},
      {"forward", direction(all.forward_ms, active.forward_ms, gflops(2 * visible * product, all.forward_ms),
                            gflops((visible + computed) * product, active.forward_ms))},
      {"backward", direction(all.backward_ms, active.backward_ms, gflops(5 * visible * product, all.backward_ms),
                             gflops(5 * computed * product, active.backward_ms))},
      {"same_bits", same_bits},
      {"type", name_of(compute_type(ops->kind()))},
      {"timing", timing_of(*ops)},
      {"gemm_gflops", light.gemm_gflops},
      {"speed_of_light", text_of(light, *ops)},
  };
}

std::string text_of(const Json& r) {
  const auto& shape = r["shape"];
  std::string text = fmt::format("{}\n{} sequence(s) x {} heads x {} tokens x {}, {} {} {}, pattern {}, tile {} x {}\n",
                                 r["device"].get<std::string>(), shape["batch"].get<int>(), shape["heads"].get<int>(),
                                 shape["tokens"].get<std::int64_t>(), shape["head_size"].get<int>(), r["attention"]["score"].get<std::string>(),
                                 r["attention"]["gate"].get<std::string>(), r["attention"]["normalizer"].get<std::string>(),
                                 r["attention"]["pattern"].get<std::string>(), r["tile"]["query"].get<int>(), r["tile"]["key"].get<int>());
  text += fmt::format("active: {:.1f} % of {:.0f} visible tiles, {:.2f} % of the edges\n\n", 100 * r["active_tile_share"].get<double>(),
                      r["visible_tiles"].get<double>(), 100 * r["active_edge_share"].get<double>());
  text += fmt::format("{:<10}{:>14}{:>14}{:>8}{:>20}{:>20}\n", "", "visit all ms", "active ms", "ratio", "all GFLOP/s", "active GFLOP/s");
  for (const char* name : {"forward", "backward"}) {
    const auto& d = r[name];
    text += fmt::format("{:<10}{:>14.2f}{:>14.2f}{:>8.3f}{:>20.0f}{:>20.0f}\n", name, d["all_ms"].get<double>(), d["active_ms"].get<double>(),
                        d["ratio"].get<double>(), d["all_gflops"].get<double>(), d["active_gflops"].get<double>());
  }
  return text + fmt::format("\noutputs {}; {}\n", r["same_bits"].get<bool>() ? "have the same bits" : "DIFFER between the two",
                            r["speed_of_light"].get<std::string>());
}

}  // namespace

void add_bench_attention(CLI::App& bench) {
  auto o = std::make_shared<AttentionBench>();
  CLI::App* command = bench.add_subcommand("attention", "Attention forward and backward, visiting all tiles or only active ones");
  const CLI::Range size(1, 1 << 26);
  command->add_option("--tokens", o->tokens, "Tokens of a sequence")->check(size)->capture_default_str();
  command->add_option("--heads", o->heads, "Heads")->check(CLI::Range(1, 65536))->capture_default_str();
  command->add_option("--head-size", o->head_size, "Elements of a head: a multiple of 8 up to 256")
      ->check(CLI::Range(8, 256))
      ->check([](const std::string& text) { return std::stoll(text) % 8 == 0 ? std::string() : "expected a multiple of 8, found " + text; })
      ->capture_default_str();
  command->add_option("--batch", o->batch, "Sequences")->check(CLI::Range(1, 65536))->capture_default_str();
  command->add_option("--score", o->score, "As attention.score")->capture_default_str();
  command->add_option("--gate", o->gate, "As attention.gate; with softmax every visible tile is active")->capture_default_str();
  command->add_option("--normalizer", o->normalizer, "As attention.normalizer")->capture_default_str();
  command->add_option("--pattern", o->pattern, "As attention.pattern, in YAML")->capture_default_str();
  command->add_option("--tile", o->tile, "Tile: N, or QUERIESxKEYS")->capture_default_str();
  command->add_option("--active-share", o->active_share, "Share of the tiles that the data make active, in steps of 1 / head size")
      ->check(number_in(0, 1))
      ->capture_default_str();
  o->add_to(*command);
  command->footer(
      "Examples:\n"
      "  tessera bench attention --tokens 4096 --active-share 0.1\n"
      "  tessera bench attention --device cuda --heads 16 --tokens 65536\n"
      "  tessera bench attention --pattern '{window: {size: 512}}' --tile 32x64 --json");
  command->callback([o] {
    const Json result = run(*o);
    std::cout << (o->json ? result.dump(2) + "\n" : text_of(result));
  });
}

}  // namespace tessera
