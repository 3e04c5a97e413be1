// Tiles on real text, static patterns, and the list of all figures.

#include <algorithm>
#include <cctype>
#include <map>

#include "trainer/report/figures.h"

namespace tessera {

namespace {

constexpr double kWidth = 760, kPanel = 172, kPanelGap = 24, kTitle = 18;
constexpr std::int64_t kMostCells = 64;  // a side of a panel
constexpr std::size_t kFewHeads = 12;

/// Panels side by side, as many as the width takes.
struct Panels {
  std::string body;
  std::size_t count = 0;
  static constexpr std::size_t kColumns = 4;
  /// What `draw(x, y)` draws in a panel's upper left corner, below a title.
  template <class Draw>
  void add(const std::string& title, const std::string& tip, Draw draw) {
    const double x = static_cast<double>(count % kColumns) * (kPanel + kPanelGap) + 1;
    const double y = static_cast<double>(count / kColumns) * (kPanel + kPanelGap + kTitle);
    body += fmt::format(R"(<g><title>{}</title><text class="tick" x="{}" y="{}">{}</text><rect class="frame" x="{}" y="{}" width="{}" height="{}"/>)",
                        xml_text(tip), coordinate(x), coordinate(y + 12), xml_text(title), coordinate(x), coordinate(y + kTitle), coordinate(kPanel),
                        coordinate(kPanel));
    draw(x, y + kTitle);
    body += "</g>";
    ++count;
  }
  double height() const { return static_cast<double>((count + kColumns - 1) / kColumns) * (kPanel + kPanelGap + kTitle); }
};

/// The cells of [side, side] for which `is(row, column)` holds, as one path.
template <class Is>
std::string cells(double x, double y, std::int64_t side, const std::string& css, Is is) {
  const double cell = kPanel / static_cast<double>(side);
  std::string path;
  for (std::int64_t r = 0; r < side; ++r)
    for (std::int64_t c = 0; c < side;) {
      if (!is(r, c)) {
        ++c;
        continue;
      }
      std::int64_t end = c + 1;
      while (end < side && is(r, end)) ++end;
      path += fmt::format("M{} {}h{}v1h-{}z", c, r, end - c, end - c);
      c = end;
    }
  if (path.empty()) return "";
  return fmt::format(R"svg(<path class="{}" transform="translate({} {}) scale({:.6g})" d="{}"/>)svg", css, coordinate(x), coordinate(y), cell, path);
}

const char* name_of(TileState state) {
  switch (state) {
    case TileState::future: return "future";
    case TileState::structural: return "structural";
    case TileState::skipped: return "skipped";
    case TileState::active: return "active";
  }
  return "";
}

std::string key_entries(double y, const std::vector<std::pair<const char*, const char*>>& entries) {
  std::string out;
  double x = 1;
  for (const auto& [css, text] : entries) {
    out += fmt::format(R"(<rect class="{} outlined" x="{}" y="{}" width="12" height="12"/><text class="legend" x="{}" y="{}">{}</text>)", css,
                       coordinate(x), coordinate(y), coordinate(x + 18), coordinate(y + 10), text);
    x += 18 + 7 * static_cast<double>(std::string_view(text).size()) + 18;
  }
  return out;
}

}  // namespace

std::vector<Head> chosen_heads(const TileMeasurement& tiles, const std::vector<Head>& wanted) {
  std::vector<Head> heads;
  for (const HeadTiles& map : tiles.first_sequence) heads.emplace_back(map.layer, map.head);
  std::vector<Head> found;
  for (const Head& head : wanted)
    if (std::ranges::find(heads, head) != heads.end()) found.push_back(head);
  if (!wanted.empty()) return found;
  if (heads.size() <= kFewHeads) return heads;
  std::ranges::stable_sort(heads, {}, [&](const Head& h) { return tiles.head_skip_rate[h.first][h.second][0]; });
  for (std::size_t i = 0; i < kFewHeads; ++i) found.push_back(heads[i * (heads.size() - 1) / (kFewHeads - 1)]);
  return found;
}

Figure tile_maps(const ReportRun& run, const std::vector<Head>& heads) {
  const TileMeasurement& m = *run.tiles;
  Panels panels;
  Csv csv({"layer", "head", "tile", "query_tile", "first_key_tile", "last_key_tile", "state"});  // a row a stretch of equal tiles
  int tile = kTileSizes.front();
  for (const Head& head : heads) {
    const auto found = std::ranges::find_if(m.first_sequence, [&](const HeadTiles& t) { return Head(t.layer, t.head) == head; });
    if (found == m.first_sequence.end()) continue;
    const auto times = static_cast<int>((found->tiles + kMostCells - 1) / kMostCells);
    const HeadTiles map = coarser(*found, times);
    tile = times * kTileSizes.front();
    const auto is = [&](TileState state) { return [&map, state](std::int64_t q, std::int64_t k) { return map.state[q * map.tiles + k] == state; }; };
    const TileTally t = tally(map);
    const std::string skip = fmt::format("{:.1f} % idle", 100.0 * static_cast<double>(t.idle) / static_cast<double>(t.causal));
    panels.add(fmt::format("layer {}, head {}: {}", head.first, head.second, skip),
               fmt::format("layer {}, head {}: {} of {} causal tiles of {} x {} are structural or skipped", head.first, head.second, t.idle, t.causal,
                           tile, tile),
               [&](double x, double y) {
                 for (const TileState state : {TileState::structural, TileState::skipped, TileState::active})
                   panels.body += cells(x, y, map.tiles, fmt::format("tile-{}", name_of(state)), is(state));
               });
    for (std::int64_t q = 0; q < map.tiles; ++q)
      for (std::int64_t k = 0, last; k <= q; k = last + 1) {
        const TileState state = map.state[q * map.tiles + k];
        for (last = k; last < q && map.state[q * map.tiles + last + 1] == state;) ++last;
        csv.row(head.first, head.second, tile, q, k, last, name_of(state));
      }
  }
  const double height = panels.height();
  panels.body += key_entries(height, {{"tile-active", "active"},
                                      {"tile-skipped", "skipped: the gate let nothing through"},
                                      {"tile-structural", "structural: hidden by the pattern"}});
  return {.id = "tiles",
          .title = "Tiles on a validation sequence",
          .caption = fmt::format(
              "Queries from top to bottom, keys from left to right, tiles of {0} x {0}, on the first {1} tokens of the validation split of "
              "{2}; checkpoint of step {3}, computed in fp32 on the CPU. Idle: skipped or structural.",
              tile, m.tokens, m.data, m.step),
          .run = run.name,
          .width = kWidth + 20,
          .height = height + 20,
          .body = panels.body,
          .csv = csv.text()};
}

Figure pattern_maps(const ReportRun& run) {
  const ModelConfig& model = run.config.model;
  struct Drawn {
    int layer, head, count = 0;  // the first head that has it, and how many
  };
  std::map<std::string, Drawn> distinct;
  std::vector<std::string> order;
  for (int l = 0; l < model.layers; ++l)
    for (int h = 0; h < model.heads; ++h) {
      const std::string text = describe(model.attention.pattern.at(l, h));
      const auto [found, added] = distinct.try_emplace(text, Drawn{l, h});
      ++found->second.count;
      if (added) order.push_back(text);
    }
  Panels panels;
  Csv csv({"pattern", "tile", "query_tile", "key_tile", "visible_edges", "causal_edges"});
  std::string which;
  const std::int64_t tokens = model.context, tile = (tokens + kMostCells - 1) / kMostCells;
  for (const std::string& text : order) {
    const Drawn& d = distinct.at(text);
    const auto map = make_tile_map(model.attention.pattern, d.layer, model.heads, tokens, static_cast<int>(tile), static_cast<int>(tile));
    const TileGroup& group = map->groups[static_cast<std::size_t>(map->group_of_head[static_cast<std::size_t>(d.head)])];
    const std::int64_t side = map->query_tiles;
    which += fmt::format(" {}: {} of {} heads, {:.4g} % of the causal edges visible.", text, d.count, model.layers * model.heads,
                         200.0 * static_cast<double>(group.visible_edges) / (static_cast<double>(tokens) * static_cast<double>(tokens + 1)));
    std::vector<int> level(static_cast<std::size_t>(side * side), 0);  // 0: no edge is visible; 1 to 4: up to a quarter, ..., all causal ones
    for (std::int64_t q = 0; q < side; ++q)
      for (std::int64_t e = group.query_offsets[q]; e < group.query_offsets[q + 1]; ++e) {
        const TileEntry entry = group.query_entries[e];
        const std::int64_t queries = std::min(tile, tokens - q * tile);
        std::int64_t visible = queries * tile, causal = visible;
        if (entry.tile == q || entry.mask != TileEntry::kFull) {
          visible = causal = 0;
          for (std::int64_t r = 0; r < queries; ++r)
            for (std::int64_t c = 0; c < tile && entry.tile * tile + c <= q * tile + r; ++c) {
              ++causal;
              visible += entry.mask == TileEntry::kFull || (map->masks[(entry.mask * tile + r) * map->mask_words + c / 64] >> (c % 64) & 1);
            }
        }
        level[q * side + entry.tile] = causal == 0 ? 0 : static_cast<int>((4 * visible + causal - 1) / causal);
        csv.row(text, tile, q, std::int64_t{entry.tile}, visible, causal);
      }
    panels.add(shortened(text, 27), text, [&](double x, double y) {
      panels.body += cells(x, y, side, "tile-structural", [&](std::int64_t q, std::int64_t k) { return k <= q && level[q * side + k] == 0; });
      for (int n = 1; n <= 4; ++n)
        panels.body += cells(x, y, side, fmt::format("visible{}", n), [&](std::int64_t q, std::int64_t k) { return level[q * side + k] == n; });
    });
  }
  const double height = panels.height();
  panels.body += key_entries(
      height,
      {{"visible1", "up to 1/4 visible"}, {"visible2", "1/2"}, {"visible3", "3/4"}, {"visible4", "more, or all"}, {"tile-structural", "none"}});
  return {.id = "pattern",
          .title = "Static pattern",
          .caption = fmt::format("The share of its causal edges that each square of {0} x {0} tokens may have, for the context of {1}.{2}", tile,
                                 tokens, which),
          .run = run.name,
          .width = kWidth + 20,
          .height = height + 20,
          .body = panels.body,
          .csv = csv.text()};
}

std::string FigureNames::of(const std::string& name) {
  std::string base;
  for (const char c : name) base += std::isalnum(static_cast<unsigned char>(c)) || c == '-' ? c : '_';
  if (base.size() > 100) base.resize(100);
  std::string unique = base;
  for (int n = 2; std::ranges::find(taken_, unique) != taken_.end(); ++n) unique = fmt::format("{}_{}", base, n);
  taken_.push_back(unique);
  return unique;
}

std::vector<Figure> draw_figures(const Report& report, const std::vector<Head>& heads) {
  std::vector<Figure> figures = {loss_curves(report, Against::tokens), loss_curves(report, Against::time), loss_scatter(report, Against::sparsity),
                                 loss_scatter(report, Against::speed)};
  if (std::ranges::any_of(report.runs, [](const ReportRun& run) { return !run.accuracy.empty(); }))
    figures.insert(figures.begin(), accuracy_curves(report));
  if (has_several_contexts(report))
    for (const Against what : {Against::speed, Against::memory}) figures.push_back(context_curves(report, what));
  FigureNames names;
  for (const ReportRun& run : report.runs) {
    std::vector<Figure> own;
    const auto has = [&](auto what) { return std::ranges::any_of(run.heads, [&](const HeadRow& row) { return !(row.*what).empty(); }); };
    if (has(&HeadRow::active_share)) own.push_back(active_share_map(run));
    if (has(&HeadRow::thresholds)) own.push_back(threshold_curves(run));
    if (run.tiles)
      if (const auto chosen = chosen_heads(*run.tiles, heads); !chosen.empty()) own.push_back(tile_maps(run, chosen));
    own.push_back(pattern_maps(run));
    const std::string name = names.of(run.name);
    for (Figure& figure : own) {
      figure.id = name + "." + figure.id;
      figures.push_back(std::move(figure));
    }
  }
  return figures;
}

}  // namespace tessera
