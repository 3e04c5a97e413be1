// data.synthetic: its configuration, and runs on it as a user starts them.

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <map>

#include "kernels/comm/communicator.h"
#include "tests/trainer/config_testing.h"
#include "tests/trainer/run_support.h"
#include "trainer/evaluate.h"
#include "trainer/open_checkpoint.h"

namespace tessera::testing {
namespace {

using Kind = SyntheticTask::Kind;

SyntheticTask task_of(const std::string& yaml) {
  const Config c = parse_config("data: {synthetic: " + yaml + "}", "x.yaml", {"model.context=64"});
  EXPECT_EQ(c.model.vocabulary, c.data.synthetic->vocabulary);
  EXPECT_EQ(parse_config(to_yaml(c), "y", {}).data.synthetic, c.data.synthetic) << to_yaml(c);
  return *c.data.synthetic;
}

TEST(SyntheticKey, ReadsAndWritesItself) {
  EXPECT_EQ(task_of("mqar"), SyntheticTask{});
  EXPECT_EQ(task_of("needle").kind, Kind::needle);
  const SyntheticTask mqar = task_of("{mqar: {pairs: 16, vocabulary: 256, power_a: 0.5, filler: padding}}");
  EXPECT_EQ(mqar.pairs, 16);
  EXPECT_EQ(mqar.vocabulary, 256);
  EXPECT_EQ(mqar.power_a, 0.5);
  EXPECT_EQ(mqar.filler, SyntheticTask::Filler::padding);
  EXPECT_EQ(task_of("{copy: {lengths: 9}}").distances, (std::vector<std::int64_t>{9}));
  EXPECT_EQ(task_of("{needle: {distances: [16, 60]}}").distances, (std::vector<std::int64_t>{16, 60}));
  const SyntheticTask needle = task_of("{needle: {shortest: 3, longest: 50}}");
  EXPECT_EQ(needle.shortest, 3);
  EXPECT_EQ(needle.longest, 50);
  EXPECT_FALSE(load_config("", {"data.synthetic=mqar", "data.synthetic=none"}).data.synthetic);
  EXPECT_FALSE(parse_config(to_yaml(load_config("", {})), "y", {}).data.synthetic);
}

TEST(SyntheticKey, MistakesNamePlaceAndRemedy) {
  const auto error = [](const std::string& task, const std::string& more = "") {
    return error_of("model: {context: 64}\ndata: {synthetic: " + task + more + "}\n");
  };
  expect_error(error("mqra"), "x.yaml:2:19: data.synthetic: expected", "mqar", "found mqra");
  expect_error(error("[mqar]"), "data.synthetic: expected a task, as mqar, or one with parameters, as {mqar: {pairs: 16}}, found a list");
  expect_error(error("{mqar: {}, copy: {}}"), "data.synthetic: expected a task", "found a map of 2");
  expect_error(error("{needel: {}}"), "data.synthetic.needel: unknown task; nearest is \"needle\"");
  expect_error(error("{mqar: 4}"), "data.synthetic.mqar: expected {vocabulary, pairs, power_a, filler}, each optional, found 4");
  expect_error(error("{mqar: {pair: 4}}"), "data.synthetic.mqar.pair: mqar has no such parameter; nearest is \"pairs\"");
  expect_error(error("{copy: {distances: 4}}"), "data.synthetic.copy.distances: copy has no such parameter");
  expect_error(error("{mqar: {pairs: 0}}"), "data.synthetic.mqar.pairs: expected an integer >= 1", "found 0");
  expect_error(error("{mqar: {power_a: 0}}"), "data.synthetic.mqar.power_a: expected a number > 0");
  expect_error(error("{mqar: {filler: zeros}}"), "data.synthetic.mqar.filler", "random", "padding");
  expect_error(error("{mqar: {vocabulary: 3}}"), "data.synthetic.mqar.vocabulary: expected an integer >= 4");
  expect_error(error("{needle: {distances: [3, x]}}"), "data.synthetic.needle.distances[1]: expected an integer", "found");
  expect_error(error("{needle: {distances: []}}"), "data.synthetic.needle.distances: expected a list of at least one number");
  expect_error(error("{needle: {distances: 3, longest: 4}}"), "distances is set, and shortest or longest too");
  expect_error(error("{mqar: {pairs: 17}}"), "data.synthetic: mqar: 17 pairs and their queries take 68 tokens, and a sequence has 64");
  expect_error(error("{mqar: {pairs: 16, vocabulary: 32}}"), "data.synthetic: mqar: 16 pairs want as many keys", "at least 34");
  expect_error(error("{needle: {longest: 63}}"), "data.synthetic: needle: a distance of 63");

  expect_error(error("mqar", ", path: some"), "data.synthetic: data.path some is set too: expected one of them", "--set data.path=");
  expect_error(error("mqar", ", mix: [{path: a, weight: 1}]"), "data.synthetic: data.mix of 1 is set too", "--set data.mix=[]");
  expect_error(error("mqar", ", tokenizer: bytes"), "data.synthetic: data.tokenizer bytes is set too");
  expect_error(error_of("data: {synthetic: mqar}\nsample: {every: 5}"), "x.yaml:2:17: sample.every: data.synthetic has tokens and no text");
  expect_error(error_of("data: {synthetic: mqar}\nmodel: {vocabulary: 64}"),
               "model.vocabulary is 64, and data.synthetic has a vocabulary of 8192: expected them equal, or model.vocabulary 0");
}

TEST(Accuracy, ByDistanceForAReader) {
  AnswerTallies answers{};
  answers[0] = {4, 1};
  answers[2] = {8, 8};
  EXPECT_EQ(accuracy_text(accuracy_by_distance(answers)), "1 0.2500, 4-7 1.0000");
}

class SyntheticRunTest : public RunTest {
 protected:
  static constexpr const char* kMqar = "tiny.yaml --set data.path= --set 'data.synthetic={mqar: {vocabulary: 16, pairs: 2, power_a: 1}}' ";
};

TEST_F(SyntheticRunTest, TrainsEvaluatesAndResumes) {
  const std::string train = std::string("train ") + kMqar;
  const Result whole = tessera(train + "--set run.dir=runs/a --set optimizer.lr=0.01 --set train.steps=40");
  ASSERT_EQ(whole.code, 0) << whole;
  EXPECT_TRUE(whole.says("accuracy")) << whole;
  EXPECT_TRUE(whole.says("; by distance ")) << whole;
  const auto rows = metrics("a");
  const Json& last = rows.back();
  EXPECT_EQ(last["tokens"], 40 * 256) << "all tokens, not the answers alone";
  EXPECT_EQ(last["validation_tokens"], 3 * 1 * 2) << "3 micro-batches of a sequence, 2 answers each";
  EXPECT_FALSE(last.contains("bits_per_byte"));
  EXPECT_LT(last["loss"].get<double>(), rows[0]["loss"].get<double>());

  // The same numbers after an interruption, to the bit, and on two ranks that see or share different sequences, to rounding.
  const std::string same = "--set optimizer.lr=0.01 --set train.steps=40 ";
  ASSERT_EQ(tessera(train + same + "--set run.dir=runs/b", "TESSERA_FAULT=exception@0:13").code, 1);
  const Result resumed = tessera(train + same + "--set run.dir=runs/b --resume");
  ASSERT_EQ(resumed.code, 0) << resumed;
  expect_same_bits("a", "b", 40);
  for (const std::string how : {"1", "2"}) {
    ASSERT_EQ(
        tessera_on(2, train + "--set train.steps=8 --set optimizer.warmup=4 --set run.dir=runs/r" + how + " --set parallel.sequence=" + how).code, 0);
    EXPECT_NEAR(metrics("r" + how)[0]["loss"].get<double>(), rows[0]["loss"].get<double>(), 1e-5) << how;
  }

  // Another task is another run.
  const Result other = tessera("train tiny.yaml --set data.path= --set data.synthetic=copy --set run.dir=runs/a --resume");
  EXPECT_EQ(other.code, 2);
  EXPECT_TRUE(other.says("data.synthetic: {\"mqar\"")) << other;
  EXPECT_EQ(tessera("train tiny.yaml --set run.dir=runs/a --resume").code, 2);

  // eval reports what the run did, on any division.
  const Result evaluated = tessera("eval runs/a --batches 3 --json");
  ASSERT_EQ(evaluated.code, 0) << evaluated;
  const Json e = Json::parse(evaluated.output);
  EXPECT_EQ(e["loss"], last["validation_loss"]);
  EXPECT_EQ(e["accuracy"], last["validation_accuracy"]);
  EXPECT_EQ(e["accuracy_by_distance"], last["accuracy_by_distance"]);
  EXPECT_EQ(e["chance"], 1.0 / 8);
  EXPECT_FALSE(e.contains("bits_per_byte"));
  const Json all = Json::parse(tessera("eval runs/a --batches 40 --json").output);
  for (const char* how : {"", "--sequence 2 ", "--visit all "}) {
    const Result r = tessera_on(2, std::string("eval runs/a --batches 40 --json ") + how);
    ASSERT_EQ(r.code, 0) << r;
    EXPECT_EQ(Json::parse(r.output)["accuracy_by_distance"], all["accuracy_by_distance"]) << how;
  }
  EXPECT_EQ(Json::parse(tessera("eval runs/a --json").output)["sequences"], kSyntheticValidation);
  EXPECT_EQ(Json::parse(tessera("eval runs/a --context 50 --batches 2 --json").output)["sequence_tokens"], 50);
  EXPECT_TRUE(tessera("eval runs/a --batches 2").says("by chance 0.125000"));
  const Result short_context = tessera("eval runs/a --context 7");
  EXPECT_EQ(short_context.code, 2) << short_context;
  EXPECT_TRUE(short_context.says("mqar at context 7: 2 pairs and their queries take 8 tokens")) << short_context;

  // Accuracy, by the naive way: the logits at every query from all that stands before it.
  const auto alone = make_single_communicator();
  const OpenCheckpoint open((folder / "runs/a").string(), OpenCheckpoint::Use::evaluate, {}, *alone);
  EXPECT_EQ(open.tokenizer, nullptr);
  const SyntheticSource source(*open.config.data.synthetic, open.context, SyntheticSource::Split::validation, 99);
  std::map<unsigned, std::pair<int, int>> tally;  // by power of two: answers, right ones
  int right = 0;
  for (std::uint64_t n = 0; n < 40; ++n) {
    SyntheticSequence s;
    source.make(n, s);
    for (std::size_t t = 0; t < s.token.size(); ++t) {
      if (s.target[t] < 0) continue;
      const auto logits = open.model->next_logits(std::span(s.token).first(t + 1));
      const bool good = std::ranges::max_element(logits) - logits.begin() == s.target[t];
      auto& [answers, found] = tally[std::bit_floor(static_cast<unsigned>(s.distance[t]))];
      ++answers;
      found += good;
      right += good;
    }
  }
  EXPECT_EQ(all["accuracy"], right / 80.0);
  ASSERT_EQ(all["accuracy_by_distance"].size(), tally.size());
  for (const Json& row : all["accuracy_by_distance"]) {
    const auto& [answers, found] = tally.at(row["from"].get<unsigned>());
    EXPECT_EQ(row["to"].get<unsigned>(), 2 * row["from"].get<unsigned>() - 1);
    EXPECT_EQ(row["answers"], answers);
    EXPECT_EQ(row["accuracy"], static_cast<double>(found) / answers);
  }

  // What needs text says so.
  const std::string core = "eval runs/a --core " TESSERA_FIXTURES "/core/bundle";
  for (const std::string& command : {core, std::string("eval runs/a --data data"), std::string("generate runs/a --prompt x --tokens 5"),
                                     std::string("export runs/a --output out")}) {
    const Result r = tessera(command);
    EXPECT_EQ(r.code, 2) << r;
    EXPECT_TRUE(r.says("trained on the synthetic task mqar, and has no tokenizer")) << r;
    EXPECT_EQ(r.count("error: "), 1) << r;
  }
  EXPECT_FALSE(fs::exists(folder / "out"));
  const Result warm = tessera("train tiny.yaml --set run.dir=runs/warm --set run.init=runs/a");
  EXPECT_EQ(warm.code, 2);
  EXPECT_TRUE(warm.says("vocabulary: 16 tokens there, 257 here")) << warm;

  // The rest of the tool takes it as any other run.
  const Result verified = tessera("inspect runs/a --verify --json");
  ASSERT_EQ(verified.code, 0) << verified;
  EXPECT_EQ(Json::parse(verified.output)["data"]["mqar"]["pairs"], 2);
  EXPECT_EQ(Json::parse(tessera("inspect runs/a/checkpoints --json").output)["dataset"]["synthetic"]["mqar"]["vocabulary"], 16);
  const Json plan = Json::parse(tessera(std::string("plan ") + kMqar + "--json").output);
  EXPECT_EQ(plan["vocabulary"], 16);
  EXPECT_FALSE(plan.contains("epochs"));
  const Json compared = Json::parse(tessera("compare runs/a runs/b --no-release --json").output);
  EXPECT_EQ(compared[0]["accuracy"], last["validation_accuracy"]) << compared;
  EXPECT_TRUE(tessera("compare runs/a runs/b --no-release").says("accuracy"));
  const Result report = tessera("report runs/a runs/b -o page.html --figures figures --sequences 2");
  ASSERT_EQ(report.code, 0) << report;
  EXPECT_FALSE(report.says("note:")) << report;
  const std::string csv = read_file(folder / "figures/accuracy_distance.csv");
  const Json& first = last["accuracy_by_distance"][0];
  EXPECT_EQ(csv.substr(0, csv.find('\r')), "run,from,to,answers,accuracy");
  EXPECT_NE(csv.find("\r\na," + first["from"].dump() + "," + first["to"].dump() + "," + first["answers"].dump() + ","), std::string::npos) << csv;
  EXPECT_NE(read_file(folder / "page.html").find("Accuracy by distance"), std::string::npos);
}

}  // namespace
}  // namespace tessera::testing
