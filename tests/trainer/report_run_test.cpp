// tessera report on real runs: tiles against those that the model itself counts at each size, files, errors.

#include <gtest/gtest.h>

#include <algorithm>

#include "tests/trainer/run_support.h"
#include "tests/trainer/xml_check.h"
#include "trainer/evaluate.h"
#include "trainer/open_checkpoint.h"
#include "trainer/open_data.h"
#include "trainer/report/measure_tiles.h"

namespace tessera::testing {
namespace {

class ReportRuns : public RunTest {
 protected:
  static constexpr const char* kSmall = " --set train.steps=12 --set model.context=160 --set train.tokens_per_step=320 --set eval.batches=1 ";
  void train(const std::string& name, const std::string& more = "") const {
    const Result r = tessera("train tiny.yaml --set run.dir=runs/" + name + kSmall + more);
    ASSERT_EQ(r.code, 0) << r;
  }
};

TEST_F(ReportRuns, TilesAreThoseThatTheModelCounts) {
  train("a", "--set 'attention.pattern={window: {size: 70}}' --set attention.threshold.anneal=0.01 --set attention.threshold.init=6");
  const auto here = fs::current_path();
  fs::current_path(folder);
  const TileMeasurement m = measure_tiles("runs/a", {.sequences = 3, .tokens = 1000, .threads = 1});
  EXPECT_EQ(m.tokens, 160);
  EXPECT_EQ(m.sequences, 3);
  EXPECT_EQ(m.step, 12);
  // The kernel's own counters, with tiles of each size in turn.
  for (std::size_t size = 0; size < kTileSizes.size(); ++size) {
    const auto alone = make_single_communicator();
    OpenCheckpoint::Options o;
    o.threads = 1;
    o.micro_batch = 1;
    o.tile = kTileSizes[size];
    const OpenCheckpoint open("runs/a", OpenCheckpoint::Use::evaluate, o, *alone);
    const TrainingData data = open_training_data(open.config.data);
    Evaluator evaluator(data.first(), data.first().validation, *open.tokenizer, open.context, 1);
    const Evaluation e = evaluator.run(*open.model, *open.ops, *alone, open.ranks, *open.batch, 3);
    const AttentionCounts counts(open.config.model, e.counters, e.sequences, e.sequence_tokens);
    EXPECT_NEAR(m.skip_rate[size], counts.all().tile_skip_rate, 1e-12) << kTileSizes[size];
    EXPECT_NEAR(m.edge_sparsity, counts.all().edge_sparsity, 1e-3) << kTileSizes[size];  // sums in another order: an edge may be on the brink
  }
  EXPECT_GT(m.skip_rate[0], 10.0 / 55);  // what the window alone hides
  EXPECT_GE(m.skip_rate[0], m.skip_rate[1]);
  ASSERT_EQ(m.first_sequence.size(), 4u);
  const HeadTiles& tiles = m.first_sequence[3];
  EXPECT_EQ(tiles.layer, 1);
  EXPECT_EQ(tiles.head, 1);
  for (int q = 0; q < 10; ++q)
    for (int k = 0; k < 10; ++k) {
      const TileState state = tiles.state[static_cast<std::size_t>(q * 10 + k)];
      // The last key of tile k and the first query of tile q are 16 (q - k) - 15 apart: visible below 70.
      const bool far = k <= q && 16 * (q - k) - 15 >= 70;
      EXPECT_EQ(state == TileState::structural, far) << q << " " << k;
      EXPECT_EQ(state == TileState::future, k > q) << q << " " << k;
    }
  EXPECT_EQ(measure_tiles("runs/a", {.sequences = 1, .tokens = 50, .threads = 1}).first_sequence[0].tiles, 4);
  fs::current_path(here);
}

TEST_F(ReportRuns, PageFiguresAndErrors) {
  train("a");
  train("b", "--set attention.gate=softmax --set run.seed=2");
  Result r = tessera("report runs/a runs/b --figures figures/ --sequences 2 --json 2>err");
  ASSERT_EQ(r.code, 0) << r;
  const Json found = Json::parse(r.output);
  EXPECT_EQ(found["page"], "report.html");
  ASSERT_EQ(found["variants"].size(), 2u);
  EXPECT_EQ(found["variants"][0]["skip_rates"].size(), 4u);
  EXPECT_EQ(found["variants"][1]["skip_rates"], (Json{0.0, 0.0, 0.0, 0.0}));  // softmax: every tile
  for (const auto& file : found["figures"]) {
    const std::string name = file, contents = read_file((folder / name).string());
    const std::string problem = name.ends_with(".svg") ? xml_problem(contents) : contents.ends_with("\r\n") ? "" : "no line";
    EXPECT_EQ(problem, "") << name;
  }
  EXPECT_TRUE(fs::exists(folder / "figures/a.tiles.svg"));
  const std::string page = read_file((folder / "report.html").string());
  EXPECT_NE(page.find("id=\"a.tiles\""), std::string::npos);
  EXPECT_NE(page.find("</html>"), std::string::npos);

  const auto refuses = [&](const std::string& arguments, const std::string& words) {
    const Result refused = tessera("report " + arguments);
    EXPECT_EQ(refused.code, 2) << refused;
    EXPECT_TRUE(refused.says(words)) << refused;
    EXPECT_EQ(refused.count("\n"), 1) << refused;
  };
  refuses("runs/a", "--output report.html: is there already; --overwrite replaces it");
  refuses("runs/a -o new.html --figures figures", "--figures figures: the folder is not empty");
  refuses("runs/a -o missing/new.html", "there is no folder missing");
  refuses("runs/a -o runs", "expected a file to write, found a folder");
  refuses("runs/c -o new.html", "runs/c: there is no such file or folder");
  refuses("runs -o new.html", "runs: not a run folder");
  refuses("runs/a runs/a/ -o new.html", "the same run as");
  refuses("runs/a tiny.yaml -o new.html", "a sweep file stands alone");
  fs::create_directories(folder / "sweeps");
  write("sweeps/sweep.json", "{}");
  refuses("sweeps -o new.html", "sweeps: the folder of a sweep; expected the sweep's file, or run folders, as sweeps/*/");
  refuses("runs/a -o new.html --head 1", "expected LAYER.HEAD");
  refuses("runs/a -o new.html --sequences 0 --head 2.0", "no run has such a layer and head");
  refuses("runs/a -o new.html --set attention.gate=relu", "only of a sweep file");
  EXPECT_FALSE(fs::exists(folder / "new.html"));
  EXPECT_EQ(read_file((folder / "report.html").string()), page);

  // Without data or checkpoint there is a page all the same, which says so.
  fs::rename(folder / "data", folder / "gone");
  fs::remove_all(folder / "runs/b/checkpoints");
  r = tessera("report runs/a runs/b --overwrite --head 1.1");
  ASSERT_EQ(r.code, 0) << r;
  EXPECT_TRUE(r.says("runs/a: its tiles are not measured: ")) << r;
  EXPECT_TRUE(r.says("runs/b: no checkpoint: its tiles are not measured")) << r;
  for (const std::string& name : names(".")) EXPECT_EQ(name.find(".tmp"), std::string::npos) << name;
}

/// What the page does with its script, in a real browser: a copy of the page with a script behind it that acts as a reader would and leaves what it
/// found in the document.
TEST_F(ReportRuns, TheScriptWorksInABrowser) {
  std::string browser;
  for (const char* name : {"chromium", "chromium-browser", "google-chrome"})
    if (browser.empty() && shell(std::string("command -v ") + name).code == 0) browser = name;
  if (browser.empty()) GTEST_SKIP() << "no Chromium here (apt-get install chromium)";
  train("a");
  train("b", "--set attention.gate=softmax");
  train("c", "--set attention.gate=relu");
  ASSERT_EQ(tessera("report runs/a runs/b runs/c --sequences 1").code, 0);
  std::string page = read_file((folder / "report.html").string());
  const std::string errors = "<script>window.problems = []; window.onerror = m => { window.problems.push(m); };</script>\n";
  const std::string reader = R"js(<script>
const column = i => [...document.querySelectorAll("tbody tr")].map(r => r.cells[i].textContent);
const click = i => document.querySelectorAll("th button")[i].click();
const found = {};
click(0); found.up = column(0);
click(0); found.down = column(0);
click(5); found.sparsity = column(5);
const select = document.getElementById("run");
const shown = () => [...document.querySelectorAll(".run")].map(r => r.offsetHeight > 0);
found.first = shown();
select.value = "run-3"; select.dispatchEvent(new Event("change")); found.third = shown();
document.querySelector("tbody tr").dispatchEvent(new Event("mouseenter")); found.dim = document.querySelectorAll("#all .dim").length > 0;
document.querySelector("tbody tr").dispatchEvent(new Event("mouseleave")); found.bright = document.querySelectorAll("#all .dim").length === 0;
found.buttons = document.querySelectorAll("#loss_tokens .tools button").length;
found.wide = document.documentElement.scrollWidth <= window.innerWidth;
found.requests = performance.getEntriesByType("resource").length;
found.problems = window.problems;
const out = document.createElement("pre"); out.id = "found"; out.textContent = "@@" + JSON.stringify(found) + "@@"; document.body.append(out);
</script>
</body>)js";
  page.insert(page.find("<style>"), errors);
  page.replace(page.rfind("</body>"), 7, reader);
  write("read.html", page);
  const Result r =
      shell("timeout 120 " + browser + " --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --window-size=500,900 --user-data-dir=" +
            (folder / "profile").string() + " --dump-dom file://" + (folder / "read.html").string() + " 2>/dev/null");
  const std::size_t from = r.output.rfind("<pre id=\"found\">@@"), to = r.output.rfind("@@</pre>");
  ASSERT_NE(from, std::string::npos) << r;
  const Json found = Json::parse(r.output.substr(from + 18, to - from - 18));
  EXPECT_EQ(found["problems"], Json::array());
  EXPECT_EQ(found["up"], (Json{"1", "2", "3"}));
  EXPECT_EQ(found["down"], (Json{"3", "2", "1"}));
  EXPECT_EQ(found["sparsity"][2], "\u2013");  // softmax has none, and stays last
  EXPECT_LE(found["sparsity"][0], found["sparsity"][1]);
  EXPECT_EQ(found["first"], (Json{true, false, false}));
  EXPECT_EQ(found["third"], (Json{false, false, true}));
  EXPECT_EQ(found["dim"], true);
  EXPECT_EQ(found["bright"], true);
  EXPECT_EQ(found["buttons"], 2);
  EXPECT_EQ(found["wide"], true);  // a narrow window is not scrolled sideways
  EXPECT_EQ(found["requests"], 0);
}

}  // namespace
}  // namespace tessera::testing
