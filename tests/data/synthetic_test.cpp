// Synthetic tasks against their definitions, read off the finished sequences.

#include "data/synthetic.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <set>

#include "data/loader.h"

namespace tessera {
namespace {

using Kind = SyntheticTask::Kind;
using Split = SyntheticSource::Split;

SyntheticTask mqar(std::int64_t vocabulary, std::int64_t pairs, double power_a = 0.01, SyntheticTask::Filler filler = SyntheticTask::Filler::random) {
  return {.kind = Kind::mqar, .vocabulary = vocabulary, .pairs = pairs, .power_a = power_a, .filler = filler};
}
SyntheticTask of(Kind kind, std::int64_t vocabulary, std::vector<std::int64_t> distances) {
  return {.kind = kind, .vocabulary = vocabulary, .distances = std::move(distances)};
}
SyntheticTask range(Kind kind, std::int64_t vocabulary, std::int64_t shortest, std::int64_t longest) {
  return {.kind = kind, .vocabulary = vocabulary, .shortest = shortest, .longest = longest};
}

SyntheticSequence make(const SyntheticSource& source, std::uint64_t number) {
  SyntheticSequence s;
  source.make(number, s);
  return s;
}

/// What holds of every task: tokens in the vocabulary, and an answer that stands where its distance says.
void expect_sound(const SyntheticSequence& s, std::int64_t context, std::int64_t vocabulary) {
  ASSERT_EQ(std::ssize(s.token), context);
  ASSERT_EQ(std::ssize(s.target), context);
  ASSERT_EQ(std::ssize(s.distance), context);
  for (std::size_t t = 0; t < s.token.size(); ++t) {
    ASSERT_TRUE(s.token[t] >= 0 && s.token[t] < vocabulary) << t;
    if (s.target[t] < 0) {
      ASSERT_EQ(s.target[t], -1);
      ASSERT_EQ(s.distance[t], 0);
      continue;
    }
    ASSERT_GE(s.distance[t], 1);
    ASSERT_LE(s.distance[t], static_cast<std::int32_t>(t));
    ASSERT_EQ(s.token[t - static_cast<std::size_t>(s.distance[t])], s.target[t]) << t;
  }
}

TEST(Synthetic, MqarAsksForTheValueOfEveryKeyOnce) {
  struct Case {
    std::int64_t vocabulary, pairs, context;
  };
  for (const auto& [vocabulary, pairs, context] : {Case{8192, 8, 64}, {64, 16, 64}, {34, 16, 100}, {9, 3, 13}, {4, 1, 4}})
    for (const bool padding : {false, true}) {
      const SyntheticSource source(mqar(vocabulary, pairs, 0.1, padding ? SyntheticTask::Filler::padding : SyntheticTask::Filler::random), context,
                                   Split::train, 7);
      for (std::uint64_t n = 0; n < 50; ++n) {
        const SyntheticSequence s = make(source, n);
        expect_sound(s, context, vocabulary);
        std::map<std::int32_t, std::int32_t> value_of;
        std::set<std::int32_t> values, asked;
        for (std::size_t i = 0; i < static_cast<std::size_t>(2 * pairs); i += 2) {
          ASSERT_TRUE(s.token[i] >= 1 && s.token[i] < vocabulary / 2);
          ASSERT_GE(s.token[i + 1], vocabulary / 2);
          ASSERT_TRUE(value_of.emplace(s.token[i], s.token[i + 1]).second) << "a key twice";
          ASSERT_TRUE(values.insert(s.token[i + 1]).second) << "a value twice";
        }
        for (std::size_t t = 0; t < s.token.size(); ++t) {
          if (s.target[t] >= 0) {
            ASSERT_GE(t, static_cast<std::size_t>(2 * pairs));
            ASSERT_EQ(t % 2, 0u);
            ASSERT_TRUE(asked.insert(s.token[t]).second);
            ASSERT_EQ(value_of.at(s.token[t]), s.target[t]);
          } else if (padding && t >= static_cast<std::size_t>(2 * pairs)) {
            ASSERT_EQ(s.token[t], 0);
          }
        }
        ASSERT_EQ(std::ssize(asked), pairs);
      }
    }
}

// Of the first pair the gap has the weight's share; of the second, what drawing without putting back makes of it.
TEST(Synthetic, MqarGapsFollowThePowerLaw) {
  constexpr std::int64_t kPairs = 3, kContext = 26, kSpace = (kContext - 2 * kPairs) / 2;
  constexpr int kSequences = 20000;
  for (const double power_a : {0.01, 0.5, 1.0}) {
    std::vector<double> p(kSpace), first(kSpace), second(kSpace);
    for (std::size_t g = 0; g < p.size(); ++g) p[g] = std::pow(static_cast<double>(g + 1), power_a - 1);
    const double sum = std::accumulate(p.begin(), p.end(), 0.0);
    for (double& share : p) share /= sum;
    const SyntheticSource source(mqar(4096, kPairs, power_a), kContext, Split::train, 1);
    for (std::uint64_t n = 0; n < kSequences; ++n) {
      const SyntheticSequence s = make(source, n);
      for (std::size_t t = 0; t < s.token.size(); ++t) {
        if (s.target[t] < 0) continue;
        const std::size_t gap = (t - 2 * kPairs) / 2;
        if (s.token[t] == s.token[0]) ++first[gap];
        if (s.token[t] == s.token[2]) ++second[gap];
      }
    }
    for (std::size_t g = 0; g < p.size(); ++g) {
      double after = 0;
      for (std::size_t h = 0; h < p.size(); ++h)
        if (h != g) after += p[h] * p[g] / (1 - p[h]);
      for (const auto& [counted, wanted] : {std::pair{first[g], p[g]}, {second[g], after}})
        EXPECT_NEAR(counted, kSequences * wanted, 5 * std::sqrt(kSequences * wanted)) << power_a << ", gap " << g;
    }
  }
}

TEST(Synthetic, CopyAsksForTheStringAgain) {
  const SyntheticSource source(of(Kind::copy, 10, {1, 5, 12}), 24, Split::train, 3);
  std::set<std::size_t> lengths;
  for (std::uint64_t n = 0; n < 100; ++n) {
    const SyntheticSequence s = make(source, n);
    expect_sound(s, 24, 10);
    const auto length = static_cast<std::size_t>(std::ranges::find(s.token, 1) - s.token.begin());
    lengths.insert(length);
    for (std::size_t t = 0; t < 24; ++t) {
      if (t < length) {
        ASSERT_GE(s.token[t], 2);
      } else if (t > length) {
        ASSERT_EQ(s.token[t], t <= 2 * length ? s.token[t - length - 1] : 0) << "the string again, then padding";
      }
      const bool asks = t >= length && t < 2 * length;
      ASSERT_EQ(s.target[t], asks ? s.token[t - length] : -1);
      ASSERT_EQ(s.distance[t], asks ? static_cast<std::int32_t>(length) : 0);
    }
  }
  EXPECT_EQ(lengths, (std::set<std::size_t>{1, 5, 12}));
}

TEST(Synthetic, NeedlePlantsOnePairAtItsDistance) {
  const SyntheticSource source(of(Kind::needle, 12, {1, 7, 38}), 40, Split::train, 3);
  std::set<std::int32_t> distances;
  for (std::uint64_t n = 0; n < 100; ++n) {
    const SyntheticSequence s = make(source, n);
    expect_sound(s, 40, 12);
    const std::int32_t key = s.token[39], d = s.distance[39];
    distances.insert(d);
    ASSERT_TRUE(key >= 1 && key < 6);
    ASSERT_EQ(std::ranges::count(s.token, key), 2);
    const auto found = static_cast<std::size_t>(std::ranges::find(s.token, key) - s.token.begin());
    ASSERT_EQ(found + 1 + static_cast<std::size_t>(d), 39u);
    ASSERT_EQ(s.token[found + 1], s.target[39]);
    ASSERT_GE(s.target[39], 6);
    ASSERT_EQ(std::ranges::count_if(s.target, [](std::int32_t t) { return t >= 0; }), 1);
  }
  EXPECT_EQ(distances, (std::set<std::int32_t>{1, 7, 38}));
}

TEST(Synthetic, DistancesOfARangeAreUniformInTheLogarithm) {
  constexpr int kSequences = 7000;
  const SyntheticSource source(range(Kind::needle, 64, 1, 127), 130, Split::train, 3);
  std::map<int, int> counts;  // by power of two
  std::set<std::int32_t> distances;
  for (std::uint64_t n = 0; n < kSequences; ++n) {
    const std::int32_t d = make(source, n).distance.back();
    ++counts[std::ilogb(d)];
    distances.insert(d);
  }
  ASSERT_EQ(counts.size(), 7u);
  for (const auto& [power, count] : counts) EXPECT_NEAR(count, kSequences / 7, 5 * std::sqrt(kSequences / 7.0)) << power;
  EXPECT_EQ(*distances.begin(), 1);
  EXPECT_EQ(*distances.rbegin(), 127);
  // 0: as far as the sequence goes.
  std::int32_t needle = 0, copy = 0;
  for (std::uint64_t n = 0; n < 300; ++n) {
    needle = std::max(needle, make(SyntheticSource(range(Kind::needle, 64, 9, 0), 16, Split::train, 3), n).distance.back());
    copy = std::max(copy, std::ranges::max(make(SyntheticSource(range(Kind::copy, 64, 2, 0), 17, Split::train, 3), n).distance));
  }
  EXPECT_EQ(needle, 14);
  EXPECT_EQ(copy, 8);
}

TEST(Synthetic, SequencesAreAFunctionOfSeedSplitAndNumber) {
  for (const SyntheticTask& task : {mqar(64, 4), range(Kind::copy, 64, 1, 0), range(Kind::needle, 64, 1, 0)}) {
    const SyntheticSource a(task, 32, Split::train, 1), same(task, 32, Split::train, 1), other(task, 32, Split::train, 2),
        validation(task, 32, Split::validation, 1), same_validation(task, 32, Split::validation, 2);
    std::set<std::vector<std::int32_t>> all;
    for (const std::uint64_t n : {0ull, 1ull, 2ull, 1000ull, 1ull << 40}) {
      EXPECT_EQ(make(a, n).token, make(same, n).token);
      EXPECT_EQ(make(validation, n).token, make(same_validation, n).token);
      for (const auto* source : {&a, &other, &validation}) all.insert(make(*source, n).token);
    }
    EXPECT_EQ(all.size(), 15u) << "none twice";
  }
}

TEST(Synthetic, WhatDoesNotFitIsSaid) {
  const auto expect = [](const SyntheticTask& task, std::int64_t context, const std::string& words) {
    EXPECT_NE(synthetic_problem(task, context).find(words), std::string::npos) << synthetic_problem(task, context);
    EXPECT_THROW(SyntheticSource(task, context, Split::train, 1), std::invalid_argument);
  };
  expect(mqar(64, 5), 19, "5 pairs and their queries take 20 tokens, and a sequence has 19; expected at most 4 pairs");
  expect(mqar(64, 1), 3, "1 pair and its query take 4 tokens");
  expect(mqar(64, 32), 128, "32 pairs want as many keys, and a vocabulary of 64 has 31; expected a vocabulary of at least 66");
  expect(mqar(3, 1), 128, "a vocabulary of 3");
  expect(of(Kind::copy, 64, {4, 9}), 17, "a length of 9 takes 18 tokens, and a sequence has 17; expected at most 8");
  expect(of(Kind::needle, 64, {15}), 16, "a distance of 15 takes 17 tokens, and a sequence has 16; expected at most 14");
  expect(range(Kind::needle, 64, 1, 15), 16, "expected at most 14");
  expect(range(Kind::needle, 64, 15, 0), 16, "shortest 15 and longest 14 (as far as the sequence goes)");
  expect(range(Kind::needle, 64, 5, 4), 16, "shortest 5 and longest 4;");
  expect(range(Kind::needle, 64, 1, 0), 2, "too short; expected a context of at least 3");
  EXPECT_EQ(synthetic_problem(mqar(66, 32), 128), "");
  EXPECT_EQ(synthetic_problem(of(Kind::needle, 4, {14}), 16), "");
  EXPECT_EQ(possible_answers(of(Kind::copy, 10, {})), 8);
  EXPECT_EQ(possible_answers(mqar(9, 1)), 5);
}

/// The next `count` micro-batches, rows one after another.
struct Rows {
  std::vector<std::int32_t> token, target, distance;
  std::uint64_t answers = 0;
  void take(Loader& loader, int count) {
    for (int i = 0; i < count; ++i) {
      const HostBatch& batch = loader.next();
      token.insert(token.end(), batch.token.begin(), batch.token.end());
      target.insert(target.end(), batch.target.begin(), batch.target.end());
      distance.insert(distance.end(), batch.distance.begin(), batch.distance.end());
      answers += batch.target_tokens;
      EXPECT_EQ(std::ranges::count_if(batch.document_start, [](std::int32_t start) { return start != 0; }), 0);
    }
  }
};

TEST(Synthetic, LoadersDealTheSequencesOutByIndex) {
  const SyntheticTask task = mqar(64, 4);
  LoaderOptions o;
  o.context = 20;
  o.micro_batch = 2;
  o.sequences_per_step = 8;
  o.seed = 5;
  Loader whole(task, o);
  Rows all;
  all.take(whole, 3 * 4);
  EXPECT_EQ(all.answers, 3u * 8 * 4);
  const SyntheticSource source(task, 20, Split::train, 5);
  for (std::uint64_t n = 0; n < 24; ++n) {
    const SyntheticSequence s = make(source, n);
    EXPECT_TRUE(std::ranges::equal(s.token, std::span(all.token).subspan(20 * n, 20)));
    EXPECT_TRUE(std::ranges::equal(s.target, std::span(all.target).subspan(20 * n, 20)));
    EXPECT_TRUE(std::ranges::equal(s.distance, std::span(all.distance).subspan(20 * n, 20)));
  }

  // Ranks take their rows of each step; a later start is the same as having come there.
  o.ranks = 2;
  Rows ranks;
  std::vector<std::unique_ptr<Loader>> loaders;
  for (o.rank = 0; o.rank < 2; ++o.rank) loaders.push_back(std::make_unique<Loader>(task, o));
  for (int step = 0; step < 3; ++step)
    for (const auto& loader : loaders) ranks.take(*loader, 2);
  EXPECT_EQ(ranks.token, all.token);
  EXPECT_EQ(ranks.target, all.target);
  o.rank = 1;
  o.first_step = 2;
  Rows late;
  Loader resumed(task, o);
  late.take(resumed, 2);
  EXPECT_TRUE(std::ranges::equal(late.token, std::span(all.token).last(4 * 20)));

  // Places of each sequence, in training and validation.
  o.places = {0, 1, 7, 8, 19};
  Loader part(task, o);
  const HostBatch& batch = part.next();
  EXPECT_EQ(batch.tokens, 5);
  const HostBatch held = read_sequences(source, 20, 2, o.places), full = read_sequences(source, 20, 2);
  for (const HostBatch* b : {&batch, &held})
    for (std::size_t i = 0; i < 10; ++i) {
      const std::size_t at = 20 * (i / 5) + static_cast<std::size_t>(o.places[i % 5]);
      EXPECT_EQ(b->token[i], full.token[at]);
      EXPECT_EQ(b->target[i], full.target[at]);
      EXPECT_EQ(b->distance[i], full.distance[at]);
      EXPECT_EQ(b->position[i], o.places[i % 5]);
    }
  EXPECT_THROW(Loader(mqar(64, 6), o), std::invalid_argument);
}

}  // namespace
}  // namespace tessera
