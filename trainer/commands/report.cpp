// tessera report: one page that shows what runs did.

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <charconv>
#include <ctime>
#include <filesystem>
#include <iostream>
#include <memory>

#include "data/files.h"
#include "trainer/commands/commands.h"
#include "trainer/progress.h"
#include "trainer/report/page.h"

namespace tessera {

namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

struct Options {
  std::vector<std::string> inputs, sets, heads;
  std::string output = "report.html", figures;
  MeasureOptions measure;
  bool overwrite = false, json = false;
};

/// "3.0": layer 3, head 0.
Head parse_head(const std::string& text) {
  Head head;
  const char *first = text.data(), *end = first + text.size();
  const auto layer = std::from_chars(first, end, head.first);
  if (layer.ec == std::errc() && layer.ptr != end && *layer.ptr == '.') {
    const auto number = std::from_chars(layer.ptr + 1, end, head.second);
    if (number.ec == std::errc() && number.ptr == end && head.first >= 0 && head.second >= 0) return head;
  }
  throw ConfigError(fmt::format("--head {}: expected LAYER.HEAD, counted from 0, as 3.0", text));
}

/// Before the work: what would be written must not be in the way.
void check_places(const Options& o) {
  const auto check_folder = [](const std::string& option, const std::string& path) {
    if (!fs::is_directory(folder_of(path)))
      throw ConfigError(fmt::format("{} {}: there is no folder {}; make it first", option, path, folder_of(path)));
  };
  check_folder("--output", o.output);
  if (fs::is_directory(o.output)) throw ConfigError(fmt::format("--output {}: expected a file to write, found a folder", o.output));
  if (fs::exists(o.output) && !o.overwrite) throw ConfigError(fmt::format("--output {}: is there already; --overwrite replaces it", o.output));
  if (o.figures.empty()) return;
  check_folder("--figures", o.figures);
  if (fs::exists(o.figures) && !fs::is_directory(o.figures))
    throw ConfigError(fmt::format("--figures {}: expected a folder, found a file", o.figures));
  if (fs::is_directory(o.figures) && !fs::is_empty(o.figures) && !o.overwrite)
    throw ConfigError(
        fmt::format("--figures {}: the folder is not empty; --overwrite replaces files of the same names and leaves others", o.figures));
}

Report gather(const Options& o, const GatherOptions& gathering) {
  bool sweeps = false;
  for (const std::string& input : o.inputs) {
    if (!fs::exists(input)) throw ConfigError(fmt::format("{}: there is no such file or folder; expected run folders, or a sweep file", input));
    if (fs::exists(input + "/sweep.json"))
      throw ConfigError(fmt::format("{}: the folder of a sweep; expected the sweep's file, or run folders, as {}/*/", input, input));
    sweeps = sweeps || !fs::is_directory(input);
  }
  if (!sweeps) {
    if (!o.sets.empty()) throw ConfigError("--set: only of a sweep file");
    return gather(o.inputs, gathering);
  }
  if (o.inputs.size() > 1) throw ConfigError("a sweep file stands alone: one sweep file, or run folders");
  const Sweep sweep = expand_sweep(read_sweep_file(o.inputs[0], o.sets));
  Report report = gather(sweep, gathering);
  report.notices.insert(report.notices.begin(), sweep.notices.begin(), sweep.notices.end());
  return report;
}

void report(const Options& o) {
  std::vector<Head> heads;
  for (const std::string& text : o.heads) heads.push_back(parse_head(text));
  check_places(o);
  Console console(Console::mode_for(0, stderr), stderr);
  GatherOptions gathering;
  gathering.measure = o.measure;
  gathering.progress = [&](const std::string& line) { console.progress(line, true); };
  const Report found = gather(o, gathering);
  console.clear();
  for (const Head& head : heads)
    if (std::ranges::none_of(found.runs,
                             [&](const ReportRun& run) { return head.first < run.config.model.layers && head.second < run.config.model.heads; }))
      throw ConfigError(fmt::format("--head {}.{}: no run has such a layer and head", head.first, head.second));
  for (const std::string& notice : found.notices) fmt::print(stderr, "tessera: note: {}\n", notice);

  const std::vector<Figure> figures = draw_figures(found, heads);
  const std::string created =
      fmt::format("{} run{}, {} variant{}. Made by tessera report {}, {:%Y-%m-%d %H:%M} UTC.", found.runs.size(), found.runs.size() == 1 ? "" : "s",
                  found.variants.size(), found.variants.size() == 1 ? "" : "s", TESSERA_VERSION, fmt::gmtime(std::time(nullptr)));
  const std::string page = report_page(found, figures, created);
  Json files = Json::array();
  if (!o.figures.empty()) {
    make_folder(o.figures);
    for (const Figure& figure : figures) {
      const std::string base = o.figures + "/" + figure.id;
      write_file(base + ".svg", svg_file(figure));
      write_file(base + ".csv", figure.csv);
      files.push_back(base + ".svg");
      files.push_back(base + ".csv");
    }
  }
  write_file(o.output, page);
  if (o.json) {
    std::cout << Json{{"page", o.output}, {"figures", files}, {"notices", found.notices}, {"variants", found.variants}}.dump(2) << "\n";
    return;
  }
  std::cout << fmt::format("{}: {} figures of {} run{}, {}\n", o.output, figures.size(), found.runs.size(), found.runs.size() == 1 ? "" : "s",
                           format_bytes(static_cast<double>(page.size())));
  if (!o.figures.empty()) std::cout << fmt::format("{}: {} files, each figure as SVG and its data as CSV\n", o.figures, files.size());
}

}  // namespace

