// Runs whose ranks share sequences, as a user starts them under mpirun: the numbers of one rank, in training and evaluation; checkpoints that go on
// in any other division; and what is refused.

#include <fmt/core.h>

#include "tests/trainer/run_support.h"

namespace tessera {
namespace {

using testing::Json;
using testing::Result;
using testing::RunTest;

class SequenceRunTest : public RunTest {
 protected:
  static constexpr const char* kShape =
      " --set model.context=180 --set train.tokens_per_step=1440 --set model.heads=4"
      " --set attention.pattern='{any: [{window: {size: 20}}, {global: {tokens: 3}}]}' --set attention.document_mask=true --set train.steps=8"
      " --set eval.every=4 --set eval.batches=5 --set checkpoint.every=4 --set log.heads_every=2 --set optimizer.warmup=2";

  std::string command(const std::string& name, const std::string& more = "") const {
    return fmt::format("train tiny.yaml --set run.dir=runs/{}{} {}", name, kShape, more);
  }
  static std::string parallel(int sequence, const std::string& exchange, const std::string& layout) {
    return fmt::format("--set parallel.sequence={} --set parallel.exchange={} --set parallel.layout={}", sequence, exchange, layout);
  }

  /// Every step of both runs, to the rounding of sums in another order and what training makes of it.
  void expect_close(const std::string& name, const std::string& wanted) const {
    const auto rows = metrics(name), reference = metrics(wanted);
    ASSERT_EQ(rows.size(), reference.size());
    for (std::size_t i = 0; i < rows.size(); ++i) {
      EXPECT_EQ(rows[i]["tokens"], reference[i]["tokens"]);
      for (const auto& [key, tolerance] : {std::pair{"loss", 1e-4},
                                           {"grad_norm", 1e-2},
                                           {"edge_sparsity", 1e-3},
                                           {"tile_skip_rate", 1e-3},
                                           {"validation_loss", 1e-4},
                                           {"bits_per_byte", 1e-4}}) {
        ASSERT_EQ(rows[i].contains(key), reference[i].contains(key)) << key;
        if (!rows[i].contains(key)) continue;
        EXPECT_NEAR(rows[i][key].get<double>(), reference[i][key].get<double>(), tolerance) << name << ", step " << i + 1 << ", " << key;
      }
    }
    EXPECT_EQ(rows[0]["edge_sparsity"], reference[0]["edge_sparsity"]) << "counts of the first step are the same integers";
    EXPECT_EQ(rows[0]["empty_row_share"], reference[0]["empty_row_share"]);
  }
};

TEST_F(SequenceRunTest, TrainsAndGoesOnLikeOneRank) {
  ASSERT_EQ(tessera(command("one")).code, 0);
  struct Division {
    const char* name;
    int ranks, sequence;
    const char *exchange, *layout;
  };
  for (const Division& d : {Division{"two", 2, 2, "needed", "zigzag"},
                            {"four", 4, 2, "heads", "balanced"},
                            {"ring", 4, 4, "ring", "zigzag"},
                            {"eight", 8, 4, "needed", "contiguous"},
                            {"needed8", 8, 8, "needed", "balanced"},
                            {"ring8", 8, 8, "ring", "contiguous"}}) {
    const Result r = tessera_on(d.ranks, command(d.name, parallel(d.sequence, d.exchange, d.layout)));
    ASSERT_EQ(r.code, 0) << r;
    EXPECT_TRUE(r.says(fmt::format("{} ranks share each: exchange {}", d.sequence, d.exchange))) << r;
    expect_close(d.name, "one");
    const auto rows = metrics(d.name);
    // The bytes that were planned, of the 8 micro-batches of a step; exchange heads also says where documents start, an i32 a token to each other
    // rank.
    const Result plan =
        tessera("plan " + command(d.name, parallel(d.sequence, d.exchange, d.layout)).substr(6) + " --json --ranks " + std::to_string(d.ranks));
    ASSERT_EQ(plan.code, 0) << plan;
    const Json planned = Json::parse(plan.output);
    const std::int64_t starts = d.exchange == std::string("heads") ? 4 * 180 * (d.sequence - 1) : 0;
    for (const Json& row : rows)
      EXPECT_EQ(row["exchange_bytes"].get<std::int64_t>(), 8 * (planned["sequence"]["bytes"][d.exchange].get<std::int64_t>() + starts)) << d.name;
  }
  // A run that is cut short in one division goes on in others.
  const Result cut = tessera_on(4, command("mixed", parallel(4, "needed", "contiguous")), "TESSERA_FAULT=kill@1:6");
  EXPECT_NE(cut.code, 0) << cut;
  const Result on = tessera_on(2, command("mixed", "--resume " + parallel(2, "heads", "zigzag")), "TESSERA_FAULT=kill@0:8");
  EXPECT_NE(on.code, 0) << on;
  EXPECT_TRUE(on.says("going on after step 4")) << on;
  const Result last = tessera(command("mixed", "--resume"));
  ASSERT_EQ(last.code, 0) << last;
  expect_close("mixed", "one");
  // And one rank's in a ring of several.
  EXPECT_NE(tessera(command("grown"), "TESSERA_FAULT=kill@0:6").code, 0);
  const Result ring = tessera_on(4, command("grown", "--resume " + parallel(2, "ring", "balanced")));
  ASSERT_EQ(ring.code, 0) << ring;
  EXPECT_TRUE(ring.says("going on after step 4")) << ring;
  expect_close("grown", "one");
}

TEST_F(SequenceRunTest, EvaluatesLikeOneRank) {
  ASSERT_EQ(tessera(command("one", "--set train.steps=4 --set attention.always.self=true")).code, 0);
  const auto eval = [&](int ranks, const std::string& more) {
    const std::string arguments = "eval runs/one --json --output found.json " + more;
    const Result r = ranks == 1 ? tessera(arguments) : tessera_on(ranks, arguments);
    EXPECT_EQ(r.code, 0) << r;
    return Json::parse(read_file((folder / "found.json").string()));
  };
  for (const char* context : {"", "--context 400"}) {
    const Json one = eval(1, context);
    for (const auto& [ranks, sequence] : {std::pair{2, 2}, {4, 2}, {4, 4}}) {
      const Json r = eval(ranks, fmt::format("{} --sequence {} {}", context, sequence, ranks == 4 ? "--visit all" : ""));
      EXPECT_NEAR(r["loss"].get<double>(), one["loss"].get<double>(), 1e-6);
      for (const char* key : {"tokens", "bytes", "sequences", "edge_sparsity", "tile_skip_rate"}) EXPECT_EQ(r[key], one[key]) << key;
      EXPECT_EQ(r["losses_compared"], ranks == 4 ? one["tokens"] : Json(0));
    }
  }
  // Of a sequence longer than the text, what lies beyond its end counts for nothing.
  const Json longest = eval(1, "--context 9000"), shared = eval(2, "--context 9000 --sequence 2");
  EXPECT_EQ(shared["tokens"], longest["tokens"]);
  EXPECT_NEAR(shared["loss"].get<double>(), longest["loss"].get<double>(), 1e-6);
  const Result r = tessera_on(2, "eval runs/one --sequence 3");
  EXPECT_EQ(r.code, 2);
  EXPECT_TRUE(r.says("--sequence 3: 2 ranks do not make groups of 3; expected a divisor of 2")) << r;
}

TEST_F(SequenceRunTest, SaysWhatDoesNotFit) {
  const auto refused = [&](int ranks, const std::string& more, std::initializer_list<const char*> parts) {
    const Result r = ranks == 1 ? tessera(command("no", more)) : tessera_on(ranks, command("no", more));
    EXPECT_EQ(r.code, 2) << r;
    for (const char* part : parts) EXPECT_TRUE(r.says(part)) << "expected: " << part << "\n" << r;
  };
  refused(1, parallel(2, "needed", "zigzag"),
          {"parallel.sequence 2: 1 rank does not make groups of 2. What would do: 2 ranks, or parallel.sequence 1"});
  refused(3, parallel(2, "needed", "zigzag"), {"3 ranks do not make groups of 2. What would do: 2 or 4 ranks, or parallel.sequence 1, 3"});
  refused(4, parallel(4, "needed", "zigzag") + " --set model.context=90 --set train.tokens_per_step=720",
          {"90 tokens over 4 ranks: tiles of 16 x 16 make 6 blocks", "Possible: at most 3 ranks"});
  refused(4, parallel(4, "heads", "zigzag") + " --set model.heads=2",
          {"parallel.exchange", "2 heads to 4 ranks", "expected parallel.sequence 1, 2, or another exchange"});
  refused(4, parallel(2, "needed", "zigzag") + " --set train.tokens_per_step=1620", {"2 groups of 2 ranks x train.micro_batch 1 do not divide"});
}

}  // namespace
}  // namespace tessera
