// Files of tokens, what tells input files apart, and conditions on rows.

#include <gtest/gtest.h>
#include <zlib.h>

#include <filesystem>
#include <utility>

#include "data/dataset.h"
#include "data/document_reader.h"
#include "data/input_format.h"
#include "data/prepare.h"
#include "data/row_filter.h"
#include "data/token_files.h"
#include "data/tokenizer.h"
#include "tests/data/support.h"
#include "tests/data/support_tokens.h"

namespace tessera {
namespace {

using namespace test;
using Tokens = std::vector<std::uint32_t>;
using Documents = std::vector<Tokens>;
using Texts = std::vector<std::string>;
constexpr std::uint32_t kEnd = 256;  // of the tokenizer of bytes

ReaderOptions byte_tokens(InputFormat format = InputFormat::automatic) { return {.format = format, .vocabulary = 257, .end_of_text = kEnd}; }

Documents documents(const Texts& files, const ReaderOptions& options = byte_tokens()) {
  DocumentReader reader(files, options);
  Documents out;
  std::vector<Entry> entries;
  while (reader.next(entries, 256 << 10))
    for (const Entry& entry : entries) {
      EXPECT_FALSE(entry.tokens.empty());
      EXPECT_LE(entry.tokens.size(), kPieceTokens);
      if (entry.first) out.emplace_back();
      out.back().insert(out.back().end(), entry.tokens.begin(), entry.tokens.end());
    }
  EXPECT_TRUE(out.empty() || reader.consumed_bytes() > 0);
  return out;
}

void expect_error(const Texts& files, const std::string& what, const ReaderOptions& options = byte_tokens()) {
  const std::string message = message_of([&] { documents(files, options); });
  EXPECT_NE(message.find(files.back()), std::string::npos) << message;
  EXPECT_NE(message.find(what), std::string::npos) << "expected \"" << what << "\" in: " << message;
}

std::string gzip(const std::string& bytes) {
  z_stream stream{};
  deflateInit2(&stream, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY);
  std::string out(deflateBound(&stream, bytes.size()), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(bytes.data()));
  stream.avail_in = static_cast<uInt>(bytes.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  deflate(&stream, Z_FINISH);
  out.resize(stream.total_out);
  deflateEnd(&stream);
  return out;
}

TEST(TokenFiles, DocumentsEndAtEndOfText) {
  const TemporaryFolder folder;
  const Documents expected = {{1, 2, 3}, {4}, {5, 6}};
  put(folder / "a.bin", llmc_file<std::uint16_t>({kEnd, 1, 2, 3, kEnd, kEnd, 4, kEnd, 5, 6}));
  put(folder / "b.bin", llmc_file<std::uint32_t>({1, 2, 3, kEnd, 4, kEnd, 5, 6, kEnd}));
  put(folder / "c.bin", little_endian<std::uint16_t>({1, 2, 3, kEnd, 4, kEnd, 5, 6, kEnd}));
  put(folder / "d.bin.gz", gzip(llmc_file<std::uint16_t>({kEnd, 1, 2, 3, kEnd, 4, kEnd, 5, 6})));
  EXPECT_EQ(documents({folder / "a.bin"}), expected);
  EXPECT_EQ(documents({folder / "b.bin"}), expected);
  EXPECT_EQ(documents({folder / "c.bin"}, byte_tokens(InputFormat::nanogpt)), expected);
  EXPECT_EQ(documents({folder / "d.bin.gz"}), expected);
  put(folder / "none.bin", llmc_file<std::uint16_t>({}));
  put(folder / "ends.bin", llmc_file<std::uint16_t>({kEnd, kEnd}));
  EXPECT_EQ(documents({folder / "none.bin", folder / "ends.bin"}), Documents{});
  // A file is complete in itself.
  EXPECT_EQ(documents({folder / "b.bin", folder / "b.bin"}).size(), 6u);
  put(folder / "e.bin", llmc_file<std::uint16_t>({7}));
  EXPECT_EQ(documents({folder / "e.bin", folder / "e.bin"}), (Documents{{7}, {7}}));
}

TEST(TokenFiles, LongDocumentsComeInPieces) {
  const TemporaryFolder folder;
  for (const std::size_t length : {kPieceTokens - 1, kPieceTokens, kPieceTokens + 1, 4 * kPieceTokens, 4 * kPieceTokens + 1, std::size_t{300'000}}) {
    Tokens first(length), second{9, 9};
    for (std::size_t i = 0; i < length; ++i) first[i] = static_cast<std::uint32_t>(i * i % 256);
    Tokens all = first;
    all.push_back(kEnd);
    all.insert(all.end(), second.begin(), second.end());
    put(folder / "a.bin", llmc_file<std::uint32_t>(all));
    EXPECT_EQ(documents({folder / "a.bin"}), (Documents{first, second})) << length;
  }
}

TEST(TokenFiles, Megatron) {
  const TemporaryFolder folder;
  const auto pair = [&](int type, const std::string& tokens, std::size_t size, const std::vector<std::int32_t>& lengths,
                        const std::vector<std::int64_t>& starts) {
    put(folder / "m.bin", tokens);
    put(folder / "m.idx", megatron_index(type, size, lengths, starts));
    return documents({folder / "m.idx"});
  };
  const Documents expected = {{1, 2, 3}, {4}, {5, 6}};
  const std::vector<int> six = {1, 2, 3, 4, 5, 6};
  const auto as = [&]<typename T>(T) { return little_endian(std::vector<T>(six.begin(), six.end())); };
  // Three documents, of the sequences {1 2} {3}, {4} and {5 6}; an empty document and an empty sequence among them.
  const std::vector<std::int32_t> lengths = {2, 1, 1, 0, 2};
  const std::vector<std::int64_t> starts = {0, 2, 3, 3, 5};
  EXPECT_EQ(pair(1, as(std::uint8_t{}), 1, lengths, starts), expected);
  EXPECT_EQ(pair(3, as(std::int16_t{}), 2, lengths, starts), expected);
  EXPECT_EQ(pair(4, as(std::int32_t{}), 4, lengths, starts), expected);
  EXPECT_EQ(pair(5, as(std::int64_t{}), 8, lengths, starts), expected);
  EXPECT_EQ(pair(8, as(std::uint16_t{}), 2, lengths, starts), expected);
  // With an end of text behind each document (--append-eod).
  EXPECT_EQ(pair(8, little_endian<std::uint16_t>({1, 2, 3, kEnd, 4, kEnd, 5, 6, kEnd}), 2, {4, 2, 3}, {0, 1, 2, 3}), expected);
  EXPECT_EQ(pair(8, "", 2, {}, {0}), Documents{});
  EXPECT_EQ(documents({folder / "m.bin"}), Documents{});  // either name
}

TEST(TokenFiles, WhatIsWrongIsSaid) {
  const TemporaryFolder folder;
  const std::string a = folder / "a.bin", good = llmc_file<std::uint16_t>({kEnd, 1, 2, 3});
  const auto with = [](std::string bytes, std::size_t at, std::int32_t number) {
    return bytes.replace(at, 4, little_endian<std::int32_t>({number}));
  };
  const auto expect = [&](const std::string& bytes, const std::string& what, const ReaderOptions& options = byte_tokens()) {
    put(a, bytes);
    expect_error({a}, what, options);
  };
  expect(good.substr(0, good.size() - 1), "cut short: 1031 bytes, where llm.c's header promises 4 tokens, 1032 bytes in all");
  expect(good + "x", "too long: 1033 bytes");
  expect(good.substr(0, 500), "cut short: 500 bytes, expected llm.c's header of 1024 bytes");
  expect(good.substr(0, 3), "what kind of .bin this is cannot be told");
  expect(with(good, 0, 20240521), "(llm.c; found 20240521)");
  expect(with(good, 0, 20240521), "pass --format nanogpt");
  expect(with(good, 0, 20240522), "questions for evaluation", byte_tokens(InputFormat::llmc));
  expect(with(good, 0, 1), "expected 20240520 or 20240801 at its start, found 1", byte_tokens(InputFormat::llmc));
  expect(with(good, 4, 2), "version 2 in llm.c's header, expected 1");
  expect(with(good, 8, -1), "-1 tokens in llm.c's header");
  expect(with(good, 8, INT32_MAX), "cut short: 1032 bytes, where llm.c's header promises 2147483647 tokens");
  expect(with(good, 1024, 257 << 16), "token 257 at offset 1026 lies outside the tokenizer's vocabulary of 257 tokens");
  expect(with(good, 0, kLlmcMagic32), "version 1 in llm.c's header, expected 7");
  expect(good, "has llm.c's header", byte_tokens(InputFormat::nanogpt));
  expect("abc", "3 bytes, expected an even number", byte_tokens(InputFormat::nanogpt));
  expect(good, "a file of tokens (llmc), expected text", {});
  put(folder / "z.bin.gz", gzip(good.substr(0, good.size() - 1)));
  expect_error({folder / "z.bin.gz"}, "cut short: 1031 bytes, where");
  put(folder / "z.bin.gz", gzip(good + "x"));
  expect_error({folder / "z.bin.gz"}, "too long: llm.c's header promises 4 tokens");
  expect_error({folder / "missing.bin"}, "cannot be opened", byte_tokens(InputFormat::nanogpt));
  // The second file is looked at before the first is read.
  put(folder / "good.bin", good);
  put(a, good + "x");
  EXPECT_THROW(DocumentReader({folder / "good.bin", a}, byte_tokens()), std::runtime_error);
}

TEST(TokenFiles, WhatIsWrongWithAMegatronPairIsSaid) {
  const TemporaryFolder folder;
  const std::string bin = folder / "m.bin", idx = folder / "m.idx";
  const std::string tokens = little_endian<std::uint16_t>({1, 2, 3, 4, 5, 6}), good = megatron_index(8, 2, {3, 1, 2}, {0, 1, 2, 3});
  const auto expect = [&](const std::string& index, const std::string& what, const std::string& file) {
    put(idx, index);
    const std::string message = message_of([&] { documents({bin}); });
    EXPECT_NE(message.find(what), std::string::npos) << "expected \"" << what << "\" in: " << message;
    EXPECT_EQ(message.find(file), 0u) << message;
  };
  const auto with = [](std::string bytes, std::size_t at, const std::string& other) { return bytes.replace(at, other.size(), other); };
  const auto i64 = [](std::int64_t number) { return little_endian<std::int64_t>({number}); };
  put(bin, tokens);
  put(idx, good);
  EXPECT_EQ(documents({bin}), (Documents{{1, 2, 3}, {4}, {5, 6}}));
  expect(with(good, 0, "X"), "not an index of Megatron's", idx);
  expect(with(good, 9, i64(2)), "version 2, expected 1", idx);
  expect(with(good, 17, std::string(1, 7)), "type 7 of a token", idx);
  expect(with(good, 18, i64(4)), "where its header promises 4 sequences and 4 indices, 114 bytes in all", idx);
  expect(with(good, 18, i64(-1)), "where its header promises 18446744073709551615 sequences", idx);
  expect(with(good, 26, i64(0)), "where its header promises 3 sequences and 0 indices", idx);
  expect(good.substr(0, 20), "cut short: 20 bytes", idx);
  expect("", "cut short: 0 bytes", idx);
  expect(good.substr(0, good.size() - 1), "bytes, where its header promises", idx);
  expect(good + std::string(3, '\0'), "multimodal", idx);
  expect(with(good, 34, little_endian<std::int32_t>({-3})), "sequence 0: a length of -3 tokens", idx);
  expect(with(good, 34, little_endian<std::int32_t>({2})), "sequence 1: begins at offset 6, expected 4", idx);
  expect(with(good, 46, i64(2)), "sequence 0: begins at offset 2, expected 0", idx);
  expect(with(good, 62, i64(-1)), "begin at offset -1", bin);
  expect(with(good, 70, i64(1)), "the documents' indices run from 1 to 3, expected 0 to the number of sequences, 3", idx);
  expect(with(good, 78, i64(3)), "document 2: begins at sequence 2, before the document in front of it", idx);
  put(bin, tokens.substr(0, 11));
  expect(good, "11 bytes, where", bin);
  put(bin, tokens + "xy");
  expect(good, "14 bytes, where", bin);
  std::filesystem::remove(bin);
  put(idx, good);
  expect_error({idx}, "is missing or no file");
}

TEST(TokenFiles, GiveTheDatasetThatTheirTextGives) {
  const TemporaryFolder folder;
  const auto tokenizer = load_tokenizer("bytes");
  std::string lines;
  std::vector<std::uint16_t> tokens;
  std::vector<std::int32_t> lengths;
  std::vector<std::int64_t> starts = {0};
  std::vector<std::uint8_t> bytes;
  for (int i = 0; i < 300; ++i) {
    std::string text = "document " + std::to_string(i) + ":";
    for (int k = 0; k < i % 40; ++k) text += " word" + std::to_string(i * k % 17);
    lines += "{\"text\": \"" + text + "\"}\n";
    tokens.push_back(kEnd);
    for (const char c : text) tokens.push_back(static_cast<unsigned char>(c)), bytes.push_back(static_cast<std::uint8_t>(c));
    lengths.push_back(static_cast<std::int32_t>(text.size()));
    starts.push_back(i + 1);
  }
  put(folder / "t.jsonl", lines);
  put(folder / "l.bin", llmc_file(tokens));
  put(folder / "n.bin", little_endian(tokens));
  put(folder / "m.bin", little_endian(bytes));
  put(folder / "m.idx", megatron_index(1, 1, lengths, starts));
  const auto prepared = [&](const std::string& input, InputFormat format) {
    PrepareOptions options;
    options.inputs = {folder / input};
    options.output = folder / (input + "-data");
    options.reader.format = format;
    options.validation_fraction = 0.1;
    options.shard_tokens = 5000;
    return prepare_dataset(*tokenizer, options).dataset;
  };
  const auto all = [](const DatasetInfo& info, const SplitInfo& split) {
    TokenReader reader(info, split);
    std::vector<std::int32_t> out(reader.size());
    reader.read(0, out);
    return out;
  };
  const DatasetInfo text = prepared("t.jsonl", InputFormat::automatic);
  EXPECT_GT(text.validation.documents, 5u);
  for (const auto& [input, format] :
       {std::pair{"l.bin", InputFormat::automatic}, {"n.bin", InputFormat::nanogpt}, {"m.bin", InputFormat::automatic}}) {
    const DatasetInfo other = prepared(input, format);
    EXPECT_EQ(other.train.text_bytes, text.train.text_bytes) << input;
    EXPECT_EQ(other.train.documents, text.train.documents) << input;
    EXPECT_EQ(all(other, other.train), all(text, text.train)) << input;
    EXPECT_EQ(all(other, other.validation), all(text, text.validation)) << input;
    EXPECT_EQ(verify_dataset(other.directory), Texts{}) << input;
  }
}

TEST(TokenFiles, DamagedOnesAreAnErrorBeforeTheWorkOrLeftOut) {
  const TemporaryFolder folder;
  const auto tokenizer = load_tokenizer("bytes");
  const std::string good = llmc_file<std::uint16_t>({kEnd, 1, 2, kEnd, 3}), foreign = llmc_file<std::uint16_t>({kEnd, 4, kEnd, 50256, kEnd, 5});
  put(folder / "a.bin", good);
  put(folder / "b.bin", good.substr(0, good.size() - 3));
  PrepareOptions options;
  options.inputs = {folder.path() + "/*.bin"};
  options.output = folder / "data";
  options.validation_fraction = 0;
  const std::string message = message_of([&] { prepare_dataset(*tokenizer, options); });
  EXPECT_EQ(message.find(folder / "b.bin: cut short"), 0u) << message;
  options.skip_errors = true;
  options.overwrite = true;
  PrepareSummary summary = prepare_dataset(*tokenizer, options);
  EXPECT_EQ(summary.dataset.train.documents, 2u);
  EXPECT_EQ(summary.dataset.preparation.bad_files, 1u);
  put(folder / "b.bin", foreign);  // found while reading: what stands before it is in the same buffer
  summary = prepare_dataset(*tokenizer, options);
  EXPECT_EQ(summary.dataset.train.documents, 2u);
  EXPECT_EQ(summary.dataset.preparation.bad_files, 1u);
}

TEST(InputFormat, ContentThenExtensionDecide) {
  const TemporaryFolder folder;
  const auto of = [&](const std::string& name, const std::string& bytes) {
    put(folder / name, bytes);
    return format_of(folder / name, InputFormat::automatic);
  };
  const std::string llmc = llmc_file<std::uint16_t>({1});
  EXPECT_EQ(of("a.txt", "PAR"), InputFormat::text);
  EXPECT_EQ(of("a.jsonl.gz", ""), InputFormat::jsonl);
  EXPECT_EQ(of("a.dat", "PAR1...PAR1"), InputFormat::parquet);
  EXPECT_EQ(of("b.parquet", "no"), InputFormat::parquet);
  EXPECT_EQ(of("a.tokens", llmc), InputFormat::llmc);
  EXPECT_EQ(of("a.idx", ""), InputFormat::megatron);
  EXPECT_EQ(of("a.bin", "abcdef"), InputFormat::megatron);  // a.idx is beside it
  EXPECT_EQ(of("a.bin", llmc), InputFormat::llmc);
  put(folder / "a.idx", megatron_index(8, 2, {}, {0}));
  EXPECT_EQ(format_of(folder / "a.bin", InputFormat::automatic), InputFormat::megatron);  // its tokens may look like llm.c's header
  EXPECT_EQ(format_of("-", InputFormat::automatic), InputFormat::text);
  EXPECT_EQ(format_of(folder / "b.parquet", InputFormat::jsonl), InputFormat::jsonl);  // as told
  for (const char* name : {"auto", "txt", "jsonl", "parquet", "llmc", "nanogpt", "megatron"}) EXPECT_EQ(to_string(input_format(name)), name);
}

TEST(InputFormat, FoldersAndPatternsTakePairsOnce) {
  const TemporaryFolder folder;
  for (const char* name : {"m.bin", "m.idx", "t.txt", "p.parquet", "other.h5"}) put(folder / name, "x");
  const std::string m = folder / "m.bin", t = folder / "t.txt", p = folder / "p.parquet";
  EXPECT_EQ(expand_inputs({folder.path()}), (Texts{m, p, t}));
  EXPECT_EQ(expand_inputs({folder.path()}, InputFormat::nanogpt), Texts{m});
  EXPECT_EQ(expand_inputs({folder.path()}, InputFormat::parquet), Texts{p});
  EXPECT_EQ(expand_inputs({folder.path()}, InputFormat::text), Texts{t});
  EXPECT_EQ(expand_inputs({folder / "m.*"}), Texts{m});
  EXPECT_EQ(expand_inputs({folder / "m.idx"}), Texts{m});
  EXPECT_EQ(expand_inputs({folder / "*.idx", folder / "m.bin"}), (Texts{m, m}));  // said twice: prepare notes it
  std::filesystem::remove(m);
  EXPECT_EQ(expand_inputs({folder / "m.idx"}), Texts{folder / "m.idx"});
}

TEST(InputFormat, WhereIsForParquet) {
  const TemporaryFolder folder;
  put(folder / "a.jsonl", "{\"text\": \"x\"}\n");
  ReaderOptions options;
  options.where = {"score>=3"};
  expect_error({folder / "a.jsonl"}, "--where filters the rows of Parquet files, and this is jsonl", options);
}

TEST(RowFilter, Grammar) {
  const auto numbers = [](const std::string& condition, long double value) { return parse_row_filter(condition).holds(value); };
  const auto texts = [](const std::string& condition, std::string_view value) { return parse_row_filter(condition).holds(value); };
  EXPECT_EQ(parse_row_filter(" score >= 3 ").column, "score");
  EXPECT_TRUE(numbers("score>=3", 3) && !numbers("score>=3", 2.999L) && numbers("s>3", 3.5L) && !numbers("s>3", 3));
  EXPECT_TRUE(numbers("s<=-1.5e1", -15) && !numbers("s<-15", -15) && numbers("s=2", 2) && numbers("s!=2", 3) && !numbers("s==2", 3));
  EXPECT_TRUE(numbers("s==9223372036854775807", 9223372036854775807.0L) && !numbers("s==9223372036854775807", 9223372036854775806.0L));
  EXPECT_TRUE(texts("l==en", "en") && !texts("l==en", "fr") && texts("l != 'a b'", "ab") && texts("l==\"a>b\"", "a>b") && texts("l=''", ""));
  EXPECT_TRUE(texts("dump==2013", "2013"));
  for (const char* bad :
       {"", "score", "score>", ">=3", "score!3", "score>=high", "score>='3'", "l=='en", "a>1<2", "a>1&&b<2", "s>0x10", "s>nan", "s>=1e9999"}) {
    const std::string message = message_of([&] { parse_row_filter(bad); });
    EXPECT_NE(message.find("expected NAME OP VALUE"), std::string::npos) << bad << ": " << message;
  }
}

}  // namespace
}  // namespace tessera
