// Loss against tokens, time, sparsity and speed; accuracy against distance.

#include <algorithm>
#include <cmath>
#include <map>

#include "trainer/evaluate.h"
#include "trainer/progress.h"
#include "trainer/report/figures.h"

namespace tessera {

namespace {

using Json = nlohmann::ordered_json;

constexpr double kWidth = 760, kHeight = 360;
constexpr std::size_t kBuckets = 200;  // of a curve: up to twice as many points
constexpr double kStart = 0.05;        // share of a run whose losses, from those of guessing down, do not set the scale
constexpr double kDiverged = 2;        // nor do losses above the highest that a run begins with, times this
constexpr std::size_t kFew = 12;       // variants whose training losses can be told apart

struct Style {
  std::size_t index = 0;
  bool twin = false;
};

std::map<std::string, Style> styles(const Report& report) {
  std::map<std::string, Style> out;
  std::size_t index = 0, twins = 0;
  for (const Json& row : report.variants) {
    const bool twin = row["softmax"].get<bool>();
    out[row["variant"].get<std::string>()] = {twin ? twins++ : index++, twin};
  }
  return out;
}

std::string with_class(const char* css, const Style& style) {
  const std::string line = series_class(style.index, style.twin);
  return css + line.substr(line.find(' '));
}

/// Seconds as what a reader counts in.
std::pair<double, const char*> time_unit(double most) {
  if (most > 2 * 3600) return {3600, "hours"};
  if (most > 180) return {60, "minutes"};
  return {1, "seconds"};
}

std::string plain(double value) { return fmt::format("{:.6g}", value); }

double number_or(const Json& value, double other) { return value.is_number() ? value.get<double>() : other; }

}  // namespace

Figure loss_curves(const Report& report, Against against) {
  const bool time = against == Against::time, few = report.variants.size() <= kFew;
  const auto series = styles(report);
  const auto draws_training = [&](const ReportRun& run) { return few || run.validation.size() < 2; };  // two make a line
  const auto at = [&](const ReportRun::Loss& l) { return time ? l.seconds : l.tokens; };
  double most = 0, low = INFINITY, high = -INFINITY, begun = -INFINITY;
  for (const ReportRun& run : report.runs) {
    if (!run.training.empty()) begun = std::max(begun, run.training.front().loss);
    for (const auto* losses : {&run.training, &run.validation}) {
      if (losses->empty() || (losses == &run.training && !draws_training(run))) continue;
      const double end = at(losses->back());
      most = std::max(most, end);
      std::vector<double> later;  // a spike does not set the scale either
      for (const auto& l : *losses) {
        low = std::min(low, l.loss);
        if (at(l) >= kStart * end) later.push_back(l.loss);
      }
      const std::size_t place = later.size() - 1 - later.size() / 100;
      std::ranges::nth_element(later, later.begin() + static_cast<std::ptrdiff_t>(place));
      high = std::max(high, later[place]);
    }
  }
  if (std::isfinite(begun)) high = std::min(high, std::max(low, kDiverged * begun));
  if (!std::isfinite(low)) low = 0, high = 1;
  const auto [unit, unit_name] = time ? time_unit(most) : std::pair<double, const char*>{1, "tokens"};
  Plot::Axis x = linear_axis(time ? fmt::format("time in steps, {}", unit_name) : "tokens", 0, most > 0 ? most / unit : 1, 7,
                             [&](double v) { return time ? plain(v) : tick_count(v); });
  x.low = 0;
  std::erase_if(x.ticks, [](const Plot::Axis::Tick& t) { return t.at < 0; });
  Plot plot(kWidth, kHeight, x, linear_axis("loss, " + loss_unit(report), low, high, 7, plain));
  Csv csv({"run", "series", "step", time ? "seconds" : "tokens", "loss"});
  // The twin is drawn last, over the others.
  std::vector<const ReportRun*> order;
  for (const bool twin : {false, true})
    for (const ReportRun& run : report.runs)
      if (series.at(run.variant).twin == twin) order.push_back(&run);
  for (const bool validation : {false, true}) {
    for (const ReportRun* run : order) {
      const Style style = series.at(run->variant);
      std::vector<Point> points;  // x: the place in `losses`, so that what is kept is known
      const auto& losses = validation ? run->validation : run->training;
      for (std::size_t i = 0; i < losses.size(); ++i) points.push_back({static_cast<double>(i), losses[i].loss});
      std::vector<Point> drawn;
      for (const Point& p : decimate(points, kBuckets)) {
        const auto& l = losses[static_cast<std::size_t>(p.x)];
        drawn.push_back({at(l) / unit, l.loss});
        csv.row(run->name, validation ? "validation" : "training", l.step, at(l), l.loss);
      }
      const std::string tip = losses.empty() ? ""
                                             : fmt::format("{}: {} loss {:.4f} at step {}", run->name, validation ? "validation" : "training",
                                                           losses.back().loss, losses.back().step);
      if (validation || draws_training(*run)) plot.line(drawn, with_class(validation ? "line" : "train", style), tip, run->variant);
      if (!validation) continue;
      for (std::size_t i = drawn.size() > 40 ? drawn.size() - 1 : 0; i < drawn.size(); ++i)
        plot.dot(drawn[i], with_class("dot", style) + " small", fmt::format("{}: validation loss {:.4f}", run->name, drawn[i].y), run->variant);
    }
  }
  std::vector<LegendEntry> legend;
  for (const Json& row : report.variants) {
    const std::string variant = row["variant"].get<std::string>();
    const Style style = series.at(variant);
    legend.push_back({variant_label(variant, style.twin), with_class("line", style), variant});
  }
  plot.legend(legend);
  return plot.figure(
      time ? "loss_time" : "loss_tokens", time ? "Loss against time" : "Loss against tokens",
      fmt::format("{} {}Spikes, the first {:.0f} % of a run and what has diverged may lie above the picture.",
                  few ? "Thin: training loss of each step; of long runs the lowest and highest of each stretch. Thick, with dots: validation."
                      : "Validation loss, and thin that of training where there is no other; of so many variants the rest is in the CSV alone.",
                  time ? "Time is that of steps alone, without evaluation and checkpoints. " : "", 100 * kStart),
      csv);
}

namespace {

/// Zero edges on a scale that grows with each halving of what is left.
double sparsity_place(double sparsity) { return -std::log10(std::max(1e-6, 1 - sparsity)); }

Plot::Axis sparsity_axis(double low, double high) {
  const double width = std::max(0.6, high - low), middle = (low + high) / 2;
  low = middle - width / 2;
  high = middle + width / 2;
  Plot::Axis axis{"edges that are zero (logarithmic in those that are not)", std::max(-0.02, low - 0.1 * width), high + 0.1 * width, {}};
  double last = -1;
  for (double power = 1; power > 1e-6; power /= 10)
    for (const double m : {1.0, 0.7, 0.5, 0.3, 0.2, 0.15}) {
      const double density = m * power, at = -std::log10(density);
      if (at < axis.low || at > axis.high || at - last < (axis.high - axis.low) / 12) continue;
      axis.ticks.push_back({at, fmt::format("{:.8g} %", 100 * (1 - density))});
      last = at;
    }
  return axis;
}

/// Whether all runs learned from the same data in sequences of the same length: losses on different ones have no common front.
bool same_data(const Report& report) {
  const auto data = [](const ReportRun& run) {
    const DataConfig& d = run.config.data;
    std::vector<std::string> paths{d.path};
    for (const MixEntry& entry : d.mix) paths.push_back(entry.path);
    return std::tuple(paths, d.synthetic, run.config.model.context);
  };
  return std::ranges::all_of(report.runs, [&](const ReportRun& run) { return data(run) == data(report.runs.front()); });
}

/// The highest loss that sets the scale: where up to a quarter of the variants are above the others by more than twice the others' range (and 0.02
/// nats), theirs do not.
double highest_shown(std::vector<double> losses) {
  std::ranges::sort(losses);
  for (std::size_t i = std::max<std::size_t>(2, losses.size() - losses.size() / 4); i < losses.size(); ++i)
    if (losses[i] - losses[i - 1] > std::max(0.02, 2 * (losses[i - 1] - losses[0]))) return losses[i - 1];
  return losses.empty() ? -INFINITY : losses.back();
}

Plot::Axis speed_axis(double low, double high) {
  if (high < 8 * low) return linear_axis("tokens a second", low, high, 6, tick_count);
  Plot::Axis axis{"tokens a second (logarithmic)", std::log10(low) - 0.05, std::log10(high) + 0.05, {}};
  for (const double t : log_ticks(std::pow(10, axis.low), std::pow(10, axis.high))) axis.ticks.push_back({std::log10(t), tick_count(t)});
  return axis;
}

}  // namespace

Figure loss_scatter(const Report& report, Against against) {
  const bool speed = against == Against::speed;
  const char* key = speed ? "tokens_per_s" : "edge_sparsity";
  struct Variant {
    std::string name, label;
    double at = 0, loss = 0, sd = 0;
    bool provisional = false;
    Style style;
  };
  const auto series = styles(report);
  std::vector<Variant> known, placed, twins;  // known: with a loss
  double least = INFINITY, most = -INFINITY, low = INFINITY, high = -INFINITY;
  std::vector<double> losses;
  std::size_t number = 0;
  for (const Json& row : report.variants) {
    ++number;
    Variant v{row["variant"].get<std::string>(),       std::to_string(number),         0, number_or(row["validation_loss"], NAN),
              number_or(row["validation_loss_sd"], 0), row["provisional"].get<bool>(), {}};
    v.style = series.at(v.name);
    if (!std::isfinite(v.loss)) continue;
    losses.push_back(v.loss);
    known.push_back(v);
    if (v.style.twin && !v.provisional) twins.push_back(v);
    if (!row[key].is_number() || (speed && row[key].get<double>() <= 0)) continue;
    v.at = row[key].get<double>();
    least = std::min(least, v.at);
    most = std::max(most, v.at);
    placed.push_back(v);
  }
  const double shown = highest_shown(losses);
  for (const Variant& v : known)
    if (v.loss <= shown || (v.style.twin && !v.provisional)) low = std::min(low, v.loss - v.sd), high = std::max(high, v.loss + v.sd);
  if (!std::isfinite(low)) low = 0, high = 1;
  if (!std::isfinite(least)) least = speed ? 1 : 0, most = speed ? 2 : 0.99;
  const Plot::Axis axis = speed ? speed_axis(least, most) : sparsity_axis(sparsity_place(least), sparsity_place(most));
  const bool logarithmic = speed && most >= 8 * least;
  const auto place = [&](double value) { return !speed ? sparsity_place(value) : logarithmic ? std::log10(value) : value; };
  const Plot::Axis loss_axis = linear_axis("validation loss, " + loss_unit(report), low, high, 7, plain);
  const double edge = loss_axis.high - 0.02 * (loss_axis.high - loss_axis.low);  // a dot there is whole
  Plot plot(kWidth, kHeight, axis, loss_axis);
  if (!speed)
    for (const Variant& twin : twins) plot.horizontal(twin.loss, with_class("level", twin.style), fmt::format("{}: {:.4f}", twin.name, twin.loss));

  const bool one_front = same_data(report);
  std::vector<Point> finished;
  std::vector<const Variant*> of_finished;
  for (const Variant& v : placed) {
    if (v.provisional || !one_front) continue;
    finished.push_back({v.at, v.loss});
    of_finished.push_back(&v);
  }
  std::vector<Point> steps;
  std::vector<const Variant*> front;
  for (const std::size_t i : pareto_front(finished)) {
    const Point p{place(finished[i].x), finished[i].y};
    if (!steps.empty()) steps.push_back({steps.back().x, p.y});  // what lies between is no better than the next
    steps.push_back(p);
    front.push_back(of_finished[i]);
  }
  if (one_front) plot.line(steps, "pareto", "Pareto front: no variant has both a lower loss and more of this");

  bool any_above = false;
  Csv csv({"number", "variant", "softmax", "provisional", key, "validation_loss", "validation_loss_sd", "pareto"});
  for (const Variant& v : placed) {
    const bool best = std::ranges::find(front, &v) != front.end();
    const bool far = v.loss > loss_axis.high;  // a twin, or a spread, may have made room for what is above the others
    any_above |= far;
    const Point dot{place(v.at), far ? edge : v.loss};
    if (v.sd > 0 && !far) plot.vertical(dot.x, v.loss - v.sd, v.loss + v.sd, with_class("spread", v.style));
    const std::string what = speed ? fmt::format("{} tokens/s", format_count(v.at)) : fmt::format("{:.4f} of the edges zero", v.at);
    plot.dot(dot, with_class("dot", v.style) + (v.provisional ? " hollow" : ""),
             fmt::format("{}: loss {:.4f}{}, {}{}", v.name, v.loss, v.sd > 0 ? fmt::format(" \u00b1 {:.4f}", v.sd) : "", what,
                         v.provisional ? ", not finished"
                         : best        ? ", on the front"
                                       : ""),
             v.name);
    plot.note(dot, far ? fmt::format("{}: {:.4g}", v.label, v.loss) : v.label);
    csv.row(v.label, v.name, v.style.twin ? "true" : "false", v.provisional ? "true" : "false", v.at, v.loss, v.sd > 0 ? v.sd : NAN,
            best ? "true" : "false");
  }
  std::vector<LegendEntry> legend;
  number = 0;
  for (const Json& row : report.variants) {
    const std::string variant = row["variant"].get<std::string>();
    legend.push_back(
        {fmt::format("{} {}", ++number, variant_label(variant, series.at(variant).twin)), with_class("line", series.at(variant)), variant});
  }
  plot.legend(legend);
  return plot.figure(
      speed ? "loss_speed" : "loss_sparsity", speed ? "Loss against speed" : "Loss against sparsity",
      fmt::format("A dot a variant, numbered as below: mean over seeds, its bar the standard deviation over them; hollow: no run is finished. "
                  "{}{}{}",
                  one_front ? "Stepped line: the Pareto front." : "No Pareto front: the runs learn from different data or contexts.",
                  speed           ? ""
                  : twins.empty() ? ""
                                  : " Dashed level: the softmax twin.",
                  any_above ? " At the upper edge, with its loss: a variant far above the others." : ""),
      csv);
}

Figure accuracy_curves(const Report& report) {
  const auto series = styles(report);
  const auto place = [](std::int64_t from) { return std::log2(static_cast<double>(from)); };
  const auto distances = [](const DistanceAccuracy& a) { return distance_text(a.from, a.to); };
  std::map<std::int64_t, std::string> ticks;
  for (const ReportRun& run : report.runs)
    for (const DistanceAccuracy& a : run.accuracy) ticks[a.from] = distances(a);
  Plot::Axis x{"distance of the answer, tokens", place(ticks.begin()->first) - 0.5, place(ticks.rbegin()->first) + 0.5, {}};
  const std::size_t every = (ticks.size() + 11) / 12;  // labels that the width takes
  std::size_t n = 0;
  for (const auto& [from, text] : ticks)
    if (n++ % every == 0) x.ticks.push_back({place(from), text});
  Plot plot(kWidth, kHeight, x, linear_axis("accuracy", 0, 1, 6, plain));
  Csv csv({"run", "from", "to", "answers", "accuracy"});
  for (const bool twin : {false, true})  // drawn last, over the others
    for (const ReportRun& run : report.runs) {
      const Style style = series.at(run.variant);
      if (style.twin != twin) continue;
      std::vector<Point> points;
      for (const DistanceAccuracy& a : run.accuracy) {
        points.push_back({place(a.from), a.accuracy});
        csv.row(run.name, a.from, a.to, a.answers, a.accuracy);
      }
      plot.line(points, with_class("line", style), run.name, run.variant);
      for (std::size_t i = 0; i < points.size(); ++i) {
        const DistanceAccuracy& a = run.accuracy[i];
        plot.dot(points[i], with_class("dot", style) + " small",
                 fmt::format("{}: {:.4f} of {} answers, {} token{} back", run.name, a.accuracy, a.answers, distances(a), a.to == 1 ? "" : "s"),
                 run.variant);
      }
    }
  std::vector<LegendEntry> legend;
  for (const Json& row : report.variants) {
    const std::string variant = row["variant"].get<std::string>();
    if (std::ranges::none_of(report.runs, [&](const ReportRun& run) { return run.variant == variant && !run.accuracy.empty(); })) continue;
    const Style style = series.at(variant);
    legend.push_back({variant_label(variant, style.twin), with_class("line", style), variant});
  }
  plot.legend(legend);
  return plot.figure(
      "accuracy_distance", "Accuracy by distance",
      "The share of the answers of each synthetic task that are the likeliest token, by how many tokens back they stand. A line a run, "
      "of its last evaluation.",
      csv);
}

}  // namespace tessera
