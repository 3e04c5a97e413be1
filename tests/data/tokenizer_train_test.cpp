// Learning a vocabulary: against Hugging Face's trainer (recorded) and against a definition that counts everything again for each merge.

#include <gtest/gtest.h>

#include <map>
#include <random>

#include "data/bpe.h"
#include "data/bpe_split.h"
#include "data/bpe_train.h"
#include "data/files.h"
#include "tests/data/support.h"

namespace tessera {
namespace {

const std::string kFixtures = TESSERA_FIXTURES "/tokenizer";

using Pair = std::pair<std::uint32_t, std::uint32_t>;

/// The merges by the definition: the pair with the highest count, the lowest ids among equals; then everything is counted again.
std::vector<Pair> naive_merges(const std::string& text, std::size_t most) {
  std::array<std::uint32_t, 256> id;
  for (std::uint32_t i = 0; i < 256; ++i) id[byte_order()[i]] = i;
  std::vector<std::vector<std::uint32_t>> words;
  PieceSplitter splitter(text);
  for (std::string_view piece; splitter.next(piece);) {
    words.emplace_back();
    for (const char byte : piece) words.back().push_back(id[static_cast<unsigned char>(byte)]);
  }
  std::vector<Pair> merges;
  while (merges.size() < most) {
    std::map<Pair, int> counts;
    for (const auto& word : words) {
      for (std::size_t i = 0; i + 1 < word.size(); ++i) ++counts[{word[i], word[i + 1]}];
    }
    Pair best;
    int best_count = 1;
    for (const auto& [pair, count] : counts) {
      if (count > best_count) best = pair, best_count = count;
    }
    if (best_count < 2) break;
    const auto result = static_cast<std::uint32_t>(256 + merges.size());
    merges.push_back(best);
    for (auto& word : words) {
      std::vector<std::uint32_t> joined;
      for (std::size_t i = 0; i < word.size(); ++i) {
        const bool here = i + 1 < word.size() && word[i] == best.first && word[i + 1] == best.second;
        joined.push_back(here ? result : word[i]);
        i += here;
      }
      word = joined;
    }
  }
  return merges;
}

std::vector<Pair> pairs_of(const BpeDefinition& definition) {
  std::vector<Pair> out;
  for (const BpeMerge& merge : definition.merges) out.emplace_back(merge.left, merge.right);
  return out;
}

TEST(BpeTrainer, LearnsWhatHuggingFaceLearns) {
  BpeTrainer trainer;
  trainer.add(read_file(kFixtures + "/alice.txt"));
  const auto learned = make_bpe_tokenizer(trainer.train(600), "bpe", "learned");
  EXPECT_EQ(trainer.count_tokens(*learned), learned->encode(read_file(kFixtures + "/alice.txt")).size());
  EXPECT_EQ(learned->vocabulary(), 600);
  EXPECT_EQ(learned->end_of_text(), 599u);
  EXPECT_EQ(learned->hash(), load_tokenizer("bpe:" + kFixtures + "/small.json")->hash());
}

TEST(BpeTrainer, FollowsTheDefinitionOnRandomText) {
  std::mt19937 random(4);
  for (int round = 0; round < 60; ++round) {
    const std::string letters = std::string("ab \xC3\xA9\xFF").substr(0, 1 + random() % 6);  // few letters: many ties and overlaps
    std::string text(1 + random() % 600, '\0');
    for (char& c : text) c = letters[random() % letters.size()];
    BpeTrainer trainer;
    trainer.add(text);
    const BpeDefinition learned = trainer.train(257 + 60);
    ASSERT_EQ(pairs_of(learned), naive_merges(text, 60)) << "round " << round;
    // What was learned is a valid tokenizer, and it brings the text back.
    const auto tokenizer = make_bpe_tokenizer(learned, "bpe", "learned");
    EXPECT_EQ(tokenizer->decode(tokenizer->encode(text)), text);
  }
}

TEST(BpeTrainer, DependsOnCountsAloneNotOnOrder) {
  const std::string text = read_file(kFixtures + "/alice.txt");
  BpeTrainer forward, backward;
  std::vector<std::string> lines;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size() - 1) + 1;
    lines.push_back(text.substr(begin, end - begin));
    begin = end;
  }
  for (std::size_t i = 0; i < lines.size(); ++i) {
    forward.add(lines[i]);
    backward.add(lines[lines.size() - 1 - i]);
  }
  EXPECT_EQ(forward.bytes(), text.size());
  EXPECT_EQ(forward.bytes(), backward.bytes());
  EXPECT_EQ(pairs_of(forward.train(500)), pairs_of(backward.train(500)));
}

TEST(BpeTrainer, StopsWhenNothingRepeats) {
  BpeTrainer empty, one;
  EXPECT_EQ(empty.train(1000).tokens.size(), 257u);
  one.add("abcabc");  // one piece: ab twice, then abc twice, then abcabc once
  const BpeDefinition learned = one.train(1000);
  EXPECT_EQ(learned.tokens.size(), 259u);
  EXPECT_EQ(learned.tokens[257], "abc");
  EXPECT_EQ(learned.tokens[learned.end_of_text], kEndOfText);
  EXPECT_EQ(one.train(257).merges.size(), 0u);
  EXPECT_THROW(one.train(256), std::invalid_argument);
}

TEST(BpeTrainer, OneEndlessWordIsNotQuadratic) {
  BpeTrainer trainer;
  std::string word(1 << 20, 'a');
  trainer.add(word);
  std::mt19937 random(5);
  for (char& c : word) c = "abcdefghijklmnop"[random() % 16];
  trainer.add(word);
  const BpeDefinition learned = trainer.train(3000);
  EXPECT_EQ(learned.tokens.size(), 3000u);
}

}  // namespace
}  // namespace tessera
