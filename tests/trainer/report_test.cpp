// The report of made-up runs: what is gathered, drawn and written, against numbers worked out by hand.

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <regex>

#include "data/files.h"
#include "tests/trainer/config_testing.h"
#include "tests/trainer/sweep_testing.h"
#include "tests/trainer/xml_check.h"
#include "trainer/report/page.h"
#include "trainer/run_folder.h"

namespace tessera {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;
using testing::SweepFiles;
using testing::xml_problem;

TEST(Series, DecimationKeepsEndsAndExtremes) {
  std::vector<Point> points;
  for (int i = 0; i < 10000; ++i) points.push_back({i * 1.0, std::sin(i * 0.7)});
  points[4321].y = 50;
  points[8765].y = -50;
  const auto few = decimate(points, 100);
  EXPECT_LE(few.size(), 202u);
  EXPECT_EQ(few.front(), points.front());
  EXPECT_EQ(few.back(), points.back());
  EXPECT_NE(std::ranges::find(few, points[4321]), few.end());
  EXPECT_NE(std::ranges::find(few, points[8765]), few.end());
  EXPECT_TRUE(std::ranges::is_sorted(few, {}, &Point::x));
  for (const Point& p : few) EXPECT_EQ(points[static_cast<std::size_t>(p.x)], p);
  // By hand: inner points 1..6 in two stretches of three.
  const std::vector<Point> eight = {{0, 9}, {1, 1}, {2, 3}, {3, 2}, {4, 5}, {5, 5}, {6, 5}, {7, 0}};
  EXPECT_EQ(decimate(eight, 2), (std::vector<Point>{{0, 9}, {1, 1}, {2, 3}, {4, 5}, {7, 0}}));
  EXPECT_EQ(decimate(std::span(eight).first(6), 2).size(), 6u);
  EXPECT_TRUE(decimate({}, 5).empty());
}

TEST(Series, ParetoFrontIsWhatNoneBeats) {
  // x: more is better, y: less is better.
  const std::vector<Point> points = {{0.9, 2.0}, {0.95, 2.1}, {0.8, 2.05}, {0.95, 2.3}, {0.5, 1.9}, {0.99, 3.0}, {0.9, 2.0}};
  EXPECT_EQ(pareto_front(points), (std::vector<std::size_t>{4, 0, 6, 1, 5}));
  EXPECT_TRUE(pareto_front({}).empty());
}

TEST(Series, TicksAreRoundAndInside) {
  EXPECT_EQ(ticks(0, 1, 5), (std::vector<double>{0, 0.2, 0.4, 0.6000000000000001, 0.8, 1}));
  EXPECT_EQ(ticks(-3, 7, 5), (std::vector<double>{-2, 0, 2, 4, 6}));
  const auto log = log_ticks(1, 100);
  ASSERT_EQ(log.size(), 7u);
  EXPECT_DOUBLE_EQ(log[1], 2);
  EXPECT_DOUBLE_EQ(log[6], 100);
}

TEST(Svg, TextOfAnyKindIsSafe) {
  EXPECT_EQ(xml_text("a<b & \"c\" '\x01"), "a&lt;b &amp; &quot;c&quot; &#39;");
  EXPECT_EQ(shortened("\u03c4\u03c4\u03c4\u03c4", 3), "\u03c4\u03c4\u2026");
  EXPECT_EQ(shortened("abc", 3), "abc");
  Csv csv({"a", "b,c"});
  csv.row("x\"y", 1.5, std::int64_t{-2}, NAN);
  EXPECT_EQ(csv.text(), "a,\"b,c\"\r\n\"x\"\"y\",1.5,-2,\r\n");
  EXPECT_EQ(tick_count(0), "0");
  EXPECT_EQ(tick_count(1500), "1.5k");
}

TEST(Svg, NotesOfDotsThatMeetStandApart) {
  Plot plot(400, 300, {"x", 0, 1, {}}, {"y", 0, 1, {}});
  for (const double x : {0.0, 0.5, 0.5, 0.5, 0.505, 0.99}) {
    plot.dot({x, 0.5}, "dot", "");
    plot.note({x, 0.5}, "12");
  }
  std::vector<std::pair<double, double>> places;
  const std::string body = plot.body();
  const std::regex note("class=\"note\" x=\"([0-9.]+)\" y=\"([0-9.]+)\"");
  for (std::sregex_iterator i(body.begin(), body.end(), note), end; i != end; ++i) places.emplace_back(std::stod((*i)[1]), std::stod((*i)[2]));
  ASSERT_EQ(places.size(), 6u);
  for (std::size_t a = 0; a < places.size(); ++a)  // 12 wide, 9 high
    for (std::size_t b = 0; b < a; ++b)
      EXPECT_TRUE(std::abs(places[a].first - places[b].first) >= 12 || std::abs(places[a].second - places[b].second) >= 9) << a << " " << b;
  EXPECT_LT(places[5].first, 62 + 0.99 * (400 - 14 - 62));  // at the right edge, to the left
}

TEST(Tiles, CoarserTilesAreActiveWhereAPartIs) {
  using enum TileState;
  const HeadTiles map{0, 0, 3, {skipped, future, future, structural, active, future, structural, structural, skipped}};
  const HeadTiles half = coarser(map, 2);
  EXPECT_EQ(half.tiles, 2);
  EXPECT_EQ(half.state, (std::vector<TileState>{active, future, structural, skipped}));
  EXPECT_EQ(tally(map).causal, 6);
  EXPECT_EQ(tally(map).idle, 5);
  EXPECT_EQ(tally(half).idle, 2);
  EXPECT_EQ(tally(coarser(map, 8)).idle, 0);
}

TEST(Tiles, TheTableHasARowAStretch) {
  using enum TileState;
  ReportRun run;
  run.tiles.emplace();
  run.tiles->first_sequence.push_back({1, 2, 3, {active, future, future, skipped, skipped, future, structural, active, active}});
  EXPECT_EQ(tile_maps(run, {{1, 2}}).csv,
            "layer,head,tile,query_tile,first_key_tile,last_key_tile,state\r\n"
            "1,2,16,0,0,0,active\r\n"
            "1,2,16,1,0,1,skipped\r\n"
            "1,2,16,2,0,0,structural\r\n"
            "1,2,16,2,1,2,active\r\n");
}

class Reports : public SweepFiles {
 protected:
  static constexpr int kSteps = 20;
  GatherOptions nothing_measured() const {
    GatherOptions o;
    o.measure.sequences = 0;
    return o;
  }

