#include "trainer/simulate.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "model/gpt.h"
#include "model/parameters.h"
#include "trainer/schema_nearest.h"

namespace tessera {

namespace {

using Json = nlohmann::ordered_json;

constexpr double kMillisecond = 1e3;  // milliseconds in a second
constexpr SequenceLayout kLayouts[] = {SequenceLayout::contiguous, SequenceLayout::zigzag, SequenceLayout::balanced};
constexpr SequenceExchange kExchanges[] = {SequenceExchange::needed, SequenceExchange::ring, SequenceExchange::heads};

struct Rate {
  const char* name;
  double SimulatedRates::*value;
  const char* source;
};
constexpr Rate kRates[] = {
    {"gemm_tflops", &SimulatedRates::gemm_tflops, "matrix products of a step of 354 M parameters, H200"},
    {"tile_forward_ns", &SimulatedRates::tile_forward_ns, "attention of windows 256 and 1024 at T = 65536, H200: a 64 x 64 tile, heads of 64"},
    {"list_forward_ns", &SimulatedRates::list_forward_ns, "the same: a query tile's list"},
    {"tile_backward_ns", &SimulatedRates::tile_backward_ns, "the same, forward + backward less forward"},
    {"list_backward_ns", &SimulatedRates::list_backward_ns, "the same, forward + backward less forward"},
    {"other_ps", &SimulatedRates::other_ps, "norms, unit length, rotation of that step, by token, layer and width"},
    {"logit_ps", &SimulatedRates::logit_ps, "cross-entropy of that step, by token and logit"},
    {"adamw_ps", &SimulatedRates::adamw_ps, "AdamW of that step, by parameter"},
    {"stages", &SimulatedRates::stages, "assumed: with exchange needed or heads, a rank takes its heads in so many turns at most"},
};

double seconds(std::int64_t bytes, double gbps) { return 8 * static_cast<double>(bytes) / (gbps * 1e9); }

/// Seconds of an exchange for its slowest rank, of the groups of ranks wherever they lie in their nodes; without latency.
double time_of(const Traffic& traffic, const SimulatedCluster& cluster) {
  const int ranks = static_cast<int>(traffic.size());
  std::set<int> starts;  // places of first ranks in their nodes
  for (int g = 0; g < std::min(cluster.gpus / ranks, cluster.node_size); ++g) starts.insert(g * ranks % cluster.node_size);
  double slowest = 0;
  for (const int start : starts) {
    for (int r = 0; r < ranks; ++r) {
      std::int64_t near_out = 0, near_in = 0, far_out = 0, far_in = 0;
      for (int s = 0; s < ranks; ++s) {
        const bool near = (start + r) / cluster.node_size == (start + s) / cluster.node_size;
        (near ? near_out : far_out) += traffic[static_cast<std::size_t>(r)][static_cast<std::size_t>(s)];
        (near ? near_in : far_in) += traffic[static_cast<std::size_t>(s)][static_cast<std::size_t>(r)];
      }
      slowest = std::max({slowest, seconds(std::max(near_out, near_in), cluster.link_gbps), seconds(std::max(far_out, far_in), cluster.node_gbps)});
    }
  }
  return slowest;
}

/// Seconds of attention and its exchange in one direction.
struct Pass {
  double attention = 0;
  double whole = 0;    // of the exchange
  double exposed = 0;  // of it what the attention does not hide
};

/// `a`: seconds of the kernels; `heads`: of the model.
Pass pass_of(double a, double heads, const Traffic& traffic, SequenceExchange exchange, bool backward, const SimulatedCluster& cluster,
             const SimulatedRates& rates) {
  const auto S = static_cast<double>(traffic.size());
  if (traffic.size() == 1) return {a, 0, 0};
  const double latency = cluster.latency_us * 1e-6;
  const double hops = exchange == SequenceExchange::needed ? 1 : exchange == SequenceExchange::heads ? 2 : backward ? S : S - 1;
  const double c = time_of(traffic, cluster) + hops * latency;
  if (exchange != SequenceExchange::ring) {
    const double turns = std::min(rates.stages, exchange == SequenceExchange::heads ? heads / S : heads);
    return {a, c, (a + c) / turns + (turns - 1) * std::max(a, c) / turns - a};
  }
  const double beside = (S - 1) * std::max(a / S, c / hops), last = backward ? c / hops : 0;
  return {a, c, a / S + beside + last - a};
}

/// Seconds of the collective over all GPUs that moves so many bytes in all.
double ring_time(double bytes, const SimulatedCluster& cluster) {
  const double n = cluster.gpus;
  const bool one_node = cluster.gpus <= cluster.node_size;
  const double gbps = one_node ? cluster.link_gbps : std::min(cluster.link_gbps, cluster.node_size * cluster.node_gbps);
  return 8 * bytes * (n - 1) / n / (gbps * 1e9) + (n - 1) * cluster.latency_us * 1e-6;
}

}  // namespace

SimulatedStep simulate_step(const Config& config, const SequenceCosts& costs, SequenceExchange exchange, const SimulatedCluster& cluster,
                            const SimulatedRates& rates) {
  const ModelConfig& m = config.model;
  const int ranks = costs.split.ranks();
  const std::int64_t micro_batch_tokens = m.context * config.train.micro_batch * (cluster.gpus / ranks);
  SimulatedStep step;
  step.micro_batches = (config.train.tokens_per_step + micro_batch_tokens - 1) / micro_batch_tokens;
  step.tokens = step.micro_batches * micro_batch_tokens;

  // Everything that goes by tokens, of the rank that has most.
  std::int64_t most = 0;
  for (int r = 0; r < ranks; ++r) most = std::max(most, costs.split.tokens_of(r));
  const double tokens = static_cast<double>(most * config.train.micro_batch), C = m.width, V = static_cast<double>(m.vocabulary_padded);
  const double forwards = config.train.recompute == Recompute::block ? 2 : 1;                                    // of a block
  const double block = 2.0 * m.layers * static_cast<double>(m.block_matrix_elements()), classifier = 2 * V * C;  // FLOPs a token, forward
  const double dense_forward = tokens * (block + classifier) / (rates.gemm_tflops * 1e12);
  const double dense_backward = tokens * ((forwards + 1) * block + 2 * classifier) / (rates.gemm_tflops * 1e12);
  const double norms = tokens * m.layers * C * rates.other_ps * 1e-12, logits = tokens * V * rates.logit_ps * 1e-12;
  const double other_forward = (norms + logits) / 3, other_backward = norms * (forwards + 1) / 3 + logits * 2 / 3;

  // Attention, layer by layer: its ranks wait for each other.
  const double size = m.head_size() / 64.0;
  double attention_forward = 0, attention_backward = 0, exposed_forward = 0, exposed_backward = 0, whole = 0;
  std::vector<std::int64_t> sent(static_cast<std::size_t>(ranks));
  for (const LayerCosts& layer : costs.layers) {
    double forward = 0, backward = 0;
    for (const auto& r : layer.ranks) {
      const bool dealt = exchange == SequenceExchange::heads;
      const auto tiles = static_cast<double>(dealt ? r.tiles_of_heads : r.tiles), lists = static_cast<double>(dealt ? r.lists_of_heads : r.lists);
      forward = std::max(forward, (tiles * size * rates.tile_forward_ns + lists * rates.list_forward_ns) * 1e-9);
      backward = std::max(backward, (tiles * size * rates.tile_backward_ns + lists * rates.list_backward_ns) * 1e-9);
    }
    const ExchangeBytes& bytes = *layer.bytes(exchange);
    const Pass there = pass_of(forward, m.heads, bytes.forward, exchange, false, cluster, rates);
    const Pass back = pass_of(backward, m.heads, bytes.backward, exchange, true, cluster, rates);
    const auto times = static_cast<double>(layer.layers.size());
    attention_forward += times * there.attention;
    attention_backward += times * (back.attention + (forwards - 1) * there.attention);
    exposed_forward += times * there.exposed;
    exposed_backward += times * (back.exposed + (forwards - 1) * there.exposed);
    whole += times * (back.whole + forwards * there.whole);
    for (int r = 0; r < ranks; ++r)
      sent[static_cast<std::size_t>(r)] +=
          std::ssize(layer.layers) * (static_cast<std::int64_t>(forwards) * bytes.forward_sent(r) + bytes.backward_sent(r));
  }

  const auto parameters = static_cast<double>(make_parameter_layout(m).count);
  const double forward = dense_forward + other_forward + attention_forward + exposed_forward;
  const double backward = dense_backward + other_backward + attention_backward + exposed_backward;
  const double reduce = ring_time(4 * parameters, cluster), gather = ring_time(2 * parameters, cluster);

  const double M = static_cast<double>(step.micro_batches) * kMillisecond;
  step.dense = M * (dense_forward + dense_backward);
  step.other = M * (other_forward + other_backward);
  step.attention = M * (attention_forward + attention_backward);
  step.exchange = M * (exposed_forward + exposed_backward);
  step.exchange_whole = M * whole;
  step.gradients = kMillisecond * (std::max(0.0, reduce - backward) + std::max(0.0, gather - forward));
  step.gradients_whole = kMillisecond * (reduce + gather);
  step.optimizer = kMillisecond * parameters / cluster.gpus * rates.adamw_ps * 1e-12;
  step.exchange_bytes = step.micro_batches * *std::max_element(sent.begin(), sent.end());
  step.gradients_bytes = std::llround(6 * parameters * (cluster.gpus - 1) / cluster.gpus);
  return step;
}

void set_rate(SimulatedRates& rates, const std::string& assignment) {
  const auto equals = assignment.find('=');
  const std::string name = assignment.substr(0, equals);
  std::vector<std::string> names;
  for (const Rate& rate : kRates) names.emplace_back(rate.name);
  const auto it = std::find(names.begin(), names.end(), name);
  if (equals == std::string::npos || it == names.end())
    throw ConfigError(
        fmt::format("--rate {:.60}: expected NAME=VALUE with a name of {}; nearest is {}", assignment, fmt::join(names, ", "), nearest(name, names)));
  const std::string text = assignment.substr(equals + 1);
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  const double low = name == "stages" ? 1 : name == "gemm_tflops" ? 1e-6 : 0;
  if (text.empty() || *end != '\0' || !(value >= low && value <= 1e9))
    throw ConfigError(fmt::format("--rate {:.60}: expected a number from {:g} to 1e9", assignment, low));
  rates.*kRates[it - names.begin()].value = value;
}

Json simulate(const Config& config, const std::vector<int>& gpus, int sequence, SimulatedCluster cluster, const SimulatedRates& rates) {
  if (config.device != "cuda") throw ConfigError("--simulate is of GPUs, whose rates and types it takes: set device: cuda");
  const auto maps = make_layer_tiles(config.model, config.model.context);
  std::map<std::pair<int, SequenceLayout>, SequenceCosts> known;
  Json steps = Json::array(), left_out = Json::array();
  const auto add = [&](const SequenceCosts& costs, SequenceExchange exchange) {
    const SimulatedStep step = simulate_step(config, costs, exchange, cluster, rates);
    const bool alone = costs.split.ranks() == 1;
    steps.push_back({{"gpus", cluster.gpus},
                     {"sequence", costs.split.ranks()},
                     {"layout", alone ? Json() : Json(name_of(costs.layout))},
                     {"exchange", alone ? Json() : Json(name_of(exchange))},
                     {"ms",
                      {{"dense", step.dense},
                       {"other", step.other},
                       {"attention", step.attention},
                       {"exchange", step.exchange},
                       {"gradients", step.gradients},
                       {"optimizer", step.optimizer},
                       {"step", step.total()}}},
                     {"hidden_ms", {{"exchange", step.exchange_whole - step.exchange}, {"gradients", step.gradients_whole - step.gradients}}},
                     {"sent_bytes", {{"exchange", step.exchange_bytes}, {"gradients", step.gradients_bytes}}},
                     {"micro_batches", step.micro_batches},
                     {"tokens", step.tokens},
                     {"tokens_per_second", static_cast<double>(step.tokens) / (step.total() / kMillisecond)}});
  };

  for (const int n : gpus) {
    cluster.gpus = n;
    const int ranks = sequence > 0 ? sequence : config.parallel.sequence > 1 ? config.parallel.sequence : std::min(n, cluster.node_size);
    if (n % ranks != 0)
      throw ConfigError(fmt::format("--gpus {}: {} ranks share a sequence; expected a multiple of {}, as {} or {}, or --sequence that divides {}", n,
                                    ranks, ranks, std::max(1, n / ranks) * ranks, (std::max(1, n / ranks) + 1) * ranks, n));
    for (const SequenceLayout layout : kLayouts) {
      if (ranks == 1 && layout != SequenceLayout::contiguous) continue;
      auto it = known.find({ranks, layout});
      if (it == known.end()) {
        try {
          it = known.emplace(std::pair(ranks, layout), sequence_costs(config, maps, ranks, layout)).first;
        } catch (const std::invalid_argument& e) {
          left_out.push_back({{"gpus", n}, {"sequence", ranks}, {"layout", name_of(layout)}, {"exchange", nullptr}, {"reason", e.what()}});
          continue;
        }
      }
      for (const SequenceExchange exchange : kExchanges) {
        if (ranks == 1 && exchange != SequenceExchange::needed) continue;
        if (it->second.layers.front().bytes(exchange) != nullptr)
          add(it->second, exchange);
        else
          left_out.push_back({{"gpus", n},
                              {"sequence", ranks},
                              {"layout", name_of(layout)},
                              {"exchange", name_of(exchange)},
                              {"reason", heads_problem(ranks, it->second.shape)}});
      }
    }
  }

  if (steps.empty()) {
    std::string reasons;
    for (const Json& out : left_out) {
      const std::string layout = out["layout"].get<std::string>(), exchange = out["exchange"].is_null() ? "any" : out["exchange"].get<std::string>();
      reasons += fmt::format("; {} GPUs, layout {}, exchange {}: {}", out["gpus"].get<int>(), layout, exchange, out["reason"].get<std::string>());
    }
    throw ConfigError("--simulate has nothing to predict, as no layout is possible" + reasons);
  }

  Json assumptions = Json::array();
  const SimulatedRates defaults;
  const SimulatedCluster usual;
  const auto assume = [&](const char* name, double value, double usual_value, const std::string& source) {
    assumptions.push_back({{"name", name}, {"value", value}, {"source", value == usual_value ? source : "given"}});
  };
  for (const Rate& rate : kRates) assume(rate.name, rates.*rate.value, defaults.*rate.value, rate.source);
  assume("link_gbps", cluster.link_gbps, usual.link_gbps, "stated for NVLink 4, not measured: Gbit/s a GPU and direction, inside a node");
  assume("node_gbps", cluster.node_gbps, usual.node_gbps, "stated for one NDR port a GPU, not measured: Gbit/s a GPU and direction, between nodes");
  assume("latency_us", cluster.latency_us, usual.latency_us, "assumed, of a round of messages");
  assume("node_size", cluster.node_size, usual.node_size, "assumed, GPUs of a node");
  return {{"context", config.model.context},
          {"micro_batch", config.train.micro_batch},
          {"assumptions", std::move(assumptions)},
          {"steps", std::move(steps)},
          {"left_out", std::move(left_out)}};
}

}  // namespace tessera
