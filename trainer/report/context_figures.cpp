// Speed and memory against the length of the sequences.

#include <algorithm>
#include <cmath>
#include <map>

#include "trainer/progress.h"
#include "trainer/report/figures.h"

namespace tessera {

namespace {

using Json = nlohmann::ordered_json;

constexpr double kWidth = 760, kHeight = 360;

/// Variants that are one but for the context and how many sequences are taken at a time.
struct Curve {
  std::string name;
  bool softmax = false;
  struct At {
    std::int64_t context = 0;
    double value = 0;
    std::string variant;
  };
  std::vector<At> at{};
};

/// What a run computes, but for the context and what goes with it: how many sequences at a time, how many steps in the same time.
std::string without_context(const Config& config) {
  std::string text;
  for (const Key& key : schema()) {
    bool counts = key_counts(key.path);
    for (const char* free : {"model.context", "model.vocabulary", "train.micro_batch", "train.steps", "optimizer.warmup", "run.seed"})
      counts = counts && key.path != free;
    if (counts) text += key.path + "=" + key.write(config).dump() + "\n";
  }
  return text;
}

std::string context_text(std::int64_t tokens) { return tokens % 1024 == 0 ? fmt::format("{}k", tokens / 1024) : std::to_string(tokens); }

/// What distinguishes a variant, as the sweep sets it, without its context; its attention where that is nothing.
std::string name_of(const Json& row, const Config& config) {
  std::string name;
  for (const auto& [key, value] : row["differs"].items())
    if (key != "model.context" && key != "train.micro_batch") name += (name.empty() ? "" : ", ") + setting_text(key, value);
  return name.empty() ? attention_name(config) : name;
}

std::vector<Curve> curves(const Report& report, const char* key) {
  struct One {
    const Json* row;
    const Config* config;
    std::string kind;
  };
  std::vector<One> all;
  std::map<std::pair<std::string, std::int64_t>, int> at_context;
  bool micro_batches = false;  // several at one context: each makes a curve
  for (const Json& row : report.variants) {
    if (!row[key].is_number() || row[key].get<double>() <= 0) continue;
    const auto run = std::ranges::find(report.runs, row["variant"].get<std::string>(), &ReportRun::variant);
    all.push_back({&row, &run->config, without_context(run->config)});
    micro_batches |= ++at_context[{all.back().kind, run->config.model.context}] > 1;
  }
  std::vector<Curve> out;
  std::map<std::string, std::size_t> places;
  std::map<std::string, int> names;
  for (const One& one : all) {
    const std::string more = micro_batches ? fmt::format(", train.micro_batch: {}", one.config->train.micro_batch) : "";
    const auto [place, fresh] = places.try_emplace(one.kind + more, out.size());
    if (fresh) {
      std::string name = name_of(*one.row, *one.config) + more;
      if (const int n = ++names[name]; n > 1) name += fmt::format(" ({})", n);
      out.push_back({.name = name, .softmax = (*one.row)["softmax"].get<bool>()});
    }
    out[place->second].at.push_back({one.config->model.context, (*one.row)[key].get<double>(), (*one.row)["variant"].get<std::string>()});
  }
  for (Curve& curve : out) std::ranges::sort(curve.at, {}, &Curve::At::context);
  return out;
}

}  // namespace

bool has_several_contexts(const Report& report) {
  return std::ranges::any_of(report.runs, [&](const ReportRun& run) { return run.config.model.context != report.runs.front().config.model.context; });
}

Figure context_curves(const Report& report, Against against) {
  const bool speed = against == Against::speed;
  const char* key = speed ? "tokens_per_s" : "memory_bytes";
  const double unit = speed ? 1 : 1 << 30;
  std::map<std::int64_t, std::string> contexts;
  for (const ReportRun& run : report.runs) contexts[run.config.model.context] = context_text(run.config.model.context);
  const auto found = curves(report, key);
  double most = 0;
  for (const Curve& curve : found)
    for (const Curve::At& at : curve.at) most = std::max(most, at.value / unit);
  const auto place = [](std::int64_t context) { return std::log2(static_cast<double>(context)); };
  const double margin = 0.05 * (place(contexts.rbegin()->first) - place(contexts.begin()->first));
  Plot::Axis x{"tokens a sequence (logarithmic)", place(contexts.begin()->first) - margin, place(contexts.rbegin()->first) + margin, {}};
  for (const auto& [context, text] : contexts)
    if (x.ticks.empty() || place(context) - x.ticks.back().at > 0.05 * (x.high - x.low)) x.ticks.push_back({place(context), text});
  Plot plot(kWidth, kHeight, x, linear_axis(speed ? "tokens a second" : "memory a rank, GiB", 0, most > 0 ? most : 1, 7, tick_count));
  Csv csv({"series", "variant", "context", key});
  std::vector<LegendEntry> legend;
  std::size_t index = 0, twins = 0;
  for (const Curve& curve : found) {
    const std::string line = series_class(curve.softmax ? twins++ : index++, curve.softmax), dot = "dot" + line.substr(line.find(' '));
    std::vector<Point> points;
    for (const Curve::At& at : curve.at) {
      points.push_back({place(at.context), at.value / unit});
      csv.row(curve.name, at.variant, at.context, at.value);
    }
    plot.line(points, line, curve.name);
    for (std::size_t i = 0; i < points.size(); ++i)
      plot.dot(points[i], dot + " small",
               fmt::format("{}: {}", curve.at[i].variant, speed ? format_count(curve.at[i].value) + " tokens/s" : format_bytes(curve.at[i].value)));
    legend.push_back({curve.name, line});
  }
  plot.legend(legend);
  return plot.figure(
      speed ? "speed_context" : "memory_context", speed ? "Speed against context" : "Memory against context",
      fmt::format("{}, means over seeds. A line joins what differs in the context and the sequences of a micro-batch alone.",
                  speed ? "Tokens a second, median of the later half of a run's steps" : "Bytes a rank: in use on the device, or planned"),
      csv);
}

}  // namespace tessera