  /// A run folder whose loss falls from 6 by 0.1 a step, with head rows every 5 steps; finished where a checkpoint is wanted.
  void run(const Config& config, int steps, double validation, bool finished, double speed = 1000) const {
    fs::create_directories(config.run.dir);
    write_file(config.run.dir + "/config.yaml", to_yaml(config));
    std::string rows;
    for (int t = 1; t <= steps; ++t) {
      Json row = {{"step", t},
                  {"tokens", 512 * t},
                  {"loss", 6 - 0.1 * t},
                  {"tokens_per_s", speed},
                  {"step_ms", 500},
                  {"edge_sparsity", validation > 2 ? 0.95 : 0.8},
                  {"tile_skip_rate", 0.25},
                  {"planned_bytes", 1 << 20}};
      if (t % 10 == 0 || t == steps) {
        row["validation_loss"] = validation + 0.01 * (steps - t);
        row["attention_share"] = 0.01 * t;
      }
      if (t % 5 == 0 && config.model.attention.gate != Gate::softmax) {
        row["active_share"] = {{0.5 / t, 0.25}, {0.0, 1.0}};
        row["thresholds"] = {{0.01 * t, -0.5}, {1.5, 2.5}};
      }
      rows += row.dump() + "\n";
    }
    write_file(config.run.dir + "/metrics.jsonl", rows);
    if (!finished) return;
    const std::string checkpoint = config.run.dir + "/checkpoints/" + fmt::format("step_{:08}", steps);
    fs::create_directories(checkpoint);
    write_file(checkpoint + "/COMPLETE.json", "{}");
  }
  Sweep of(const std::string& yaml) const { return sweep("dir: " + (folder / "runs").string() + "\n" + yaml); }
  static const Json& row(const Report& report, const std::string& variant) {
    for (const Json& v : report.variants)
      if (v["variant"] == variant) return v;
    throw std::out_of_range(variant);
  }
};

TEST_F(Reports, ASweepsVariants) {
  const Sweep s = of("grid: {attention.gate: [relu, relu2]}\nlist: [{name: soft, set: {attention.gate: softmax}}]\nseeds: [1, 2, 3]");
  const std::map<std::string, double> base = {{"gate=relu", 2.0}, {"base", 2.5}, {"soft", 1.8}};
  for (const SweepRun& r : s.runs) {
    if (r.variant == "base" && r.config.run.seed == 3) continue;  // has not begun
    const bool cut = r.variant == "base";
    run(r.config, cut ? 7 : kSteps, base.at(r.variant) + 0.1 * static_cast<double>(r.config.run.seed - 1), !cut,
        1000.0 * static_cast<double>(r.config.run.seed));
  }
  fs::create_directories(folder / "runs/logs");
  write_file((folder / "runs/logs/base.failed.json").string(), R"({"error":"the <disk> is full"})");
  const Report report = gather(s, nothing_measured());
  ASSERT_EQ(report.runs.size(), 9u);
  const Json& relu = row(report, "gate=relu");
  EXPECT_NEAR(relu["validation_loss"].get<double>(), 2.1, 1e-12);     // of 2.0, 2.1, 2.2
  EXPECT_NEAR(relu["validation_loss_sd"].get<double>(), 0.1, 1e-12);  // n - 1
  EXPECT_NEAR(relu["over_twin"].get<double>(), 0.2, 1e-12);
  EXPECT_NEAR(relu["tokens_per_s"].get<double>(), 2000, 1e-9);
  EXPECT_EQ(relu["provisional"], false);
  EXPECT_EQ(relu["state"], "3 finished");
  EXPECT_NEAR(relu["attention_share"].get<double>(), 0.01 * kSteps, 1e-12);
  EXPECT_TRUE(relu["skip_rates"].is_null());
  const Json& cut = row(report, "base");
  EXPECT_EQ(cut["provisional"], true);
  EXPECT_EQ(cut["state"], "1 interrupted at step 7 of 20, 1 failed at step 7 of 20, 1 waiting");
  EXPECT_NEAR(cut["validation_loss"].get<double>(), 2.55, 1e-12);
  EXPECT_NE(std::ranges::find(report.notices, "base failed: the <disk> is full"), report.notices.end());

  // Curves: step t of half a second each; tokens as written.
  const ReportRun& first = report.runs[0];
  ASSERT_EQ(first.training.size(), 20u);
  EXPECT_DOUBLE_EQ(first.training[6].seconds, 3.5);
  EXPECT_DOUBLE_EQ(first.training[6].tokens, 3584);
  EXPECT_DOUBLE_EQ(first.training[6].loss, 5.3);
  ASSERT_EQ(first.validation.size(), 2u);
  EXPECT_EQ(first.validation[1].step, 20);
  ASSERT_EQ(first.heads.size(), 4u);
  EXPECT_DOUBLE_EQ(first.heads[1].active_share[0][0], 0.05);

  const std::vector<Figure> figures = draw_figures(report, {});
  std::map<std::string, const Figure*> by_id;
  for (const Figure& f : figures) {
    EXPECT_EQ(xml_problem(svg_file(f)), "") << f.id;
    EXPECT_EQ(xml_problem(svg_element(f)), "") << f.id;
    EXPECT_TRUE(by_id.emplace(f.id, &f).second) << f.id;
    EXPECT_EQ(f.body.find("nan"), std::string::npos) << f.id;
    EXPECT_EQ(f.body.find("inf"), std::string::npos) << f.id;
  }
  for (const char* id :
       {"loss_tokens", "loss_time", "loss_sparsity", "loss_speed", "gate_relu.active_share", "gate_relu.thresholds", "gate_relu.pattern"})
    EXPECT_TRUE(by_id.contains(id)) << id;
  EXPECT_FALSE(by_id.contains("soft.thresholds"));
  EXPECT_FALSE(by_id.contains("gate_relu.tiles"));
  EXPECT_TRUE(by_id.at("loss_time")->csv.starts_with("run,series,step,seconds,loss\r\ngate=relu,training,1,0.5,5.9\r\n"));
  // The twin's curves come last, over the others.
  const std::string& body = by_id.at("loss_tokens")->body;
  EXPECT_NE(body.find("line twin"), std::string::npos);
  EXPECT_LT(body.rfind("class=\"line s"), body.rfind("class=\"line twin"));
  // Speeds are equal, so the lowest loss alone is on that front; the unfinished variant never is.
  EXPECT_EQ(by_id.at("loss_speed")->csv,
            "number,variant,softmax,provisional,tokens_per_s,validation_loss,validation_loss_sd,pareto\r\n"
            "1,gate=relu,false,false,2000,2.1,0.1,false\r\n"
            "2,base,false,true,1500,2.55,0.0707106781187,false\r\n"
            "3,soft,true,false,2000,1.9,0.1,true\r\n");
  EXPECT_NE(by_id.at("loss_tokens")->body.find("loss, nats a token<"), std::string::npos);
  // Losses on different data have no common front.
  Report mixed = report;
  mixed.runs[0].config.data.path = "other";
  const Figure apart = loss_scatter(mixed, Against::speed);
  EXPECT_EQ(apart.csv.find("true\r\n"), std::string::npos) << apart.csv;
  EXPECT_EQ(apart.body.find("class=\"pareto"), std::string::npos);
  EXPECT_NE(apart.caption.find("No Pareto front"), std::string::npos);
  mixed = report;
  mixed.runs[0].config.model.context *= 2;
  EXPECT_EQ(loss_scatter(mixed, Against::speed).body.find("class=\"pareto"), std::string::npos);
  mixed = report;
  // Those of tasks are of their answers.
  mixed.runs[0].config.data.synthetic.emplace();
  EXPECT_NE(loss_scatter(mixed, Against::speed).body.find("validation loss, nats a token or answer<"), std::string::npos);
  for (ReportRun& one : mixed.runs) one.config.data.synthetic.emplace();
  EXPECT_NE(loss_curves(mixed, Against::tokens).body.find("loss, nats an answer<"), std::string::npos);
  EXPECT_NE(report_page(mixed, {}, "now").find("nats an answer, "), std::string::npos);
  EXPECT_NE(by_id.at("gate_relu.active_share")->csv.find("\r\n10,0,0,0.05\r\n"), std::string::npos);
  EXPECT_NE(by_id.at("gate_relu.thresholds")->csv.find("\r\n20,1,1,2.5\r\n"), std::string::npos);
  // Context 64: tiles of one token; causal, so each is visible.
  EXPECT_NE(by_id.at("gate_relu.pattern")->csv.find("\r\ncausal,1,63,63,1,1\r\n"), std::string::npos);

  const std::string page = report_page(report, figures, "now");
  for (const char* part : {"the &lt;disk&gt; is full", "2.1000 \u00b1 0.1000", "+0.2000", "class=\"twin\"", "class=\" provisional\"",
                           "not measured (--sequences 0)", "base is attention.gate: relu2. "})
    EXPECT_NE(page.find(part), std::string::npos) << part;
  EXPECT_EQ(page.find("{{"), std::string::npos);
  // Nothing comes from elsewhere.
  for (const char* part : {"src=", "href=\"http", "@import", "url("}) EXPECT_EQ(page.find(part), std::string::npos) << part;
  // The numbers are in it, and no name can end the script.
  const std::string begin = "<script type=\"application/json\" id=\"data\">";
  const std::size_t from = page.find(begin) + begin.size(), to = page.find("</script>", from);
  const Json data = Json::parse(page.substr(from, to - from));
  EXPECT_EQ(data["variants"], report.variants);
  EXPECT_EQ(data["csv"]["loss_speed"], by_id.at("loss_speed")->csv);
}

// Losses at the twin's step 10 of 20 say nothing of those that are done.
TEST_F(Reports, NothingComparesWithATwinThatIsNotFinished) {
  const Sweep s = of("list: [{name: a}, {name: b, set: {optimizer.lr: 0.5}}, {name: soft, set: {attention.gate: softmax}}]");
  run(s.runs[0].config, kSteps, 3, true);
  run(s.runs[1].config, kSteps, 3.1, true);
  run(s.runs[2].config, 10, 5, false);
  const Report report = gather(s, nothing_measured());
  EXPECT_EQ(row(report, "a")["twin"], "soft");
  EXPECT_TRUE(row(report, "a")["over_twin"].is_null());
  EXPECT_NEAR(row(report, "soft")["validation_loss"].get<double>(), 5, 1e-12);
  const Figure figure = loss_scatter(report, Against::sparsity);
  EXPECT_EQ(figure.body.find("level"), std::string::npos) << figure.body;
  run(s.runs[2].config, kSteps, 2.9, true);
  const Report done = gather(s, nothing_measured());
  EXPECT_NEAR(row(done, "a")["over_twin"].get<double>(), 0.1, 1e-12);
  EXPECT_NE(loss_scatter(done, Against::sparsity).body.find("level"), std::string::npos);
}

TEST_F(Reports, RunFoldersBySeedAndName) {
  std::vector<std::string> folders;
  const auto add = [&](const std::string& name, const std::vector<std::string>& sets, double loss, bool finished = true) {
    std::vector<std::string> all = sets;
    all.push_back("run.dir=" + (folder / name).string());
    const Config config = load_config((folder / "base.yaml").string(), all);
    run(config, kSteps, loss, finished);
    folders.push_back(config.run.dir);
  };
  add("a/sparse", {}, 2.0);
  add("b/sparse", {"run.seed=2", "log.every=7"}, 2.2);
  add("twin", {"attention.gate=softmax", "checkpoint.keep=1"}, 1.9);
  add("other", {"attention.gate=relu"}, 3.0, false);
  const Report report = gather(folders, nothing_measured());
  ASSERT_EQ(report.variants.size(), 3u);
  EXPECT_EQ(report.runs[0].name, folders[0]);  // two of one name: by their folders
  EXPECT_EQ(report.runs[2].name, "twin");
  EXPECT_EQ(report.variants[0]["finished"], 2);
  EXPECT_NEAR(report.variants[0]["validation_loss"].get<double>(), 2.1, 1e-12);
  EXPECT_NEAR(report.variants[0]["over_twin"].get<double>(), 0.1, 1e-12);  // of seed 1, which both have
  EXPECT_EQ(report.variants[2]["state"], "interrupted at step 20 of 20");  // all steps, and no checkpoint of the last
  const std::string odd = (folder / "odd\xff").string();
  fs::copy(folders[0], odd, fs::copy_options::recursive);
  try {
    gather(std::vector{odd}, nothing_measured());
    FAIL();
  } catch (const std::invalid_argument& e) {
    expect_error(e.what(), odd + ": the folder's name is not UTF-8");
  }
  folders.push_back(folders[0] + "/../sparse/");
  try {
    gather(folders, nothing_measured());
    FAIL();
  } catch (const std::invalid_argument& e) {
    expect_error(e.what(), "the same run as");
  }
  try {
    gather(std::vector{folder.string()}, nothing_measured());
    FAIL();
  } catch (const std::invalid_argument& e) {
    expect_error(e.what(), "not a run folder");
  }
}

TEST_F(Reports, AccuracyByDistanceOfTheLastEvaluation) {
  const Sweep s =
      of("list:\n  - {name: far}\n  - {name: near, set: {optimizer.lr: 0.02}}\n  - {name: text, set: {optimizer.lr: 0.03}}\nseeds: [1, 2]");
  const auto evaluated = [](int step, double accuracy, double far) {
    return Json{{"step", step},
                {"tokens", 512 * step},
                {"loss", 1},
                {"validation_loss", 1},
                {"validation_accuracy", accuracy},
                {"accuracy_by_distance",
                 {{{"from", 1}, {"to", 1}, {"answers", 7}, {"accuracy", 1}}, {{"from", 64}, {"to", 127}, {"answers", 90}, {"accuracy", far}}}}}
               .dump() +
           "\n";
  };
  for (const SweepRun& r : s.runs) {
    run(r.config, kSteps, 2, true);
    const double seed = static_cast<double>(r.config.run.seed);
    if (r.variant != "text")
      write_file(r.config.run.dir + "/metrics.jsonl", evaluated(10, 0.1, 0.1) + evaluated(20, 0.5 + 0.1 * seed, r.variant == "far" ? 0.75 : 0.03125));
  }
  write_file(s.runs[1].config.run.dir + "/metrics.jsonl", read_file(s.runs[1].config.run.dir + "/metrics.jsonl") +
                                                              "{\"step\":21,\"tokens\":1,\"loss\":1,\"accuracy_by_distance\":[{\"from\":1}]}\n");
  const Report report = gather(s, nothing_measured());
  EXPECT_NEAR(row(report, "far")["accuracy"].get<double>(), 0.65, 1e-12);               // of 0.6 and 0.7
  EXPECT_NEAR(row(report, "far")["accuracy_sd"].get<double>(), 0.0707106781187, 1e-9);  // n - 1
  EXPECT_TRUE(row(report, "text")["accuracy"].is_null());
  const auto figures = draw_figures(report, {});
  const auto figure = std::ranges::find(figures, "accuracy_distance", &Figure::id);
  ASSERT_NE(figure, figures.end());
  EXPECT_EQ(xml_problem(svg_file(*figure)), "");
  EXPECT_EQ(figure->csv,
            "run,from,to,answers,accuracy\r\nfar,1,1,7,1\r\nfar,64,127,90,0.75\r\nnear,1,1,7,1\r\nnear,64,127,90,0.03125\r\n"
            "\"far,seed=2\",1,1,7,1\r\n\"far,seed=2\",64,127,90,0.75\r\n\"near,seed=2\",1,1,7,1\r\n\"near,seed=2\",64,127,90,0.03125\r\n");
  for (const char* distance : {"7 answers, 1 token back", "90 answers, 64-127 tokens back", ">64-127<"})
    EXPECT_NE(figure->body.find(distance), std::string::npos) << distance;
  EXPECT_EQ(figure->body.find(">text<"), std::string::npos) << "only runs that have it are in the legend";
  const std::string page = report_page(report, figures, "now");
  for (const char* part : {"0.6500 \u00b1 0.0707", "<abbr title=\"only of synthetic tasks\">"}) EXPECT_NE(page.find(part), std::string::npos) << part;
  std::string notices;
  for (const std::string& notice : report.notices) notices += notice + "\n";
  expect_error(notices, "step 21: accuracy_by_distance is not a list of {from, to, answers, accuracy}; left out");
  EXPECT_NE(report_text(s, read_results(s)).find("0.6500 +- 0.0707"), std::string::npos);
  EXPECT_NE(report_csv(s, read_results(s)).find("accuracy,accuracy_sd"), std::string::npos);
}

TEST_F(Reports, OddLinesAreNamedAndLeftOut) {
  const Sweep s = of("");
  run(s.runs[0].config, 4, 2, false);
  const std::string file = s.runs[0].config.run.dir + "/metrics.jsonl";
  const std::string good = read_file(file);
  write_file(file, good + "garbage\n{\"loss\":1}\n{\"step\":3,\"loss\":1}\n{\"step\":5,\"tokens\":10,\"loss\":null,\"active_share\":[[1]]}\n" +
                       "{\"step\":6,\"loss\":4}\n{\"step\":7,\"tok");
  const Report report = gather(s, nothing_measured());
  EXPECT_EQ(report.runs[0].training.size(), 4u);
  EXPECT_EQ(report.runs[0].state.step, 6);
  std::string all;
  for (const std::string& notice : report.notices) all += notice + "\n";
  expect_error(all, file + ":5: not a JSON object; the line is left out, and 2 more, the last of them line 7",
               file + ": step 6: no number \"tokens\"", file + ": step 5: active_share or thresholds are not numbers [2 layers, 2 heads]");
  for (const Figure& f : draw_figures(report, {})) EXPECT_EQ(xml_problem(svg_file(f)), "") << f.id;
}

TEST_F(Reports, OfManyVariantsValidationAloneIsDrawn) {
  const Sweep s = of("grid: {optimizer.lr: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3]}");
  for (const SweepRun& r : s.runs) run(r.config, kSteps, 3, true);
  const auto lines = [&](const char* css) {
    const Figure f = loss_curves(gather(s, nothing_measured()), Against::tokens);
    EXPECT_NE(f.csv.find("training,1,"), std::string::npos);
    int n = 0;
    for (std::size_t at = f.body.find("<path class=\"" + std::string(css)); at != std::string::npos;
         at = f.body.find("<path class=\"" + std::string(css), at + 1))
      ++n;
    return n;
  };
  EXPECT_EQ(lines("train"), 0);
  fs::remove_all(folder / "runs");
  for (const SweepRun& r : s.runs) run(r.config, 5, 3, false);  // evaluated once
  EXPECT_EQ(lines("train"), 13);
}

TEST_F(Reports, OneThatDivergedDoesNotHideTheOthers) {
  const Sweep s = of("list: [{name: good}, {name: bad, set: {optimizer.lr: 0.5}}]");
  for (const SweepRun& r : s.runs) run(r.config, kSteps, 3, true);
  std::string rows;
  for (int t = 1; t <= kSteps; ++t) rows += Json{{"step", t}, {"tokens", 512 * t}, {"loss", t < 5 ? 6.0 : 1e8 * t}, {"step_ms", 500}}.dump() + "\n";
  write_file(s.runs[1].config.run.dir + "/metrics.jsonl", rows);
  const Figure curves = loss_curves(gather(s, nothing_measured()), Against::tokens);
  const std::regex tick("text-anchor=\"end\">([^<]*)<");  // of the losses
  int ticks = 0;
  for (std::sregex_iterator i(curves.body.begin(), curves.body.end(), tick), end; i != end; ++i, ++ticks) EXPECT_LE(std::stod((*i)[1]), 13);
  EXPECT_GE(ticks, 3);
  EXPECT_NE(curves.csv.find("bad,training,20,10240,2000000000\r\n"), std::string::npos) << curves.csv;
}

TEST_F(Reports, AVariantFarAboveTheOthersDoesNotSetTheScale) {
  const Sweep s =
      of("list: [{name: a}, {name: b, set: {optimizer.lr: 0.5}}, {name: c, set: {optimizer.lr: 0.4}}, {name: d, set: {optimizer.lr: 0.3}}, "
         "{name: soft, set: {attention.gate: softmax, optimizer.lr: 0.3}}]");
  const auto scatter = [&](double last) {
    const double losses[] = {3, 3.05, 3.1, last};
    for (std::size_t i = 0; i < 4; ++i) run(s.runs[i].config, kSteps, losses[i], true);
    return loss_scatter(gather(s, nothing_measured()), Against::sparsity);
  };
  const auto highest_tick = [](const Figure& f) {
    const std::regex tick("text-anchor=\"end\">([^<]*)<");
    double highest = 0;
    for (std::sregex_iterator i(f.body.begin(), f.body.end(), tick), end; i != end; ++i) highest = std::max(highest, std::stod((*i)[1]));
    return highest;
  };
  const Figure far = scatter(3.31);  // 0.21 above a range of 0.1
  EXPECT_LE(highest_tick(far), 3.11);
  EXPECT_NE(far.body.find(">4: 3.31<"), std::string::npos) << far.body;
  EXPECT_NE(far.caption.find("upper edge"), std::string::npos);
  EXPECT_NE(far.csv.find("\r\n4,d,false,false,0.95,3.31,"), std::string::npos) << far.csv;
  // A twin above it makes room for it.
  run(s.runs[4].config, kSteps, 3.5, true);
  const Figure below_its_twin = scatter(3.31);
  EXPECT_GE(highest_tick(below_its_twin), 3.4);
  EXPECT_NE(below_its_twin.body.find(">4<"), std::string::npos) << below_its_twin.body;
  EXPECT_EQ(below_its_twin.caption.find("upper edge"), std::string::npos);
  fs::remove_all(s.runs[4].config.run.dir);
  const Figure near = scatter(3.29);
  EXPECT_GE(highest_tick(near), 3.25);
  EXPECT_NE(near.body.find(">4<"), std::string::npos);
  EXPECT_EQ(near.caption.find("upper edge"), std::string::npos);
}

TEST_F(Reports, SpeedAndMemoryAgainstContext) {
  const Sweep s =
      of("grid: {attention.gate: [relu2, softmax]}\nzip: {model.context: [32, 1024], train.micro_batch: [2, 1]}\nseeds: [1, 2]\n"
         "set: {train.tokens_per_step: 1024}");
  for (const SweepRun& r : s.runs)
    run(r.config, kSteps, 3, true, (r.config.model.context == 32 ? 4000.0 : 1000.0) + (r.config.model.attention.gate == Gate::softmax ? -500 : 0));
  const Report report = gather(s, nothing_measured());
  ASSERT_TRUE(has_several_contexts(report));
  const Figure speed = context_curves(report, Against::speed), memory = context_curves(report, Against::memory);
  EXPECT_EQ(speed.csv,
            "series,variant,context,tokens_per_s\r\n"
            "cosine/relu2/sum,context=32,32,4000\r\n"
            "cosine/relu2/sum,\"context=1024,micro_batch=1\",1024,1000\r\n"
            "attention.gate: softmax,\"gate=softmax,context=32\",32,3500\r\n"
            "attention.gate: softmax,\"gate=softmax,context=1024,micro_batch=1\",1024,500\r\n");
  EXPECT_NE(memory.csv.find(",1024,1048576\r\n"), std::string::npos) << memory.csv;
  std::vector<std::string> ids;
  for (const Figure& f : draw_figures(report, {})) {
    ids.push_back(f.id);
    EXPECT_EQ(xml_problem(svg_file(f)), "") << f.id;
  }
  for (const char* id : {"speed_context", "memory_context"}) EXPECT_EQ(std::ranges::count(ids, id), 1) << id;
  EXPECT_NE(speed.body.find(">1k<"), std::string::npos);
  // What may change from run to run of a sweep parts no curve; several micro-batches at one context do; by themselves runs have their attention's
  // name.
  Report other = report;
  other.runs[0].config.log.every = 7, other.runs[0].config.train.steps = 9, other.runs[0].config.model.vocabulary = 0;
  EXPECT_EQ(context_curves(other, Against::speed).csv, speed.csv);
  for (ReportRun& r : other.runs)
    if (r.config.model.attention.gate == Gate::softmax)
      r.config.model.attention = other.runs[0].config.model.attention, r.config.train.micro_batch *= 8;
  for (Json& row : other.variants) row["differs"] = Json::object(), row["softmax"] = false;
  const std::string parted = context_curves(other, Against::speed).csv;
  for (const int micro_batch : {1, 2, 8, 16})
    EXPECT_NE(parted.find(fmt::format("\"cosine/relu2/sum, train.micro_batch: {}\",", micro_batch)), std::string::npos) << parted;
  Report one = report;
  for (ReportRun& r : one.runs) r.config.model.context = 32;
  EXPECT_FALSE(has_several_contexts(one));
}

TEST_F(Reports, NothingYetIsNoError) {
  const Sweep s = of("grid: {optimizer.lr: [0.01, 0.02]}");
  const Report report = gather(s, {});
  const auto figures = draw_figures(report, {});
  ASSERT_EQ(figures.size(), 6u);  // four of all runs, empty, and the patterns
  for (const Figure& f : figures) EXPECT_EQ(xml_problem(svg_file(f)), "") << f.id;
  const std::string page = report_page(report, figures, "now");
  EXPECT_NE(page.find("<abbr title=\"the run has not begun\">\u2013</abbr>"), std::string::npos);
  EXPECT_NE(page.find("<abbr title=\"no validation loss yet\">\u2013</abbr>"), std::string::npos);
}

TEST_F(Reports, ManyLongRunsStaySmall) {
  std::string yaml = "list:\n";
  for (int i = 0; i < 33; ++i)
    yaml += fmt::format("  - {{name: a-long-name-of-a-variant-that-goes-on-and-on-{}, set: {{optimizer.lr: {}}}}}\n", i, 0.001 * (i + 1));
  const Sweep s = of(yaml + "budget: {steps: 600}");
  for (const SweepRun& r : s.runs) run(r.config, 600, 2 + 0.01 * static_cast<double>(&r - s.runs.data()), true);
  const Report report = gather(s, nothing_measured());
  const auto figures = draw_figures(report, {});
  for (const Figure& f : figures) EXPECT_EQ(xml_problem(svg_file(f)), "") << f.id;
  EXPECT_LT(figures[0].body.size(), 500'000u);
  EXPECT_LT(report_page(report, figures, "now").size(), 10'000'000u);
  EXPECT_EQ(series_class(32, false), "line s2 d3");
  EXPECT_EQ(series_class(0, true), "line twin");
  EXPECT_EQ(series_class(1, true), "line twin d1");  // of another task
}

}  // namespace
}  // namespace tessera
