#include "trainer/run_plan.h"

#include <fmt/core.h>

#include <memory>
#include <optional>

#include "data/tokenizer.h"
#include "trainer/device.h"
#include "trainer/open_data.h"
#include "trainer/rank_layout.h"
#include "trainer/sequence_costs.h"
#include "trainer/train_state.h"

namespace tessera {

namespace {

using Json = nlohmann::ordered_json;

std::optional<TrainingData> data_if_there(const Config& config) {
  if (!has_training_data(config.data)) return {};
  return open_training_data(config.data);
}

/// The vocabulary from the data, or from what the configuration says of it.
void find_vocabulary(Config& config, const std::optional<TrainingData>& data) {
  const std::string& tokenizer = config.data.tokenizer;
  if (data && data->synthetic) {
    resolve_vocabulary(config, data->synthetic->vocabulary, data->names());
  } else if (data) {
    open_tokenizer(data->first(), tokenizer);  // a run would refuse another one, and so does its plan
    resolve_vocabulary(config, data->first().vocabulary, data->first().directory);
  } else if (config.model.vocabulary != 0) {
    resolve_vocabulary(config, config.model.vocabulary, "");
  } else if (tokenizer == "bytes") {
    resolve_vocabulary(config, load_tokenizer(tokenizer)->vocabulary(), tokenizer);
  } else if (tokenizer == "gpt2" || tokenizer.starts_with("gpt2:")) {
    resolve_vocabulary(config, 50257, tokenizer);  // the published vocabulary: 256 bytes, 50,000 merges, <|endoftext|>
  } else if (tokenizer.starts_with("bpe:")) {
    resolve_vocabulary(config, load_tokenizer(tokenizer)->vocabulary(), tokenizer);
  } else {
    std::string missing = config.data.path.empty() ? "data.path is not set" : fmt::format("there is no {}/dataset.json", config.data.path);
    if (!config.data.mix.empty()) missing = "not every folder of data.mix has a dataset.json";
    throw ConfigError(fmt::format(
        "the vocabulary is not known: {}. Set model.vocabulary, data.tokenizer (bytes, gpt2 or bpe:FILE), or data.path to a prepared dataset",
        missing));
  }
}

}  // namespace

void find_vocabulary(Config& config) { find_vocabulary(config, data_if_there(config)); }

Json plan_run(Config& config, int ranks) {
  check_ranks(config, ranks);
  const auto data = data_if_there(config);
  find_vocabulary(config, data);
  // Reserves, and allocates nothing: any operations will do. Every rank's slices are equal; of those that share sequences, the one that needs most.
  const auto ops = make_cpu_ops(1);
  auto planned = std::make_unique<const TrainState>(config, *ops, 0, ranks);
  for (int place = 1; place < config.parallel.sequence; ++place) {
    auto other = std::make_unique<const TrainState>(config, *ops, 0, ranks, place);
    if (other->plan.total_bytes() > planned->plan.total_bytes()) planned = std::move(other);
  }
  const TrainState& state = *planned;

  const ParameterLayout& layout = state.model.layout();
  const Gpt::Flops flops = state.model.flops_per_token();
  const std::int64_t tokens = config.train.tokens_per_step * config.train.steps;
  Json bytes = Json::object();
  for (int c = 0; c < kMemoryCategories; ++c) bytes[name_of(static_cast<MemoryCategory>(c))] = state.plan.bytes(static_cast<MemoryCategory>(c));
  const std::size_t libraries = library_bytes(device_kind(config.device));
  const std::size_t connections = connection_bytes(config, ranks, state.model.options().sequence.exchange);
  if (libraries > 0) bytes["device_libraries"] = libraries;
  if (connections > 0) bytes["nccl_connections"] = connections;
  bytes["total"] = state.plan.total_bytes() + libraries + connections;
  Json plan = {
      {"device", config.device},
      {"ranks", ranks},
      {"parameters", layout.count},
      {"parameters_decayed", layout.decayed_count},
      {"vocabulary", config.model.vocabulary},
      {"vocabulary_padded", config.model.vocabulary_padded},
      {"bytes_per_rank", bytes},
      {"checkpoint_bytes", 3 * layout.count * static_cast<std::int64_t>(sizeof(float))},  // parameters and the two moments
      {"flops_per_token", {{"dense_equivalent", flops.dense + flops.attention_causal}, {"pattern_visible", flops.dense + flops.attention_visible}}},
      {"tokens_per_step", config.train.tokens_per_step},
      {"micro_batches_per_step_and_rank",
       config.train.tokens_per_step / (config.model.context * config.train.micro_batch * (ranks / config.parallel.sequence))},
      {"steps", config.train.steps},
      {"tokens", tokens},
      {"flops",
       {{"dense_equivalent", (flops.dense + flops.attention_causal) * static_cast<double>(tokens)},
        {"pattern_visible", (flops.dense + flops.attention_visible) * static_cast<double>(tokens)}}},
  };
  if (data && !data->synthetic) {
    const auto epochs = [&](double share, std::uint64_t of) { return of == 0 ? 0.0 : share * static_cast<double>(tokens) / static_cast<double>(of); };
    plan["data_tokens"] = data->train_tokens();
    plan["epochs"] = epochs(1, data->train_tokens());
    for (std::size_t i = 0; data->parts.size() > 1 && i < data->parts.size(); ++i) {
      const DatasetInfo& part = data->parts[i].data;
      plan["mix"].push_back({{"data", part.directory},
                             {"share", data->share(i)},
                             {"data_tokens", part.train.tokens},
                             {"epochs", epochs(data->share(i), part.train.tokens)}});
    }
  }
  if (config.parallel.sequence > 1) plan["sequence"] = plan_sequence(config, config.parallel.sequence);
  return plan;
}

}  // namespace tessera
