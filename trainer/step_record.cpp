#include "trainer/step_record.h"

#include <fmt/core.h>

#include <algorithm>

#include "trainer/progress.h"

namespace tessera {

using Json = nlohmann::ordered_json;

Json step_row(const Config& config, const StepReport& r, const AttentionCounts& counts, const RunPosition& position, const Gpt::Flops& flops,
              double peak_flops) {
  const AttentionShares shares = counts.all();
  const AttentionConfig& a = config.model.attention;
  const double tokens_per_s = static_cast<double>(config.train.tokens_per_step) / r.seconds;
  Json row{{"step", position.step},        {"tokens", position.tokens}, {"loss", r.loss}, {"lr", r.lr}, {"grad_norm", r.grad_norm},
           {"tokens_per_s", tokens_per_s}, {"step_ms", 1e3 * r.seconds}};
  if (peak_flops > 0) {
    // Useful work counts active tiles only; dense_equivalent is what a causal model without skipping would have done.
    row["mfu"] = tokens_per_s * (flops.dense + flops.attention_causal * (1 - shares.tile_skip_rate)) / peak_flops;
    row["mfu_dense_equivalent"] = tokens_per_s * (flops.dense + flops.attention_causal) / peak_flops;
  }
  row["edge_sparsity"] = shares.edge_sparsity;
  row["tile_skip_rate"] = shares.tile_skip_rate;
  row["tile"] = {a.tile_query, a.tile_key};
  row["empty_row_share"] = shares.empty_rows;
  row["data_wait_share"] = std::min(1.0, r.data_wait / r.seconds);
  if (config.parallel.sequence > 1) row["exchange_bytes"] = r.exchanged;
  row["skipped"] = r.skipped;
  row["skipped_total"] = position.skipped;
  return row;
}

std::string step_line(const Json& row, std::int64_t steps, double seconds_left) {
  const auto number = [&](const char* key) { return row[key].get<double>(); };
  return fmt::format("step {}/{}  loss {:.4f}  lr {:.2e}  grad {:.2f}  sparsity {:.4f}  skip {:.3f}  {} tok/s  {:.0f} ms{}  ETA {}",
                     row["step"].get<std::int64_t>(), steps, number("loss"), number("lr"), number("grad_norm"), number("edge_sparsity"),
                     number("tile_skip_rate"), format_count(number("tokens_per_s")), number("step_ms"),
                     row["skipped"].get<bool>() ? "  SKIPPED (not finite)" : "", format_duration(seconds_left));
}

Json head_values(const Gpt& model, Ops& ops, const AttentionCounts& counts) {
  const ModelConfig& m = model.config();
  const auto numbers = [&](const Tensor& x) {
    std::vector<float> host(static_cast<std::size_t>(x.numel()));
    ops.download(host.data(), x);
    return host;
  };
  Json values{{"active_share", counts.active_share()}};
  for (int l = 0; l < m.layers; ++l) {
    if (m.attention.gate != Gate::softmax && m.attention.threshold.mode != ThresholdMode::length) {
      values["thresholds"].push_back(numbers(m.attention.learns_threshold() ? model.parameter(fmt::format("h.{}.attn.threshold", l))
                                                                            : model.thresholds().slice(l * m.heads, m.heads)));
    }
    if (const Tensor balances = model.balances()) values["balances"].push_back(numbers(balances.slice(l * m.heads, m.heads)));
    if (m.attention.learns_scale()) values["scales"].push_back(numbers(model.parameter(fmt::format("h.{}.attn.scale", l))));
    if (m.attention.self_edge()) values["self_biases"].push_back(numbers(model.parameter(fmt::format("h.{}.attn.self_bias", l))));
    if (m.attention.sinks() > 0) values["sink_biases"].push_back(numbers(model.parameter(fmt::format("h.{}.attn.sink_bias", l))));
  }
  return values;
}

EvaluationRecord evaluation_record(const TrainingData& data, const std::vector<Evaluation>& parts) {
  std::vector<double> shares;
  for (std::size_t i = 0; i < parts.size(); ++i) shares.push_back(data.share(i));
  const Evaluation e = mixed(parts, shares);
  EvaluationRecord out;
  out.row["validation_loss"] = e.loss;
  if (!e.answers) out.row["bits_per_byte"] = e.bits_per_byte;
  out.row["validation_tokens"] = e.tokens;
  if (e.answers) {
    out.row["validation_accuracy"] = e.accuracy();
    out.row["accuracy_by_distance"] = accuracy_by_distance(*e.answers);
    out.lines.push_back(fmt::format("validation loss {:.4f}, accuracy {:.4f} ({} answers, {:.1f} s); by distance {}", e.loss, e.accuracy(), e.tokens,
                                    e.seconds, accuracy_text(out.row["accuracy_by_distance"])));
    return out;
  }
  for (std::size_t i = 0; parts.size() > 1 && i < parts.size(); ++i) {
    if (parts[i].tokens == 0) continue;
    const std::string& directory = data.parts[i].data.directory;
    out.row["validation"].push_back(
        {{"data", directory}, {"share", shares[i]}, {"loss", parts[i].loss}, {"bits_per_byte", parts[i].bits_per_byte}, {"tokens", parts[i].tokens}});
    out.lines.push_back(fmt::format("{}: validation loss {:.4f}, {:.4f} bits a byte", directory, parts[i].loss, parts[i].bits_per_byte));
  }
  out.lines.push_back(fmt::format("validation loss {:.4f}, perplexity {:.2f}, {:.4f} bits a byte ({} tokens, {:.1f} s)", e.loss, e.perplexity(),
                                  e.bits_per_byte, e.tokens, e.seconds));
  return out;
}

}  // namespace tessera
