#include "trainer/report/page.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "trainer/progress.h"
#include "trainer/report/report_files.h"

namespace tessera {

namespace {

using Json = nlohmann::ordered_json;

/// The template with each {{name}} replaced. What is put in is not looked at again.
std::string fill(const std::string& text, const std::map<std::string, std::string>& values) {
  std::string out;
  std::size_t from = 0;
  for (std::size_t open; (open = text.find("{{", from)) != std::string::npos;) {
    const std::size_t close = text.find("}}", open);
    out += text.substr(from, open - from) + values.at(text.substr(open + 2, close - open - 2));
    from = close + 2;
  }
  return out + text.substr(from);
}

/// JSON for inside <script>: no "</" or "<!" in it.
std::string script_json(const Json& json) {
  const std::string text = json.dump(-1, ' ', false, Json::error_handler_t::replace);
  std::string out;
  for (const char c : text) out += c == '<' ? "\\u003c" : std::string(1, c);
  return out;
}

struct Cell {
  std::string text;
  std::string value;  // to sort by; "": none, and `why`
  std::string why{};  // a title
};

/// A name that may break after its commas.
std::string name_html(const std::string& name) {
  std::string out;
  for (const char c : xml_text(name)) out += c == ',' ? ",<wbr>" : std::string(1, c);
  return out;
}

std::string html(const Cell& c) {
  if (c.value.empty()) return fmt::format(R"(<td><abbr title="{}">{}</abbr></td>)", xml_text(c.why), c.text.empty() ? "\u2013" : xml_text(c.text));
  const std::string title = c.why.empty() ? "" : fmt::format(R"( title="{}")", xml_text(c.why));
  return fmt::format(R"(<td data-value="{}"{}>{}</td>)", xml_text(c.value), title, name_html(c.text));
}

template <class Text>
Cell number_cell(const Json& value, const std::string& why, Text text) {
  if (!value.is_number()) return {"", "", why};
  return {text(value.get<double>()), fmt::format("{}", value.get<double>())};
}

/// A mean over seeds with its spread.
Cell mean_cell(const Json& mean, const Json& spread, const std::string& why) {
  Cell cell = number_cell(mean, why, [](double v) { return fmt::format("{:.4f}", v); });
  if (spread.is_number()) cell.text += fmt::format(" \u00b1 {:.4f}", spread.get<double>());
  return cell;
}

Cell memory_cell(const Json& row) {
  Cell cell = number_cell(row["memory_bytes"], "not recorded yet", format_bytes);
  const auto& runs = row["runs"];
  if (!cell.value.empty() && std::ranges::any_of(runs, [](const Json& run) { return run["memory_planned"] == true; }))
    cell.why = "as planned before the run: the device does not say what was in use";
  return cell;
}

std::string table(const Report& report) {
  struct Column {
    std::string title, explanation;
    bool text = false;
  };
  std::vector<Column> columns = {{"#", "number in the figures"},
                                 {"variant", "", true},
                                 {"state", "of its runs", true},
                                 {"validation loss", loss_unit(report) + ", \u00b1 standard deviation over seeds"}};
  const bool accuracy = std::ranges::any_of(report.variants, [](const Json& row) { return row["accuracy"].is_number(); });
  if (accuracy) columns.push_back({"accuracy", "at the answers of its synthetic task, \u00b1 standard deviation over seeds"});
  columns.insert(columns.end(), {{"over softmax", "validation loss above that of the softmax twin, over the seeds that both have"},
                                 {"edges zero", "1 - active / causal edges, in the last step"}});
  for (const int size : kTileSizes)
    columns.push_back(
        {fmt::format("tiles skipped, {}", size), fmt::format("1 - active / causal tiles of {0} x {0}, measured on validation sequences", size)});
  columns.push_back({"tokens/s", "median of the last half of the steps"});
  columns.push_back({"attention", "its share of a step's time, forward and backward, timed at each evaluation: median over the later half of a run"});
  columns.push_back({"memory a rank", "in use on the device, else as planned before the run; all of it is allocated at the start"});
  columns.push_back({"time a run", "of steps, without evaluation and checkpoints"});
  std::string out = "<table>\n<thead><tr>";
  for (std::size_t i = 0; i < columns.size(); ++i)
    out += fmt::format(R"(<th scope="col" title="{}"{}{}><button type="button">{}</button></th>)", xml_text(columns[i].explanation),
                       columns[i].text ? " data-text=\"1\"" : "", i == 3 ? " aria-sort=\"ascending\"" : "", columns[i].title);
  out += "</tr></thead>\n<tbody>\n";
  std::vector<std::pair<int, const Json*>> rows;
  for (const Json& row : report.variants) rows.emplace_back(static_cast<int>(rows.size()) + 1, &row);
  std::ranges::stable_sort(rows, {}, [](const auto& r) {
    const Json& loss = (*r.second)["validation_loss"];
    return loss.is_number() ? loss.template get<double>() : INFINITY;
  });
  for (const auto& [number, pointer] : rows) {
    const Json& row = *pointer;
    const std::string variant = row["variant"].get<std::string>();
    const bool softmax = row["softmax"].get<bool>(), provisional = row["provisional"].get<bool>();
    std::string no_tiles;
    for (const ReportRun& run : report.runs)
      if (run.variant == variant && no_tiles.empty()) no_tiles = run.no_tiles;
    std::vector<Cell> cells = {
        {std::to_string(number), std::to_string(number)},
        {variant_label(variant, softmax), variant},
        {row["state"].get<std::string>(), row["state"].get<std::string>(), provisional ? "no run is finished: numbers so far" : ""},
        mean_cell(row["validation_loss"], row["validation_loss_sd"], "no validation loss yet")};
    if (accuracy) cells.push_back(mean_cell(row["accuracy"], row["accuracy_sd"], "only of synthetic tasks"));
    cells.insert(cells.end(), {number_cell(row["over_twin"],
                                           softmax                 ? "this is softmax"
                                           : row["twin"].is_null() ? "there is no softmax twin"
                                                                   : "it and its twin have no seed in common that both have finished",
                                           [](double v) { return fmt::format("{:+.4f}", v); }),
                               number_cell(row["edge_sparsity"], softmax ? "softmax: every visible edge is active" : "no step yet",
                                           [](double v) { return fmt::format("{:.4f}", v); })});
    for (std::size_t size = 0; size < kTileSizes.size(); ++size)
      cells.push_back(
          number_cell(row["skip_rates"].is_null() ? Json() : row["skip_rates"][size], no_tiles, [](double v) { return fmt::format("{:.4f}", v); }));
    cells.push_back(number_cell(row["tokens_per_s"], "no step yet", format_count));
    cells.push_back(
        number_cell(row["attention_share"], "not measured: a run measures it when it evaluates", [](double v) { return fmt::format("{:.3f}", v); }));
    cells.push_back(memory_cell(row));
    cells.push_back(number_cell(row["seconds"], "no step yet", format_duration));
    out += fmt::format(R"(<tr data-v="{}" class="{}{}">)", xml_text(variant), softmax ? "twin" : "", provisional ? " provisional" : "");
    for (const Cell& cell : cells) out += html(cell);
    out += "</tr>\n";
  }
  return out + "</tbody>\n</table>";
}

std::string table_caption(const Report& report) {
  std::int64_t runs = 0, sequences = 0, fewest = 0, most = 0;
  for (const ReportRun& run : report.runs) {
    if (!run.tiles) continue;
    sequences = std::max(sequences, run.tiles->sequences);
    fewest = runs == 0 ? run.tiles->tokens : std::min(fewest, run.tiles->tokens);
    most = std::max(most, run.tiles->tokens);
    ++runs;
  }
  std::string text = "Means over the finished runs of a variant; in italics: no run is finished, numbers so far. ";
  if (!report.base.empty()) text += report.base + ". ";
  if (runs == 0) {
    text += "Tiles skipped were not measured. ";
  } else {
    text += fmt::format("Tiles skipped: of each run's newest checkpoint, on {} validation sequence{} of {} tokens, in fp32 on the CPU. ", sequences,
                        sequences == 1 ? "" : "s", fewest == most ? fmt::format("{}", most) : fmt::format("{} to {}", fewest, most));
  }
  text +=
      "Losses are of the runs' own evaluations, and compare only between runs on the same text, tokenizer and context, or the same synthetic task.";
  return text;
}

std::string figure_html(const Figure& f) {
  return fmt::format("<figure id=\"{}\">\n<h3>{}</h3>\n{}\n<figcaption class=\"caption\">{} <span class=\"tools\"></span></figcaption>\n</figure>\n",
                     f.id, xml_text(f.title), svg_element(f), xml_text(f.caption));
}

std::string run_about(const ReportRun& run) {
  const AttentionConfig& a = run.config.model.attention;
  std::string text = fmt::format("{}, step {} of {}; {}", name_of(run.state.kind), run.state.step, run.state.steps, attention_name(run.config));
  text += fmt::format(", tiles {} x {} in training", a.tile_query, a.tile_key);
  if (!run.state.error.empty()) text += ". It failed: " + run.state.error;
  if (run.heads.empty() && run.state.step > 0)
    text += fmt::format(". Neither active share nor thresholds by head: no row of metrics.jsonl has them (log.heads_every is {})",
                        run.config.log.heads_every);
  if (!run.no_tiles.empty()) text += ". No tile map: " + run.no_tiles;
  return text;
}

}  // namespace

std::string report_page(const Report& report, const std::vector<Figure>& figures, const std::string& created) {
  std::string notices;
  if (!report.notices.empty()) {
    notices = fmt::format("<details class=\"notices\"{}><summary>{} notice{}</summary><ul>", report.notices.size() <= 5 ? " open" : "",
                          report.notices.size(), report.notices.size() == 1 ? "" : "s");
    for (const std::string& notice : report.notices) notices += fmt::format("<li>{}</li>", xml_text(notice));
    notices += "</ul></details>";
  }
  std::string of_all, runs, choices;
  Json csv = Json::object();
  for (const Figure& f : figures) {
    csv[f.id] = f.csv;
    if (f.run.empty()) of_all += figure_html(f);
  }
  std::size_t number = 0;
  for (const ReportRun& run : report.runs) {
    const std::string id = fmt::format("run-{}", ++number);
    choices += fmt::format(R"(<option value="{}">{} ({})</option>)", id, xml_text(run.name), name_of(run.state.kind));
    runs += fmt::format("<article class=\"run\" id=\"{}\"><div><h3>{}</h3><p class=\"about\">{}</p></div>\n", id, xml_text(run.name),
                        xml_text(run_about(run)));
    for (const Figure& f : figures)
      if (f.run == run.name) runs += figure_html(f);
    runs += "</article>\n";
  }
  return fill(
      kPageTemplate,
      {{"title", xml_text(report.title)},
       {"about", xml_text(created)},
       {"style", kPageStyle + figure_style()},
       {"notices", notices},
       {"table", table(report)},
       {"table_caption", xml_text(table_caption(report))},
       {"figures", of_all},
       {"choices", choices},
       {"runs", runs},
       {"data",
        script_json(
            {{"title", report.title}, {"variants", report.variants}, {"notices", report.notices}, {"figure_style", figure_style()}, {"csv", csv}})},
       {"script", kPageScript}});
}

}  // namespace tessera
