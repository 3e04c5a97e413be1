// Tokens against those that tiktoken and Hugging Face's tokenizers give (recorded: tests/fixtures/tokenizer/record.py), files, invalid input, errors.

#include "data/tokenizer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <map>
#include <new>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <thread>

#include "data/bpe.h"
#include "data/bpe_merge.h"
#include "data/bpe_split.h"
#include "data/files.h"
#include "data/sha256.h"
#include "tests/data/support.h"

namespace {
std::atomic<std::uint64_t> allocations{0};
[[gnu::noinline]] void* allocate(std::size_t bytes) {
  ++allocations;
  return std::malloc(bytes ? bytes : 1);
}
[[gnu::noinline]] void release(void* memory) { std::free(memory); }
}  // namespace

void* operator new(std::size_t bytes) {
  if (void* memory = allocate(bytes)) return memory;
  throw std::bad_alloc();
}
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept { return allocate(bytes); }
void* operator new[](std::size_t bytes) { return operator new(bytes); }
void* operator new[](std::size_t bytes, const std::nothrow_t&) noexcept { return allocate(bytes); }
void operator delete(void* memory) noexcept { release(memory); }
void operator delete[](void* memory) noexcept { release(memory); }
void operator delete(void* memory, std::size_t) noexcept { release(memory); }
void operator delete[](void* memory, std::size_t) noexcept { release(memory); }

