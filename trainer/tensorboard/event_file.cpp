#include "trainer/tensorboard/event_file.h"

#include <fmt/core.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <string_view>
#include <utility>

#include "trainer/tensorboard/event.pb.h"
#include "trainer/tensorboard/occupancy.h"
#include "trainer/tensorboard/record.h"

namespace tessera {

namespace {

using Json = nlohmann::ordered_json;
using tensorboard::Event;
using tensorboard::Summary;

constexpr std::string_view kPrefix = "events.out.tfevents.";

/// Where TensorBoard shows a number of metrics.jsonl; others are under other/.
struct ScalarTag {
  std::string_view key, tag, description;
};
constexpr ScalarTag kScalarTags[] = {
    {"loss", "train/loss", "nats a target token, over the step"},
    {"lr", "train/lr", "learning rate"},
    {"grad_norm", "train/grad_norm", "norm of the gradient, before it is clipped"},
    {"tokens", "train/tokens", "tokens seen so far"},
    {"skipped_total", "train/skipped_steps", "steps so far whose loss or gradient was not finite"},
    {"validation_loss", "validation/loss", "nats a target token"},
    {"validation_accuracy", "validation/accuracy", "answers of a synthetic task that are right / answers"},
    {"bits_per_byte", "validation/bits_per_byte", "validation loss in bits over the bytes of the text"},
    {"validation_tokens", "validation/tokens", "target tokens evaluated"},
    {"edge_sparsity", "attention/edge_sparsity", "1 - active / causal edges"},
    {"tile_skip_rate", "attention/tile_skip_rate", "1 - active / causal tiles"},
    {"empty_row_share", "attention/empty_row_share", "queries without an active edge / queries"},
    {"tokens_per_s", "speed/tokens_per_s", "tokens of all ranks a second"},
    {"step_ms", "speed/step_ms", "milliseconds of the step"},
    {"mfu", "speed/mfu", "model FLOPs utilisation, of active tiles alone"},
    {"mfu_dense_equivalent", "speed/mfu_dense_equivalent", "model FLOPs utilisation if no tile were skipped in this time"},
    {"attention_share", "speed/attention_share", "share of the step that attention takes, forward and backward"},
    {"data_wait_share", "speed/data_wait_share", "share of the step in which data was waited for"},
    {"exchange_bytes", "speed/exchange_bytes", "bytes that ranks of a sequence sent each other"},
    {"planned_bytes", "memory/planned_bytes", "of a rank's device"},
    {"memory_bytes", "memory/used_bytes", "of a rank's device, in use after the first step"},
};

double now() { return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count(); }

std::string record(const Event& event) { return tf_record(event.SerializeAsString()); }

/// Names sort by seconds, then by their number; neither goes back, also where the clock does.
std::string next_name(const std::string& directory) {
  std::int64_t seconds = static_cast<std::int64_t>(now()), files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    const std::string name = entry.path().filename().string();
    if (!is_event_file(name)) continue;
    std::int64_t then = 0, number = 0;
    const char* const end = name.data() + name.size();
    const auto parsed = std::from_chars(name.data() + kPrefix.size(), end, then);
    if (parsed.ec == std::errc() && parsed.ptr < end && *parsed.ptr == '.') std::from_chars(parsed.ptr + 1, end, number);
    seconds = std::max(seconds, then);
    files = std::max(files, number + 1);
  }
  return fmt::format("{}{:010}.{:04}", kPrefix, seconds, files);
}

/// The values of one event.
class Values {
 public:
  Values(Summary& summary, std::set<std::string>& described) : summary_(summary), described_(described) {}

  void scalar(const std::string& tag, std::string_view description, double value) {
    add(tag, description, "scalars").set_simple_value(static_cast<float>(value));
  }

  void image(const std::string& tag, std::string_view description, PngImage png) {
    Summary::Image& image = *add(tag, description, "images").mutable_image();
    image.set_width(png.width);
    image.set_height(png.height);
    image.set_colorspace(3);
    image.set_encoded_image_string(std::move(png.bytes));
  }

