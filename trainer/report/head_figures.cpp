// What becomes of each layer and head over training.

#include <algorithm>
#include <cmath>

#include "trainer/heat_scale.h"
#include "trainer/report/figures.h"

namespace tessera {

namespace {

constexpr double kWidth = 760;
constexpr std::size_t kColumns = 60;  // of a heat map

/// The class of a share's colour.
std::string level_of(double share) {
  const int level = heat_level(share);
  return level < 0 ? "hz" : fmt::format("h{}", level);
}

/// Evenly spread places of 0 .. n - 1, at most `most`, with the first and the last.
std::vector<std::size_t> spread_over(std::size_t n, std::size_t most) {
  std::vector<std::size_t> places;
  const std::size_t count = std::min(n, most);
  for (std::size_t i = 0; i < count; ++i) places.push_back(count == 1 ? n - 1 : i * (n - 1) / (count - 1));
  return places;
}

std::vector<const HeadRow*> rows_with(const ReportRun& run, std::vector<std::vector<double>> HeadRow::*what) {
  std::vector<const HeadRow*> rows;
  for (const HeadRow& row : run.heads)
    if (!(row.*what).empty()) rows.push_back(&row);
  return rows;
}

}  // namespace

Figure active_share_map(const ReportRun& run) {
  const auto rows = rows_with(run, &HeadRow::active_share);
  const int layers = run.config.model.layers, heads = run.config.model.heads;
  const double row_height = std::clamp(420.0 / (layers * heads), 2.0, 26.0), left = 62, top = 10, gap = layers * heads <= 96 ? 3 : 1;
  const auto columns = spread_over(rows.size(), kColumns);
  const double column = (kWidth - left - 110) / static_cast<double>(columns.size());
  const auto y_of = [&](int l, int h) { return top + (l * heads + h) * row_height + l * gap; };
  const double bottom = y_of(layers - 1, heads - 1) + row_height;
  std::string body;
  Csv csv({"step", "layer", "head", "active_share"});
  for (int l = 0; l < layers; ++l) {
    if (row_height * heads >= 11 || l % static_cast<int>(std::ceil(11 / (row_height * heads))) == 0)
      body += fmt::format(R"(<text class="tick" x="{}" y="{}" text-anchor="end">layer {}</text>)", coordinate(left - 6),
                          coordinate(y_of(l, 0) + row_height * heads / 2 + 4), l);
    for (int h = 0; h < heads; ++h) {
      // Neighbours of one colour are one rectangle.
      for (std::size_t c = 0; c < columns.size();) {
        const std::string level = level_of(rows[columns[c]]->active_share[l][h]);
        std::size_t end = c + 1;
        while (end < columns.size() && level_of(rows[columns[end]]->active_share[l][h]) == level) ++end;
        const double now = rows[columns[c]]->active_share[l][h];
        body += fmt::format(R"(<rect class="{}" x="{}" y="{}" width="{}" height="{}"><title>layer {} head {} step {}: {:.3g} %</title></rect>)",
                            level, coordinate(left + column * static_cast<double>(c)), coordinate(y_of(l, h)),
                            coordinate(column * static_cast<double>(end - c)), coordinate(row_height), l, h, rows[columns[c]]->step, 100 * now);
        c = end;
      }
      for (const std::size_t c : columns) csv.row(rows[c]->step, l, h, rows[c]->active_share[l][h]);
    }
  }
  for (const std::size_t i : spread_over(columns.size(), 6))
    body += fmt::format(R"(<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>)",
                        coordinate(left + column * (static_cast<double>(i) + 0.5)), coordinate(bottom + 16), rows[columns[i]]->step);
  body += fmt::format(R"(<text class="label" x="{}" y="{}" text-anchor="middle">step</text>)",
                      coordinate(left + column * static_cast<double>(columns.size()) / 2), coordinate(bottom + 34));
  const double scale = kWidth - 90, scale_height = std::max(bottom - top - 24, 110.0), cell = scale_height / kHeatLevels;
  for (int i = 0; i < kHeatLevels; ++i)
    body += fmt::format(R"(<rect class="h{}" x="{}" y="{:.2f}" width="12" height="{:.2f}"/>)", kHeatLevels - 1 - i, coordinate(scale), top + cell * i,
                        cell + 0.3);
  for (int decade = 0; decade <= static_cast<int>(kHeatDecades); ++decade)
    body += fmt::format(R"(<text class="tick" x="{}" y="{}">{:.6g} %</text>)", coordinate(scale + 17),
                        coordinate(top + scale_height * decade / kHeatDecades + 4), 100 * std::pow(10, -decade));
  body += fmt::format(R"(<rect class="hz" x="{0}" y="{1}" width="12" height="12"/><text class="tick" x="{2}" y="{3}">none</text>)", coordinate(scale),
                      coordinate(top + scale_height + 12), coordinate(scale + 17), coordinate(top + scale_height + 22));
  return {.id = "active_share",
          .title = "Active share by layer and head",
          .caption =
              fmt::format("Active edges among the causal ones, logarithmic; {} heads a layer from top to bottom. From {} of {} rows of metrics.jsonl "
                          "that have it.",
                          heads, columns.size(), rows.size()),
          .run = run.name,
          .width = kWidth,
          .height = std::max(bottom + 42, top + scale_height + 28),
          .body = body,
          .csv = csv.text()};
}

Figure threshold_curves(const ReportRun& run) {
  const auto rows = rows_with(run, &HeadRow::thresholds);
  const int layers = run.config.model.layers, heads = run.config.model.heads;
  const std::size_t buckets = layers * heads > 64 ? 20 : 60;
  double low = INFINITY, high = -INFINITY;
  for (const HeadRow* row : rows)
    for (const auto& layer : row->thresholds)
      for (const double tau : layer) low = std::min(low, tau), high = std::max(high, tau);
  Plot::Axis x = linear_axis("step", static_cast<double>(rows.front()->step), static_cast<double>(rows.back()->step), 7,
                             [](double v) { return fmt::format("{:.6g}", v); });
  Plot plot(kWidth, 320, x, linear_axis("threshold \u03c4", low, high, 6, [](double v) { return fmt::format("{:.6g}", v); }));
  Csv csv({"step", "layer", "head", "threshold"});
  std::vector<LegendEntry> legend;
  for (int l = 0; l < layers; ++l) {
    const std::string css = series_class(static_cast<std::size_t>(l), false) + (heads > 1 ? " many" : "");
    for (int h = 0; h < heads; ++h) {
      std::vector<Point> points;
      for (const HeadRow* row : rows) points.push_back({static_cast<double>(row->step), row->thresholds[l][h]});
      const auto drawn = decimate(points, buckets);
      for (const Point& p : drawn) csv.row(static_cast<std::int64_t>(p.x), l, h, p.y);
      const std::string tip = fmt::format("layer {}, head {}: {:.4g} at step {}", l, h, points.back().y, rows.back()->step);
      plot.line(drawn, css, tip);
      if (drawn.size() == 1) plot.dot(drawn[0], fmt::format("dot s{} small", l % 10), tip);
    }
    legend.push_back({fmt::format("layer {}", l), css});
  }
  plot.legend(legend);
  return plot.figure("thresholds", "Thresholds over training",
                     fmt::format("A line a head ({} a layer), coloured by layer. An edge is active when its score is above the threshold.", heads),
                     csv, run.name);
}

}  // namespace tessera