void add_report_command(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("report", "One page on runs or a sweep: losses, sparsity, tiles, thresholds, as figures and a table");
  command->add_option("RUN|SWEEP.yaml", o->inputs, "Run folders, or one sweep file")->type_name("")->required();
  command->add_option("-o,--output", o->output, "The page to write")->type_name("FILE")->capture_default_str();
  command->add_option("--figures", o->figures, "Write every figure as SVG and its data as CSV into this folder too")->type_name("DIR");
  command->add_flag("--overwrite", o->overwrite, "Replace files that are there");
  command->add_option("--set", o->sets, "Of a sweep: the same as given to `tessera sweep`")->type_name("KEY=VALUE")->expected(1)->take_all();
  command->add_option("--head", o->heads, "A head whose tiles to show, as LAYER.HEAD from 0; repeat for more (default: all of few, else some)")
      ->type_name("L.H")
      ->expected(1)
      ->take_all();
  command->add_option("--sequences", o->measure.sequences, "Validation sequences on which each run's tiles are measured, on the CPU; 0: none")
      ->type_name("N")
      ->check(CLI::Range(0, 10000))
      ->capture_default_str();
  command->add_option("--tokens", o->measure.tokens, "Tokens of each, at most; no more than the context")
      ->type_name("N")
      ->check(CLI::Range(16, 1 << 20))
      ->capture_default_str();
  command->add_option("--threads", o->measure.threads, "CPU threads; 0: OMP_NUM_THREADS or all cores")
      ->type_name("N")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  command->add_flag("--json", o->json, "Print the table's numbers and the files as JSON");
  command->footer(
      "The page is one file that needs no network. Runs may still be at work. Curves of long runs are drawn with fewer points, their lowest and "
      "highest\n"
      "kept; what is drawn is what the CSV has.\n"
      "Examples:\n"
      "  tessera report configs/sweeps/tiny.yaml -o tiny.html\n"
      "  tessera report runs/mine runs/softmax -o report.html --figures figures");
  command->callback([o] {
    while (o->figures.size() > 1 && o->figures.ends_with('/')) o->figures.pop_back();
    report(*o);
  });
}

}  // namespace tessera