  /// Of the finite ones among `values`; nothing where there are none. Buckets of equal width from the least to the greatest.
  void histogram(const std::string& tag, std::string_view description, std::vector<double> values) {
    constexpr int kBuckets = 30;
    std::erase_if(values, [](double v) { return !std::isfinite(v); });
    if (values.empty()) return;
    const auto [low, high] = std::ranges::minmax(values);
    const int buckets = high > low ? kBuckets : 1;
    std::vector<double> counts(buckets);
    double sum = 0, squares = 0;
    for (const double v : values) {
      const int bucket = high > low ? static_cast<int>(std::ceil((v - low) / (high - low) * buckets)) - 1 : 0;
      counts[std::clamp(bucket, 0, buckets - 1)] += 1;
      sum += v;
      squares += v * v;
    }
    tensorboard::HistogramProto& histogram = *add(tag, description, "histograms").mutable_histo();
    histogram.set_min(low);
    histogram.set_max(high);
    histogram.set_num(static_cast<double>(values.size()));
    histogram.set_sum(sum);
    histogram.set_sum_squares(squares);
    for (int i = 0; i < buckets; ++i) {
      histogram.add_bucket_limit(i + 1 == buckets ? high : low + (high - low) * (i + 1) / buckets);
      histogram.add_bucket(counts[i]);
    }
  }

 private:
  Summary::Value& add(const std::string& tag, std::string_view description, const char* plugin) {
    Summary::Value& value = *summary_.add_value();
    value.set_tag(tag);
    if (described_.insert(tag).second) {
      value.mutable_metadata()->mutable_plugin_data()->set_plugin_name(plugin);
      value.mutable_metadata()->set_summary_description(std::string(description));
    }
    return value;
  }
  Summary& summary_;
  std::set<std::string>& described_;
};

void add_scalars(const Json& row, Values& values) {
  for (const auto& [key, value] : row.items()) {
    if (!value.is_number() || key == "step") continue;
    const auto known = std::ranges::find(kScalarTags, std::string_view(key), &ScalarTag::key);
    if (known != std::end(kScalarTags))
      values.scalar(std::string(known->tag), known->description, value.get<double>());
    else
      values.scalar("other/" + key, "as in metrics.jsonl", value.get<double>());
  }
  if (const auto distances = row.find("accuracy_by_distance"); distances != row.end())
    for (const Json& d : *distances)
      values.scalar(fmt::format("accuracy/distance_{:05}_to_{:05}", d.at("from").get<std::int64_t>(), d.at("to").get<std::int64_t>()),
                    "right answers of a synthetic task that stand so many tokens back / all such answers", d.at("accuracy").get<double>());
  const auto parts = row.find("validation");  // of several datasets, each
  if (parts == row.end()) return;
  for (const Json& part : *parts) {
    const std::string group = "validation/" + part.at("data").get<std::string>();
    values.scalar(group + "/loss", "nats a token of this dataset", part.at("loss").get<double>());
    values.scalar(group + "/bits_per_byte", "of this dataset", part.at("bits_per_byte").get<double>());
  }
}

void add_heads(const EventFile::Heads& heads, Values& values) {
  const auto tag = [](std::string_view what, std::size_t layer) { return fmt::format("{}/layer_{:02}", what, layer); };
  for (std::size_t l = 0; l < heads.layers.size(); ++l) {
    values.scalar(tag("edge_sparsity", l), "1 - active / causal edges of the layer", heads.layers[l].edge_sparsity);
    values.scalar(tag("tile_skip_rate", l), "1 - active / causal tiles of the layer", heads.layers[l].tile_skip_rate);
  }
  for (const auto& [key, layers] : heads.values.items())
    for (std::size_t l = 0; l < layers.size(); ++l)
      values.histogram(tag(key, l), "over the heads of the layer", layers[l].get<std::vector<double>>());
  if (const auto share = heads.values.find("active_share"); share != heads.values.end())
    values.image("occupancy/active_share",
                 "Active / causal edges by layer (first on top) and head (first on the left): viridis, logarithmic from 0.01 % (dark) to 100 % "
                 "(bright); grey: none.",
                 occupancy_image(share->get<std::vector<std::vector<double>>>()));
}

}  // namespace

bool is_event_file(const std::string& name) { return name.starts_with(kPrefix); }

EventFile::EventFile(const std::string& directory, std::int64_t first_step) : file_(directory + "/" + next_name(directory)) {
  Event version, start;
  version.set_wall_time(now());
  version.set_file_version("brain.Event:2");
  start.set_wall_time(version.wall_time());
  start.set_step(first_step);
  start.mutable_session_log()->set_status(tensorboard::SessionLog::START);
  file_.append(record(version) + record(start));
}

void EventFile::append(const Json& row, const Heads* heads) {
  Event event;
  event.set_wall_time(now());
  event.set_step(row.at("step").get<std::int64_t>());
  Values values(*event.mutable_summary(), described_);
  add_scalars(row, values);
  if (heads) add_heads(*heads, values);
  file_.append(record(event));
}

}  // namespace tessera
