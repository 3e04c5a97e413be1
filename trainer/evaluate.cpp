#include "trainer/evaluate.h"

#include <fmt/core.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <numbers>
#include <stdexcept>
#include <utility>

#include "trainer/collective.h"

namespace tessera {

double Evaluation::perplexity() const { return std::exp(loss); }

double Evaluation::accuracy() const {
  AnswerTally all;
  for (const AnswerTally& a : answers.value_or(AnswerTallies())) all.answers += a.answers, all.right += a.right;
  return static_cast<double>(all.right) / static_cast<double>(all.answers);
}

nlohmann::ordered_json accuracy_by_distance(const AnswerTallies& answers) {
  auto out = nlohmann::ordered_json::array();
  for (std::size_t d = 0; d < answers.size(); ++d) {
    const auto [all, right] = answers[d];
    if (all > 0)
      out.push_back({{"from", std::int64_t{1} << d},
                     {"to", (std::int64_t{2} << d) - 1},
                     {"answers", all},
                     {"accuracy", static_cast<double>(right) / static_cast<double>(all)}});
  }
  return out;
}

std::string distance_text(std::int64_t from, std::int64_t to) { return from == to ? fmt::format("{}", from) : fmt::format("{}-{}", from, to); }

std::string accuracy_text(const nlohmann::ordered_json& by_distance) {
  std::string text;
  for (const auto& row : by_distance)
    text += fmt::format("{}{} {:.4f}", text.empty() ? "" : ", ", distance_text(row["from"], row["to"]), row["accuracy"].get<double>());
  return text;
}

Evaluation mixed(std::span<const Evaluation> parts, std::span<const double> shares) {
  if (parts.size() == 1) return parts[0];
  Evaluation all;
  double share = 0, nats = 0, bytes = 0;  // a token of the mixture, times the share that was evaluated
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const Evaluation& e = parts[i];
    if (e.tokens == 0) continue;
    share += shares[i];
    nats += shares[i] * e.loss;
    bytes += shares[i] * static_cast<double>(e.bytes) / static_cast<double>(e.tokens);
    all.tokens += e.tokens;
    all.bytes += e.bytes;
    all.sequences += e.sequences;
    all.sequence_tokens = std::max(all.sequence_tokens, e.sequence_tokens);
    all.seconds += e.seconds;
    all.compared += e.compared;
    all.counters.resize(e.counters.size());
    for (std::size_t c = 0; c < e.counters.size(); ++c) all.counters[c] += e.counters[c];
  }
  const double none = std::numeric_limits<double>::quiet_NaN();
  all.loss = share > 0 ? nats / share : none;
  all.bits_per_byte = bytes > 0 ? nats / std::numbers::ln2 / bytes : none;
  return all;
}

Evaluator::Evaluator(const DatasetInfo& info, const SplitInfo& split, const Tokenizer& tokenizer, std::int64_t context, std::int64_t micro_batch,
                     std::vector<std::int32_t> places)
    : micro_batch_(micro_batch), places_(std::move(places)) {
  const auto tokens = static_cast<std::int64_t>(split.tokens);
  context_ = places_.empty() ? std::clamp<std::int64_t>(tokens - 1, 1, context) : context;
  sequences_ = tokens < 2 ? 0 : std::max<std::int64_t>(1, (tokens - 1) / context_);
  read_ = [reader = std::make_shared<TokenReader>(info, split), context = context_, held = places_](std::int64_t first, std::int64_t count) {
    return read_sequences(*reader, static_cast<std::uint64_t>(first), count, context, held);
  };
  for (std::int64_t t = 0; t < tokenizer.vocabulary(); ++t) {
    std::string text;
    tokenizer.decode(static_cast<std::uint32_t>(t), text);
    token_bytes_.push_back(static_cast<std::uint32_t>(text.size()));
  }
}

Evaluator::Evaluator(const SyntheticSource& source, std::int64_t micro_batch, std::vector<std::int32_t> places)
    : context_(source.context()), micro_batch_(micro_batch), sequences_(kSyntheticValidation), places_(std::move(places)), asks_(true) {
  read_ = [source, held = places_](std::int64_t first, std::int64_t count) {
    return read_sequences(source, static_cast<std::uint64_t>(first), count, held);
  };
}