namespace tessera {
namespace {

using nlohmann::json;
using test::put;
using test::TemporaryFolder;
using Tokens = std::vector<std::uint32_t>;

const std::string kFixtures = TESSERA_FIXTURES "/tokenizer";

json fixture(const std::string& name) { return json::parse(read_file(kFixtures + "/" + name)); }

const Tokenizer& small() {
  static const auto tokenizer = load_tokenizer("bpe:" + kFixtures + "/small.json");
  return *tokenizer;
}

std::vector<std::string> pieces_of(std::string_view text) {
  std::vector<std::string> out;
  PieceSplitter splitter(text);
  for (std::string_view piece; splitter.next(piece);) out.emplace_back(piece);
  return out;
}

std::string utf8(std::uint32_t c) {
  const auto low = [](std::uint32_t bits) { return static_cast<char>(0x80 | (bits & 0x3F)); };
  if (c < 0x80) return {static_cast<char>(c)};
  if (c < 0x800) return {static_cast<char>(0xC0 | c >> 6), low(c)};
  if (c < 0x10000) return {static_cast<char>(0xE0 | c >> 12), low(c >> 6), low(c)};
  return {static_cast<char>(0xF0 | c >> 18), low(c >> 12), low(c >> 6), low(c)};
}

void expect_recorded_tokens(const Tokenizer& tokenizer, const std::string& name) {
  for (const auto& line : fixture(name)) {
    const std::string text = line[0];
    const Tokens tokens = tokenizer.encode(text);
    EXPECT_EQ(tokens, line[1].get<Tokens>()) << line[0];
    EXPECT_EQ(tokenizer.decode(tokens), text);
  }
}

// -- Against other implementations ----------------------------------------------------------------------------------------------------------

TEST(Tokenizer, SmallVocabularyGivesTheTokensOfTiktokenAndTokenizers) { expect_recorded_tokens(small(), "small_tokens.json"); }

TEST(Tokenizer, LargeGeneratedTextsGiveTheTokensOfTiktoken) {
  for (const auto& line : fixture("generated.json")) {
    const std::string name = line[0];
    std::string text;
    if (line[1].is_number()) {  // every character, in the order of this step
      const std::uint64_t step = line[1];
      for (std::uint64_t i = 0; i < 0x110000; ++i)
        if (const auto c = static_cast<std::uint32_t>(i * step % 0x110000); c < 0xD800 || c >= 0xE000) text += utf8(c);
    } else {
      std::vector<std::uint32_t> members;
      for (const auto& range : line[1])
        for (std::uint32_t c = range[0]; c <= range[1].get<std::uint32_t>(); ++c) members.push_back(c);
      std::uint64_t state = line[3];
      for (std::uint64_t i = line[2]; i > 0; --i) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        text += utf8(members[(state >> 33) % members.size()]);
      }
    }
    ASSERT_EQ(text.size(), line[4]) << name;
    const Tokens tokens = small().encode(text);
    EXPECT_EQ(tokens.size(), line[5]) << name;
    std::string bytes;
    for (const std::uint32_t token : tokens)
      for (int i = 0; i < 4; ++i) bytes += static_cast<char>(token >> 8 * i);
    EXPECT_EQ(sha256_hex(bytes), line[6]) << name;
    EXPECT_TRUE(small().decode(tokens) == text) << name;
  }
}

TEST(Tokenizer, Gpt2GivesTheTokensOfTiktokenAndTokenizers) {
  const char* directory = std::getenv("TESSERA_GPT2_DIR");
  if (!directory) GTEST_SKIP() << "SKIPPED: set TESSERA_GPT2_DIR to a folder with GPT-2's vocab.bpe and encoder.json to compare its tokens";
  const auto gpt2 = load_tokenizer(std::string("gpt2:") + directory);
  EXPECT_EQ(gpt2->vocabulary(), 50257);
  EXPECT_EQ(gpt2->end_of_text(), 50256u);
  EXPECT_EQ(gpt2->name(), "gpt2");
  expect_recorded_tokens(*gpt2, "gpt2_tokens.json");
  const TemporaryFolder folder;
  gpt2->save(folder / "tokenizer.json");
  const auto saved = load_tokenizer("bpe:" + folder / "tokenizer.json");
  EXPECT_EQ(saved->hash(), gpt2->hash());
  expect_recorded_tokens(*saved, "gpt2_tokens.json");
}

TEST(Splitter, ClassifiesEveryCharacterAsUnicode16) {
  std::map<std::string, std::vector<bool>> classes;
  for (const auto& line : fixture("classes.json")) {
    auto& members = classes[line[0].get<std::string>()];
    members.resize(0x110000);
    for (const auto& range : line[1]) std::fill(members.begin() + range[0].get<int>(), members.begin() + range[1].get<int>() + 1, true);
  }
  for (std::uint32_t c = 0; c < 0x110000; ++c) {
    if (c >= 0xD800 && c < 0xE000) continue;
    const std::string character = utf8(c);
    const bool letter = classes["letter"][c], number = classes["number"][c], space = classes["space"][c];
    // A character is joined to a letter, a number or a sign before it exactly if it is of the same kind.
    ASSERT_EQ(pieces_of("a" + character).size(), letter ? 1 : 2) << std::hex << c;
    ASSERT_EQ(pieces_of("1" + character).size(), number ? 1 : 2) << std::hex << c;
    ASSERT_EQ(pieces_of("!" + character).size(), letter || number || space ? 2 : 1) << std::hex << c;
    ASSERT_EQ(pieces_of("\n" + character).size(), space ? 1 : 2) << std::hex << c;
  }
}

TEST(Splitter, FollowsThePublishedPattern) {
  const std::vector<std::pair<std::string, std::vector<std::string>>> cases = {
      {"", {}},
      {"Hello world", {"Hello", " world"}},
      {"it's 2 o'clock", {"it", "'s", " 2", " o", "'", "clock"}},
      {"IT'S", {"IT", "'", "S"}},
      {"a   b", {"a", "  ", " b"}},
      {"a   ", {"a", "   "}},
      {"a \n\n b", {"a", " \n\n", " b"}},
      {"a\t!", {"a", "\t", "!"}},
      {" ...x1", {" ...", "x", "1"}},
      {"<|endoftext|>", {"<|", "endoftext", "|>"}},
  };
  for (const auto& [text, pieces] : cases) EXPECT_EQ(pieces_of(text), pieces) << text;
}

// -- Any bytes ----------------------------------------------------------------------------------------------------------------------------

TEST(Splitter, FindsTheValidPrefix) {
  const std::vector<std::pair<std::string, std::size_t>> cases = {
      {"", 0},
      {"plain ASCII, more than eight bytes", 34},
      {"é漢😀", 9},
      {"\xF4\x8F\xBF\xBF", 4},  // U+10FFFF
      {"\xF4\x90\x80\x80", 0},  // above it
      {"\xED\x9F\xBF", 3},      // U+D7FF
      {"\xED\xA0\x80", 0},      // a surrogate
      {"\xC0\x80", 0},          // overlong
      {"\xE0\x9F\xBF", 0},      // overlong
      {"\xF0\x8F\xBF\xBF", 0},  // overlong
      {"ab\x80", 2},            // continuation alone
      {"ab\xC3", 2},            // cut off
      {"ab\xE6\xBC", 2},        // cut off
      {"ab\xF0\x9F\x98", 2},    // cut off
      {"12345678\xFF"
       "12345678",
       8},                          // no UTF-8 byte
      {"\xF8\x88\x80\x80\x80", 0},  // five bytes
  };
  for (const auto& [text, length] : cases) EXPECT_EQ(valid_utf8_prefix(text), length) << text;
}

TEST(Tokenizer, InvalidBytesAreTokensOfTheirOwnBetweenTextsOfTheirOwn) {
  const std::string left = "the cat  ", right = "  sat";
  for (const std::string bad : {"\xFF", "\xC3", "\x80\x80", "\xED\xA0\x80", "\xF0\x9F\x98"}) {
    Tokens expected = small().encode(left);
    for (const char byte : bad) {
      const Tokens one = small().encode(std::string(1, byte));
      ASSERT_EQ(one.size(), 1u);
      EXPECT_EQ(small().decode(one), std::string(1, byte));
      expected.push_back(one[0]);
    }
    for (const std::uint32_t token : small().encode(right)) expected.push_back(token);
    EXPECT_EQ(small().encode(left + bad + right), expected);
  }
}

TEST(Tokenizer, RandomBytesComeBack) {
  std::mt19937 random(1);
  const auto bytes = load_tokenizer("bytes");
  for (int round = 0; round < 300; ++round) {
    std::string text(random() % 2000, '\0');
    const unsigned high = round % 2 ? 256 : 0xC8;  // half of the rounds are mostly ASCII and two-byte starts
    for (char& c : text) c = static_cast<char>(random() % high);
    ASSERT_EQ(small().decode(small().encode(text)), text);
    ASSERT_EQ(bytes->decode(bytes->encode(text)), text);
  }
}

TEST(Tokenizer, LongWordsAndRunsTakeTimeThatFollowsTheirLength) {
  // Quadratic work on 4 MB would outlast the test's time limit by far.
  constexpr std::size_t kLength = 4 << 20;
  std::string letters(kLength, 'a'), random_letters(kLength, 'a');
  std::mt19937 random(2);
  for (char& c : random_letters) c = "etaoinshrdlu"[random() % 12];
  for (const std::string& text :
       {letters, random_letters, std::string(kLength, ' '), std::string(kLength, ' ') + "x", std::string(kLength, '\xFF')}) {
    const Tokens tokens = small().encode(text);
    EXPECT_TRUE(small().decode(tokens) == text);
  }
}

/// The definition of the algorithm: of all adjacent pairs in the list join the one that stands first, leftmost first.
Tokens merged_by_definition(const std::vector<BpeMerge>& merges, Tokens tokens) {
  std::map<std::pair<std::uint32_t, std::uint32_t>, std::size_t> rank;
  for (std::size_t i = 0; i < merges.size(); ++i) rank[{merges[i].left, merges[i].right}] = i;
  while (true) {
    std::size_t best = SIZE_MAX, at = 0;
    for (std::size_t i = 0; i + 1 < tokens.size(); ++i) {
      const auto found = rank.find({tokens[i], tokens[i + 1]});
      if (found != rank.end() && found->second < best) best = found->second, at = i;
    }
    if (best == SIZE_MAX) return tokens;
    tokens[at] = merges[best].result;
    tokens.erase(tokens.begin() + static_cast<std::ptrdiff_t>(at) + 1);
  }
}

TEST(MergeTable, ShortAndLongPiecesFollowTheDefinition) {
  BpeDefinition definition = parse_tokenizer_json(read_file(kFixtures + "/small.json"), "small.json");
  // Runs: ee and eeee are joined too. Bytes of lower-case letters have the ids 'a' - '!' and up.
  const auto e = static_cast<std::uint32_t>('e' - '!');
  const auto twice = static_cast<std::uint32_t>(definition.tokens.size());
  definition.merges.insert(definition.merges.begin() + 100, {e, e, twice});
  definition.merges.insert(definition.merges.begin() + 200, {twice, twice, twice + 1});
  std::mt19937 random(3);
  for (const bool in_order : {true, false}) {
    if (!in_order) std::shuffle(definition.merges.begin(), definition.merges.end(), random);
    const MergeTable table(definition.merges);
    for (const std::size_t length : {0, 1, 2, 3, 10, 127, 128, 129, 130, 200, 330, 350, 500, 1000}) {
      for (int round = 0; round < 12; ++round) {
        Tokens tokens(length);  // few letters make long chains of merges
        for (auto& token : tokens)
          token = static_cast<std::uint32_t>((round < 5 ? "etaoinsh"[random() % 8] : round < 10 ? "eeeet"[random() % 5] : 'e') - '!');
        const Tokens expected = merged_by_definition(definition.merges, tokens);
        tokens.resize(table.merge(tokens));
        EXPECT_EQ(tokens, expected) << length << " " << in_order;
      }
    }
  }
}

TEST(MergeTable, WorkIsLinearInTheLengthOfAWord) {
  const BpeDefinition definition = parse_tokenizer_json(read_file(kFixtures + "/small.json"), "small.json");
  const MergeTable table(definition.merges);
  std::mt19937 random(4);
  for (const std::string letters : {"e", "th", "etaoinshrdlu"})
    for (const std::size_t length : {10'000, 100'000, 1'000'000}) {
      Tokens tokens(length);
      for (auto& token : tokens) token = static_cast<std::uint32_t>(letters[random() % letters.size()] - '!');
      std::uint64_t looked_at = 0;
      table.merge(tokens, &looked_at);
      EXPECT_GE(looked_at, length - 1) << letters;
      EXPECT_LE(looked_at, 6 * length) << letters;  // each pair when it is made, at most 3 a byte, and when it comes up
    }
}

// operator new counts (above).
TEST(Tokenizer, EncodingAllocatesNothing) {
  const std::string alice = read_file(kFixtures + "/alice.txt");
  const std::string text =
      alice + " " + std::string(200, 'e') + "thethethe" + alice.substr(0, 1000) + std::string(5000, 't') + " \xff\xfe 漢字" + std::string(3000, ' ');
  Tokens out;
  out.reserve(text.size() + 10'000);
  small().encode(text, out);
  const std::size_t count = out.size();
  for (int round = 0; round < 3; ++round) {
    out.clear();
    const std::uint64_t before = allocations;
    small().encode(text, out);
    EXPECT_EQ(allocations - before, 0u);
    EXPECT_EQ(out.size(), count);
  }
}

TEST(Tokenizer, ThreadsAndTokenizersDoNotDisturbEachOther) {
  const auto other = load_tokenizer("bpe:" + kFixtures + "/small.json");
  const std::string text = read_file(kFixtures + "/alice.txt");
  BpeDefinition bytes_only;  // the same words, other tokens, in the same thread's cache
  for (const unsigned char byte : byte_order()) bytes_only.tokens.emplace_back(1, static_cast<char>(byte));
  bytes_only.tokens.emplace_back(kEndOfText);
  bytes_only.special = {256};
  bytes_only.end_of_text = 256;
  const auto plain = make_bpe_tokenizer(bytes_only, "bpe", "test");
  const Tokens expected = small().encode(text), expected_plain = plain->encode(text);
  EXPECT_EQ(expected_plain.size(), text.size());
  std::vector<std::thread> threads;
  std::vector<int> good(4);
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int round = 0; round < 20; ++round) {
        good[t] += small().encode(text) == expected && plain->encode(text) == expected_plain && other->encode(text) == expected;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(good, std::vector<int>(4, 20));
}

TEST(Tokenizer, EncodeAppendsAndSpecialTextIsText) {
  Tokens out = {7};
  small().encode("Alice", out);
  EXPECT_EQ(out[0], 7u);
  EXPECT_EQ(Tokens(out.begin() + 1, out.end()), small().encode("Alice"));
  const Tokens special = small().encode(kEndOfText);
  EXPECT_EQ(std::count(special.begin(), special.end(), small().end_of_text()), 0);
  EXPECT_EQ(small().decode(special), kEndOfText);
  EXPECT_EQ(small().decode(Tokens{small().end_of_text()}), "");
  EXPECT_THROW(small().decode(Tokens{600}), std::out_of_range);
}

TEST(Tokenizer, Bytes) {
  const auto bytes = load_tokenizer("bytes");
  EXPECT_EQ(bytes->vocabulary(), 257);
  EXPECT_EQ(bytes->end_of_text(), 256u);
  EXPECT_EQ(bytes->name(), "bytes");
  EXPECT_EQ(bytes->encode("a\xFFé"), (Tokens{97, 255, 195, 169}));
  EXPECT_EQ(bytes->decode(Tokens{104, 256, 105}), "hi");
  EXPECT_THROW(bytes->decode(Tokens{257}), std::out_of_range);
  const TemporaryFolder folder;
  bytes->save(folder / "tokenizer.json");
  const auto saved = load_tokenizer("bpe:" + folder / "tokenizer.json");
  EXPECT_EQ(saved->name(), "bytes");
  EXPECT_EQ(saved->hash(), bytes->hash());
  EXPECT_NE(saved->hash(), small().hash());
}

TEST(Sha256, KnownAnswers) {  // FIPS 180-4 examples
  EXPECT_EQ(sha256_hex(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha256_hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  const TemporaryFolder folder;
  put(folder / "million", std::string(1000000, 'a'));
  EXPECT_EQ(sha256_file(folder / "million"), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  EXPECT_THROW(sha256_file(folder / "none"), std::runtime_error);
  EXPECT_THROW(sha256_file(folder.path()), std::runtime_error);
}

}  // namespace
}  // namespace tessera
