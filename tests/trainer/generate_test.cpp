// Choosing tokens, generating texts one by one and together, reading prompts, printing whole characters.

#include "trainer/generate.h"

#include <gtest/gtest.h>
#include <zlib.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <random>

#include "tests/model/gpt_harness.h"
#include "trainer/prompts.h"

namespace tessera {
namespace {

namespace fs = std::filesystem;

// -- choosing -----------------------------------------------------------------------------------------------------------

/// What each token's probability should be, from the definition: softmax of logits / T, the k likeliest, of these renormalised the shortest run from
/// the likeliest on that reaches p, renormalised.
std::vector<long double> probabilities(const std::vector<float>& logits, const GenerateOptions& o) {
  std::vector<std::pair<long double, std::size_t>> sorted;
  for (std::size_t t = 0; t < logits.size(); ++t) sorted.emplace_back(std::exp(static_cast<long double>(logits[t]) / o.temperature), t);
  std::stable_sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  if (o.top_k > 0 && sorted.size() > static_cast<std::size_t>(o.top_k)) sorted.resize(static_cast<std::size_t>(o.top_k));
  const auto sum = [&] {
    long double s = 0;
    for (const auto& [weight, t] : sorted) s += weight;
    return s;
  };
  const long double all = sum();
  long double reached = 0;
  std::size_t kept = 0;
  while (kept < sorted.size() && (kept == 0 || reached / all < o.top_p)) reached += sorted[kept++].first;
  sorted.resize(kept);
  std::vector<long double> p(logits.size(), 0);
  for (const auto& [weight, t] : sorted) p[t] = weight / sum();
  return p;
}

/// Logits of which no run's sum lies so near to a top_p used here that rounding decides.
std::vector<float> some_logits(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 2);
  std::vector<float> logits(count);
  for (float& l : logits) l = normal(random);
  return logits;
}

const GenerateOptions kChoices[] = {{.temperature = 1},
                                    {.temperature = 1, .top_p = 0.9},
                                    {.temperature = 0.5, .top_p = 0.7},
                                    {.temperature = 1, .top_k = 5},
                                    {.temperature = 2, .top_k = 5, .top_p = 0.6},
                                    {.temperature = 1.5, .top_k = 100, .top_p = 0.95},
                                    {.temperature = 1, .top_p = 1e-6}};

TEST(ChooseToken, TakesEachTokensShareOfTheUnitInterval) {
  for (const auto& o : kChoices)
    for (const unsigned seed : {1u, 2u, 3u}) {
      const auto logits = some_logits(23, seed);
      const auto p = probabilities(logits, o);
      constexpr int kDraws = 20000;  // evenly spaced: a token's count is its share but for the two ends of its part
      std::vector<int> drawn(logits.size());
      for (int i = 0; i < kDraws; ++i) ++drawn[choose_token(logits, o, (i + 0.5) / kDraws)];
      for (std::size_t t = 0; t < logits.size(); ++t)
        EXPECT_NEAR(drawn[t], static_cast<double>(p[t] * kDraws), p[t] > 0 ? 1.001 : 0.0) << t << " T " << o.temperature << " p " << o.top_p;
    }
}

TEST(ChooseToken, SampledFrequenciesAreTheProbabilities) {
  std::mt19937_64 random(7);
  std::uniform_real_distribution<double> unit;
  for (const auto& o : kChoices) {
    const auto logits = some_logits(23, 4);
    const auto p = probabilities(logits, o);
    constexpr int kDraws = 20000;
    std::vector<int> drawn(logits.size());
    for (int i = 0; i < kDraws; ++i) ++drawn[choose_token(logits, o, unit(random))];
    double chi_square = 0, freedom = -1;
    for (std::size_t t = 0; t < logits.size(); ++t) {
      const auto expected = static_cast<double>(p[t] * kDraws);
      if (expected == 0) {
        ASSERT_EQ(drawn[t], 0);
      }
      if (expected < 5) continue;  // too few to count
      chi_square += std::pow(drawn[t] - expected, 2) / expected;
      ++freedom;
    }
    // Mean `freedom`, variance twice that: five standard deviations above, and a little for one or two degrees.
    EXPECT_LT(chi_square, freedom + 5 * std::sqrt(2 * std::max(0.0, freedom)) + 5);
  }
}

TEST(ChooseToken, TiesOfTheNucleusGoToTheLowerIds) {
  const std::vector<float> equal(8, 1.0f);
  for (double r : {0.0, 0.3, 0.6, 0.99}) {
    EXPECT_LT(choose_token(equal, {.temperature = 1, .top_p = 0.5}, r), 4u);   // exactly half: four of eight
    EXPECT_LT(choose_token(equal, {.temperature = 1, .top_p = 0.51}, r), 5u);  // a little more wants a fifth
    EXPECT_EQ(choose_token(equal, {.temperature = 1, .top_p = 0.01}, r), 0u);
  }
  EXPECT_EQ(choose_token(equal, {.temperature = 1, .top_p = 0.51}, 0.999), 4u);
}

// -- generating ---------------------------------------------------------------------------------------------------------

ModelConfig config_of_bytes(std::int64_t context) {
  ModelConfig m = test::tiny_config();
  m.vocabulary = 257;
  m.vocabulary_padded = 264;
  m.context = context;
  m.attention.epsilon = 0.01f;
  return m;
}

struct Model : test::TestModel {
  Model(const ModelConfig& config, std::int64_t cache, int threads = 1)
      : TestModel(config, {.micro_batch = 1, .training = false, .cache = cache}, 1, make_cpu_ops(threads)), tokenizer(load_tokenizer("bytes")) {}
  std::vector<Generation> texts(const std::vector<std::string>& prompts, const GenerateOptions& o) {
    std::vector<Generation> all;
    notices.clear();
    GenerateEvents events;
    events.on_text = [&](const Generation& g) { all.push_back(g); };
    events.on_notice = [&](const std::string& text) { notices.push_back(text); };
    totals = generate(gpt, *tokenizer, prompts, o, events);
    return all;
  }
  std::unique_ptr<Tokenizer> tokenizer;
  std::vector<std::string> notices;
  GenerateTotals totals;
};

/// The definition: every token from the whole text so far, draw n by the documented hash of (seed, n).
std::vector<std::uint32_t> by_recomputation(Model& m, const std::string& prompt, const GenerateOptions& o) {
  const std::uint32_t end = m.tokenizer->end_of_text();
  std::vector<std::int32_t> seen{static_cast<std::int32_t>(end)};
  for (const auto t : m.tokenizer->encode(prompt)) seen.push_back(static_cast<std::int32_t>(t));
  std::vector<std::uint32_t> made;
  for (std::int64_t n = 0; n < o.tokens; ++n) {
    const auto length = std::min(seen.size(), static_cast<std::size_t>(m.gpt.config().context));
    std::uint64_t z = o.seed * 0xd1342543de82ef95ull + static_cast<std::uint64_t>(n + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    const auto token = choose_token(m.gpt.next_logits(std::span(seen).last(length)), o, static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1.0p-53);
    if (o.stop_at_end && token == end) break;
    made.push_back(token);
    if (token == end && m.gpt.config().attention.document_mask) seen.clear();
    seen.push_back(static_cast<std::int32_t>(token));
  }
  return made;
}

TEST(Generate, IsRecomputationWithinTheContextAndBeyond) {
  for (const bool mask : {false, true})
    for (const double temperature : {0.0, 1.0, 3.0}) {  // at 3 end of text comes again and again
      ModelConfig config = config_of_bytes(40);
      config.attention.document_mask = mask;
      Model model(config, 2);
      const GenerateOptions o{.tokens = 150, .temperature = temperature, .seed = 5, .stop_at_end = false};
      const auto text = model.texts({"abc def"}, o);
      ASSERT_EQ(text.size(), 1u);
      EXPECT_EQ(text[0].tokens, by_recomputation(model, "abc def", o)) << mask << " " << temperature;
      EXPECT_EQ(text[0].prefill.tokens, 8);
      EXPECT_EQ(text[0].decode.tokens, 149);
      if (!mask) {
        EXPECT_EQ(model.totals.recomputed, 150 + 8 - 40 - 1);  // the last token is not computed on
      }
      EXPECT_EQ(model.notices.size(), model.totals.recomputed > 0 ? 1u : 0u);
      EXPECT_EQ(generate(model.gpt, *model.tokenizer, "abc def", o), text[0].tokens);
      GenerateOptions without = o;
      without.recompute = true;
      EXPECT_EQ(model.texts({"abc def"}, without)[0].tokens, text[0].tokens);
      Model none(config, 0);  // as in training, and on a GPU
      EXPECT_EQ(none.texts({"abc def"}, o)[0].tokens, text[0].tokens);
    }
}

TEST(Generate, APromptLongerThanTheContextIsSeenFromItsEnd) {
  Model model(config_of_bytes(16), 1);
  const std::string prompt(30, 'x');
  const GenerateOptions o{.tokens = 5, .temperature = 0};
  EXPECT_EQ(model.texts({prompt + "yz"}, o)[0].tokens, by_recomputation(model, prompt + "yz", o));
  ASSERT_EQ(model.notices.size(), 2u);
  EXPECT_NE(model.notices[0].find("prompt 1 has 33 tokens"), std::string::npos) << model.notices[0];
  EXPECT_NE(model.notices[0].find("the last 16"), std::string::npos);
  EXPECT_NE(model.notices[1].find("slow"), std::string::npos);
}

TEST(Generate, ABatchGivesEachPromptWhatItGetsAlone) {
  ModelConfig config = config_of_bytes(48);
  config.attention.document_mask = true;
  const std::vector<std::string> prompts{"one", "", "a prompt that is longer than the others are", "two", std::string("\xf0\x9f\x98\x80", 4)};
  const GenerateOptions o{.tokens = 40, .temperature = 2, .top_k = 60, .top_p = 0.97, .seed = 11, .samples = 3};
  Model alone(config, 1), together(config, 4, 3), wide(config, 15);
  std::vector<Generation> wanted;
  for (std::size_t i = 0; i < prompts.size(); ++i)
    for (auto g : alone.texts({prompts[i]}, o)) {
      g.prompt = i;
      wanted.push_back(g);
    }
  int ended = 0;
  for (Model* batch : {&together, &wide}) {
    const auto made = batch->texts(prompts, o);
    ASSERT_EQ(made.size(), wanted.size());
    for (std::size_t i = 0; i < made.size(); ++i) {
      EXPECT_EQ(made[i].prompt, wanted[i].prompt);
      EXPECT_EQ(made[i].sample, wanted[i].sample);
      EXPECT_EQ(made[i].tokens, wanted[i].tokens) << i;
      EXPECT_EQ(made[i].ended, wanted[i].ended);
      ended += made[i].ended;
    }
  }
  EXPECT_GT(ended, 0);                            // so that texts of different lengths left their places to others
  EXPECT_NE(wanted[0].tokens, wanted[1].tokens);  // samples differ
  GenerateOptions one = o;
  one.samples = 1;
  EXPECT_EQ(alone.texts({"one"}, one)[0].tokens, wanted[0].tokens);  // and the first is that of a single text
}

TEST(Generate, SamplesFollowTheModelsProbabilities) {
  Model model(config_of_bytes(8), 16);
  const GenerateOptions o{.tokens = 1, .temperature = 1, .top_k = 6, .seed = 3, .samples = 6000, .stop_at_end = false};
  const auto p = probabilities(model.gpt.next_logits(std::vector<std::int32_t>{256, 'h'}), o);
  std::vector<int> drawn(257);
  for (const auto& g : model.texts({"h"}, o)) ++drawn[g.tokens.at(0)];
  double chi_square = 0;
  for (std::size_t t = 0; t < p.size(); ++t) {
    if (p[t] == 0) {
      ASSERT_EQ(drawn[t], 0);
      continue;
    }
    chi_square += std::pow(drawn[t] - static_cast<double>(p[t]) * o.samples, 2) / (static_cast<double>(p[t]) * o.samples);
  }
  EXPECT_LT(chi_square, 5 + 5 * std::sqrt(10.0));  // five degrees of freedom
}

TEST(Generate, TokensComeAsTheyAreMade) {
  Model model(config_of_bytes(30), 3);
  std::vector<std::vector<std::uint32_t>> heard(3);
  std::vector<std::size_t> whole;
  GenerateEvents events;
  events.on_token = [&](const Generation& g, std::uint32_t token) {
    heard[g.prompt].push_back(token);
    EXPECT_EQ(g.tokens.back(), token);
  };
  events.on_text = [&](const Generation& g) {
    EXPECT_EQ(g.tokens, heard[g.prompt]);
    whole.push_back(g.prompt);
  };
  const std::vector<std::string> prompts{"a", "b", "c"};
  generate(model.gpt, *model.tokenizer, prompts, {.tokens = 9, .temperature = 1, .stop_at_end = false}, events);
  EXPECT_EQ(whole, (std::vector<std::size_t>{0, 1, 2}));
  test::TestModel small(config_of_bytes(30), {.micro_batch = 1, .tokens = 10, .training = false, .cache = 1});
  EXPECT_THROW(generate(small.gpt, *model.tokenizer, prompts, {.tokens = 20, .stop_at_end = false}, {}), std::logic_error);
}

// -- prompts and characters ---------------------------------------------------------------------------------------------

class Prompts : public ::testing::Test {
 protected:
  void SetUp() override { fs::create_directories(folder); }
  void TearDown() override { fs::remove_all(folder); }
  std::string write(const std::string& name, const std::string& bytes) const {
    std::ofstream(folder / name, std::ios::binary) << bytes;
    return folder / name;
  }
  static void expect_error(const std::string& file, const std::string& key, std::initializer_list<std::string> parts) {
    try {
      read_prompts(file, key);
      ADD_FAILURE() << "nothing was thrown for " << file;
    } catch (const std::invalid_argument& e) {
      for (const auto& part : parts) EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what() << "  lacks  " << part;
    }
  }
  const fs::path folder = fs::temp_directory_path() / ("tessera_prompts_" + std::to_string(getpid()));
};

TEST_F(Prompts, LinesAndObjects) {
  using Texts = std::vector<std::string>;
  EXPECT_EQ(read_prompts(write("a.txt", "one\n\n  two \r\n\t\nthr\xc3\xa9\xc3\xa9"), ""), (Texts{"one", "  two ", "thr\xc3\xa9\xc3\xa9"}));
  EXPECT_EQ(read_prompts(write("a.jsonl", "{\"prompt\": \"x\\ny\", \"id\": 3}\n\n{\"id\": 4, \"prompt\": \"\"}\n"), ""), (Texts{"x\ny", ""}));
  EXPECT_EQ(read_prompts(write("b.txt", "{\"q\": \"z\"}"), "q"), (Texts{"z"}));
  EXPECT_EQ(read_prompts(write("c.txt", "{\"q\": \"z\"}"), ""), (Texts{"{\"q\": \"z\"}"}));
  const std::string gz = folder / "d.txt.gz";
  gzFile file = gzopen(gz.c_str(), "wb");
  gzputs(file, "packed\n");
  gzclose(file);
  EXPECT_EQ(read_prompts(gz, ""), (Texts{"packed"}));
}

TEST_F(Prompts, WhatIsWrongIsNamed) {
  expect_error(folder / "none", "", {"none"});
  expect_error(write("empty.txt", " \n\n"), "", {"empty.txt", "found none"});
  expect_error(write("bad.txt", "fine\nbro\xffken\n"), "", {"bad.txt:2", "UTF-8", "0xff", "offset 3"});
  expect_error(write("bad.jsonl", "{\"prompt\": \"a\"}\n{\"prompt\": \n"), "", {"bad.jsonl:2", "JSON"});
  expect_error(write("key.jsonl", "{\"text\": \"a\", \"id\": 1}\n"), "", {"key.jsonl:1", "no key \"prompt\"", "\"id\", \"text\"", "--prompt-key"});
  expect_error(write("list.jsonl", "[1]\n"), "", {"list.jsonl:1", "object"});
  expect_error(write("number.jsonl", "{\"prompt\": 5}\n"), "", {"number.jsonl:1", "number", "expected text"});
  EXPECT_NO_THROW(check_utf8("x", "\xf0\x9f\x98\x80"));
  EXPECT_THROW(check_utf8("x", "\xed\xa0\x80"), std::invalid_argument);  // a surrogate
}

TEST(CharacterStream, ShowsWholeCharacters) {
  const std::string text = "a\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80z";  // 1, 2, 3, 4, 1 bytes
  CharacterStream stream;
  std::vector<std::string> pieces;
  for (const char byte : text)
    if (auto piece = stream.add({&byte, 1}); !piece.empty()) pieces.push_back(piece);
  EXPECT_EQ(pieces, (std::vector<std::string>{"a", "\xc3\xa9", "\xe2\x82\xac", "\xf0\x9f\x98\x80", "z"}));
  EXPECT_EQ(stream.finish(), "");
  EXPECT_EQ(stream.add("b\xe2\x82"), "b");
  EXPECT_EQ(stream.add("\xac\xc3"), "\xe2\x82\xac");
  EXPECT_EQ(stream.finish(), "\xc3");  // the text ended inside a character
  // What is no UTF-8 is held back no longer than a character could be, and nothing is lost.
  std::mt19937 random(1);
  std::string bytes, shown;
  for (int i = 0; i < 5000; ++i) {
    const auto byte = static_cast<char>(random() % 4 ? 0x80 + random() % 0x80 : random() % 0x80);
    bytes += byte;
    shown += stream.add({&byte, 1});
    ASSERT_LE(bytes.size() - shown.size(), 3u);
  }
  EXPECT_EQ(shown + stream.finish(), bytes);
}

}  // namespace
}  // namespace tessera
