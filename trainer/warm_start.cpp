#include "trainer/warm_start.h"

#include <fmt/core.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <map>
#include <stdexcept>

#include "data/sha256.h"
#include "trainer/schema.h"

namespace tessera {
namespace {

/// "h.3.attn.scale" -> "attn.scale": what a notice says once for all layers.
std::string kind_of(const std::string& name) { return name.starts_with("h.") ? name.substr(name.find('.', 2) + 1) : name; }

std::string short_hash(const std::string& tokenizer) { return tokenizer.empty() ? "none" : "SHA-256 " + tokenizer.substr(0, 12); }

std::string value_of(const char* key, const Config& config) { return find_key(key)->write(config).dump(); }

/// The thresholds that the controller moves.
bool controls(const AttentionConfig& a) { return a.gate != Gate::softmax && a.threshold.mode == ThresholdMode::controlled; }

}  // namespace

WarmStart plan_warm_start(const Config& config, const std::string& tokenizer_hash) {
  WarmStart start;
  CheckpointInfo info;
  try {
    start.from.path = resolve_checkpoint(config.run.init);
    info = read_checkpoint_info(start.from.path);
  } catch (const std::invalid_argument& e) {
    throw ConfigError(fmt::format("run.init: {}", e.what()));
  }
  const std::string file = start.from.path + "/model.h5";
  start.from.step = info.position.step;
  start.from.sha256 = sha256_file(file);
  Config there = parse_stored_config(info.config, file);
  resolve_vocabulary(there, info.dataset.vocabulary, start.from.path);

  std::vector<std::string> differences;
  const auto compare = [&](const char* key) {
    const std::string a = value_of(key, there), b = value_of(key, config);
    if (a != b) differences.push_back(fmt::format("{}: {} there, {} here", key, a, b));
  };
  for (const char* key : {"model.layers", "model.heads", "model.width", "model.mlp_ratio", "model.positions", "model.norm", "model.bias"})
    compare(key);
  if (config.model.positions == Positions::learned && there.model.positions == Positions::learned) compare("model.context");
  if (const int a = there.model.attention.sinks(), b = config.model.attention.sinks(); a > 0 && b > 0 && a != b)
    differences.push_back(fmt::format("attention.always.sinks: {} there, {} here (0 drops them)", a, b));
  const char* const advice = differences.empty() ? "" : "\nSet these keys as they are there";
  if (info.dataset.vocabulary != config.model.vocabulary)
    differences.push_back(fmt::format("vocabulary: {} tokens there, {} here", info.dataset.vocabulary, config.model.vocabulary));
  else if (info.dataset.tokenizer_hash != tokenizer_hash)
    differences.push_back(fmt::format("tokenizer: {} there, {} here", short_hash(info.dataset.tokenizer_hash), short_hash(tokenizer_hash)));
  if (!differences.empty())
    throw ConfigError(
        fmt::format("run.init {}: its parameters do not fit this model:\n  {}{}", start.from.path, fmt::join(differences, "\n  "), advice));

  std::map<std::string, int> kept, dropped;  // kinds of parameters
  const ParameterLayout ours = make_parameter_layout(config.model), theirs = make_parameter_layout(there.model);
  std::map<std::string, Shape> shapes;
  for (const ParameterInfo& p : theirs.parameters) shapes.emplace(p.name, p.shape);
  for (const ParameterInfo& p : ours.parameters) {
    const bool both = shapes.erase(p.name) > 0;
    if (both)
      start.taken.push_back(p.name);
    else
      ++kept[kind_of(p.name)];
  }
  for (const auto& [name, shape] : shapes) ++dropped[kind_of(name)];
  const AttentionConfig &a = config.model.attention, &b = there.model.attention;
  start.thresholds = controls(a) && controls(b) && a.score == b.score;
  if (const auto biases = kept.find("attn.self_bias"); biases != kept.end() && start.thresholds) {
    start.self_biases = true;
    start.notices.push_back(fmt::format("run.init: attn.self_bias of {} layers starts at the thresholds: the checkpoint has none", biases->second));
    kept.erase(biases);
  }
  for (const auto& [kind, layers] : kept)
    start.notices.push_back(fmt::format("run.init: {} of {} layers keeps its first values: the checkpoint has none", kind, layers));
  for (const auto& [kind, layers] : dropped)
    start.notices.push_back(fmt::format("run.init: {} of {} layers is dropped: this model has none", kind, layers));

  if (controls(a) && !start.thresholds)
    start.notices.push_back(fmt::format("run.init: thresholds start at attention.threshold.init {}: the checkpoint has no controlled ones{}",
                                        a.threshold.init, controls(b) ? " for this score" : ""));
  if (config.model.positions == Positions::rotary && config.model.rotary_base != there.model.rotary_base)
    start.notices.push_back(fmt::format("run.init: model.rotary_base is {} there, {} here", there.model.rotary_base, config.model.rotary_base));
  return start;
}

void apply_warm_start(const WarmStart& start, const Config& config, TrainState& state, Ops& ops) {
  const StoredParameters stored(start.from.path);
  for (const std::string& name : start.taken) {
    const ParameterInfo& p = state.model.layout().find(name);
    std::vector<float> values;
    if (name == "wte.weight") {  // as many rows as there are tokens: the padding of both sides may differ
      values = stored.read_rows(name, config.model.vocabulary, config.model.width);
    } else {
      values = stored.read(name, p.shape);
    }
    state.set_parameters(p.offset, values);
  }
  if (!start.thresholds) return;
  const int H = config.model.heads;
  const std::vector<float> thresholds = load_thresholds(stored, state.model, ops);
  for (int l = 0; start.self_biases && l < config.model.layers; ++l) {
    const std::string name = fmt::format("h.{}.attn.", l);
    std::vector<float> scales(static_cast<std::size_t>(H), 1.0f), biases;
    if (const AttentionConfig& a = config.model.attention; a.score == Score::fidelity) {  // its tau is inside the scale
      const bool learned = std::ranges::count(start.taken, name + "scale") > 0;
      scales = learned ? stored.read(name + "scale", {H}) : std::vector<float>(scales.size(), a.scale_init);
    }
    for (int h = 0; h < H; ++h) biases.push_back(-thresholds[static_cast<std::size_t>(l * H + h)] * scales[static_cast<std::size_t>(h)]);
    state.set_parameters(state.model.layout().find(name + "self_bias").offset, biases);
  }
}

}  // namespace tessera