/// After model.forward(batch), which visited every tile and found `losses`, with counters that were zero before: the same, skipping. The counters
/// stay those of one pass.
void Evaluator::compare_skipping(Gpt& model, Ops& ops, const Batch& batch, std::int64_t first, std::span<const float> losses) const {
  const auto counters_now = [&] {
    std::vector<std::uint64_t> counters(static_cast<std::size_t>(model.counters().numel()));
    ops.download(counters.data(), model.counters());
    return counters;
  };
  const auto counters = counters_now();
  model.zero_counters();
  model.set_visit(Visit::active);
  model.forward(batch);
  model.set_visit(Visit::all);
  std::vector<float> skipped(losses.size());
  ops.download(skipped.data(), model.losses().slice(0, static_cast<std::int64_t>(losses.size())));
  for (std::size_t i = 0; i < losses.size(); ++i) {
    if (std::bit_cast<std::uint32_t>(losses[i]) == std::bit_cast<std::uint32_t>(skipped[i])) continue;
    const auto at = static_cast<std::int64_t>(i), own = places_.empty() ? context_ : std::ssize(places_);
    throw std::runtime_error(
        fmt::format("skipping changed a loss: sequence {}, token {}: {:.9g} with every tile visited, {:.9g} with the active ones", first + at / own,
                    places_.empty() ? at % own : places_[static_cast<std::size_t>(at % own)], losses[i], skipped[i]));
  }
  if (counters_now() != counters)
    throw std::runtime_error(
        fmt::format("skipping changed the counts of edges and tiles, in the micro-batch of sequence {} (the losses are the same)", first));
}

Evaluation Evaluator::run(Gpt& model, Ops& ops, Communicator& host, const RankLayout& ranks, const BatchBuffer& buffer, std::int64_t batches,
                          Skipping skipping) {
  const auto start = std::chrono::steady_clock::now();
  const std::int64_t count = batches > 0 ? std::min(batches, this->batches()) : this->batches();
  const std::int64_t sequences = std::min(sequences_, count * micro_batch_);
  std::vector<double> sums(static_cast<std::size_t>(3 * sequences));  // a sequence: nats, tokens, bytes
  const bool compares = skipping == Skipping::compare;
  if (compares) model.set_visit(Visit::all);
  std::vector<std::uint64_t> counters(static_cast<std::size_t>(model.counters().numel())), found(counters.size());
  std::uint64_t compared = 0;
  model.zero_counters();
  std::vector<float> losses;
  std::vector<std::int32_t> predictions;
  std::array<std::uint64_t, 2 * AnswerTallies().size()> tallies{};
  for (std::int64_t b = count * ranks.group / ranks.groups; b < count * (ranks.group + 1) / ranks.groups; ++b) {
    const std::int64_t first = b * micro_batch_;
    const HostBatch batch = read_(first, std::min(micro_batch_, sequences - first));
    const Batch on_device = buffer.upload(ops, batch);
    model.forward(on_device, asks_);
    losses.resize(batch.target.size());
    ops.download(losses.data(), model.losses().slice(0, batch.batch * batch.tokens));
    if (asks_) {
      predictions.resize(losses.size());
      ops.download(predictions.data(), model.predictions().slice(0, batch.batch * batch.tokens));
    }
    if (compares) {
      compare_skipping(model, ops, on_device, first, losses);
      compared += static_cast<std::size_t>(std::ranges::count_if(batch.target, [](std::int32_t target) { return target >= 0; }));
      ops.download(found.data(), model.counters());
      std::ranges::transform(counters, found, counters.begin(), std::plus());
      model.zero_counters();
    }
    for (std::size_t i = 0; i < losses.size(); ++i) {
      if (batch.target[i] < 0) continue;
      double* sum = &sums[3 * (first + static_cast<std::int64_t>(i) / batch.tokens)];
      sum[0] += losses[i];
      sum[1] += 1;
      if (!asks_) {
        sum[2] += token_bytes_.at(static_cast<std::size_t>(batch.target[i]));
        continue;
      }
      const auto distance = static_cast<std::size_t>(std::bit_width(static_cast<std::uint32_t>(batch.distance[i])) - 1);
      ++tallies[2 * distance];
      tallies[2 * distance + 1] += predictions[i] == batch.target[i];
    }
  }
  all_reduce_sum(host, sums);  // where each sequence is one rank's, the others add zeros: exact

  Evaluation e;
  e.sequences = sequences;
  e.sequence_tokens = context_;
  double nats = 0;
  for (std::int64_t s = 0; s < sequences; ++s) {
    nats += sums[3 * s];
    e.tokens += static_cast<std::uint64_t>(sums[3 * s + 1]);
    e.bytes += static_cast<std::uint64_t>(sums[3 * s + 2]);
  }
  const double none = std::numeric_limits<double>::quiet_NaN();
  e.loss = e.tokens > 0 ? nats / static_cast<double>(e.tokens) : none;
  e.bits_per_byte = e.bytes > 0 ? nats / std::numbers::ln2 / static_cast<double>(e.bytes) : none;
  if (asks_) {
    all_reduce_sum(host, tallies);
    AnswerTallies& answers = e.answers.emplace();
    for (std::size_t d = 0; d < answers.size(); ++d) answers[d] = {tallies[2 * d], tallies[2 * d + 1]};
  }
  if (!compares) ops.download(counters.data(), model.counters());
  all_reduce_sum(host, counters);
  all_reduce_sum(host, {&compared, 1});
  e.counters = std::move(counters);
  e.compared = compared;
  model.zero_counters();
  e.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return e;
}

}  // namespace tessera
