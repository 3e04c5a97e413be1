#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <random>
#include <regex>

#include "data/byte_source.h"
#include "data/document_reader.h"
#include "data/tokenizer.h"
#include "tests/data/support.h"

namespace tessera {
namespace {

using test::message_of;
using test::put;
using test::TemporaryFolder;

std::string gzip(const std::string& text) {
  z_stream stream{};
  deflateInit2(&stream, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY);
  std::string out(deflateBound(&stream, text.size()) + 64, '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  stream.avail_in = static_cast<uInt>(text.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  deflate(&stream, Z_FINISH);
  out.resize(stream.total_out);
  deflateEnd(&stream);
  return out;
}

std::string zstd(const std::string& text) {
  std::string out(ZSTD_compressBound(text.size()), '\0');
  out.resize(ZSTD_compress(out.data(), out.size(), text.data(), text.size(), 3));
  return out;
}

/// Documents of the files, each put together from its pieces.
std::vector<std::string> documents(const std::vector<std::string>& files, const ReaderOptions& options = {}, std::size_t batch = 10'000) {
  DocumentReader reader(files, options);
  std::vector<std::string> out;
  std::vector<Entry> entries;
  while (reader.next(entries, batch))
    for (const Entry& entry : entries)
      reader.pieces(entry, [&](std::string_view piece, bool first) {
        EXPECT_LE(piece.size(), kLongestWord);
        EXPECT_FALSE(piece.empty());
        if (first) out.emplace_back();
        out.back() += piece;
      });
  EXPECT_EQ(reader.consumed_bytes(), reader.total_bytes());
  return out;
}

using Texts = std::vector<std::string>;

std::string words(std::size_t bytes, unsigned seed) {
  std::mt19937 random(seed);
  std::string out;
  while (out.size() < bytes) {
    out.append(1 + random() % 9, static_cast<char>('a' + random() % 26));
    out += random() % 12 ? " " : random() % 3 ? "\n" : "\n\n";
  }
  out.resize(bytes);
  return out;
}

TEST(DocumentReader, StandardInputIsTextOrLinesOfJson) {
  const TemporaryFolder folder;
  const auto read = [&](const std::string& bytes, InputFormat format = InputFormat::automatic) {
    put(folder / "stdin", bytes);
    const int file = ::open((folder / "stdin").c_str(), O_RDONLY), kept = ::dup(0);
    ::dup2(file, 0);
    ReaderOptions options;
    options.format = format;
    DocumentReader reader({"-"}, options);
    std::vector<std::string> out;
    std::vector<Entry> entries;
    while (reader.next(entries, 10'000))
      for (const Entry& entry : entries) reader.pieces(entry, [&](std::string_view piece, bool) { out.emplace_back(piece); });
    ::dup2(kept, 0);
    ::close(kept);
    ::close(file);
    return out;
  };
  const std::string lines = "{\"text\": \"one\"}\n{\"text\": \"two\"}\n";
  const Texts documents = {"one", "two"};
  for (const std::string& bytes : {lines, "\n" + lines, " { " + lines.substr(1), gzip(lines), zstd(lines)}) EXPECT_EQ(read(bytes), documents);
  EXPECT_EQ(read(lines, InputFormat::text), Texts{lines});
  for (const std::string text : {"plain", "{braces}", "{", "\"quoted\"", " \n{ a"}) EXPECT_EQ(read(text), Texts{text});
  EXPECT_EQ(read(""), Texts{});
}

TEST(DocumentReader, TextFilesAndMarkers) {
  const TemporaryFolder folder;
  const std::string file = folder / "a.txt";
  const auto read = [&](const std::string& text) {
    put(file, text);
    return documents({file});
  };
  EXPECT_EQ(read("one document\n\nwith paragraphs"), Texts{"one document\n\nwith paragraphs"});
  EXPECT_EQ(read("one\n<|endoftext|>\ntwo\n<|endoftext|>\n"), (Texts{"one\n", "two\n"}));
  EXPECT_EQ(read("<|endoftext|>\none\r\n<|endoftext|>\r\ntwo<|endoftext|>"), (Texts{"one\r\n", "two<|endoftext|>"}));  // only whole lines count
  EXPECT_EQ(read("a <|endoftext|>\nb\n<|endoftext|> c"), Texts{"a <|endoftext|>\nb\n<|endoftext|> c"});
  EXPECT_EQ(read("one\n<|endoftext|>"), Texts{"one\n"});
  EXPECT_EQ(read("<|endoftext|>\n<|endoftext|>\n<|endoftext|>"), Texts{});
  EXPECT_EQ(read(""), Texts{});
  EXPECT_EQ(read(std::string("\xff\xfe\0 not UTF-8 \x80", 15)), (Texts{std::string("\xff\xfe\0 not UTF-8 \x80", 15)}));
}

TEST(DocumentReader, MarkersAtEveryPlaceOfTheBuffer) {
  const TemporaryFolder folder;
  const std::string file = folder / "a.txt";
  for (std::size_t length = (256 << 10) - 20; length < (256 << 10) + 4; ++length) {
    const Texts expected = {words(length, 1) + "x\n", "two"};
    put(file, expected[0] + "<|endoftext|>\n" + expected[1]);
    ASSERT_EQ(documents({file}), expected) << length;
  }
}

TEST(DocumentReader, LongDocumentsComeInThePiecesThatPieceLengthSays) {
  const TemporaryFolder folder;
  const std::string text = words(1'000'000, 2);
  put(folder / "a.txt", text + "\n<|endoftext|>\n" + text);
  put(folder / "b.jsonl", "{\"text\": \"" + std::regex_replace(text, std::regex("\n"), "\\n") + "\"}\n");
  std::vector<std::string> expected;
  for (std::string_view left = text; !left.empty();) {
    const std::size_t length = piece_length(left);
    expected.emplace_back(left.substr(0, length));
    left.remove_prefix(length);
  }
  const auto pieces = [](const std::string& file) {
    DocumentReader reader({file}, {});
    std::vector<std::string> out;
    std::vector<Entry> entries;
    while (reader.next(entries, 1))
      for (const Entry& entry : entries) reader.pieces(entry, [&](std::string_view piece, bool) { out.emplace_back(piece); });
    return out;
  };
  EXPECT_EQ(pieces(folder / "b.jsonl"), expected);
  auto from_text = pieces(folder / "a.txt");
  ASSERT_EQ(from_text.size(), 2 * expected.size());
  EXPECT_EQ(std::vector(from_text.begin() + static_cast<std::ptrdiff_t>(expected.size()), from_text.end()), expected);
  EXPECT_EQ(documents({folder / "a.txt"}), (Texts{text + "\n", text}));
}

TEST(PieceLength, CutsWhereTheNextWordBeginsAnyway) {
  EXPECT_EQ(piece_length(std::string(kPieceBytes, ' ')), kPieceBytes);
  std::string text(2 * kPieceBytes, 'x');
  EXPECT_EQ(piece_length(text), text.size());  // a single word
  EXPECT_EQ(piece_length(text, false), 0u);    // which may go on
  text.replace(30'000, 1, "!");
  EXPECT_EQ(piece_length(text), 30'001u);  // where the pattern ends a word
  text[30'000] = 'x';
  text.replace(40'000, 4, " \n y");
  EXPECT_EQ(piece_length(text), 40'002u);  // before the last space of the run
  text.replace(50'000, 1, "\t");
  EXPECT_EQ(piece_length(text), 50'000u);  // the last one
  text.replace(45'000, 1, "\n");
  EXPECT_EQ(piece_length(text), 45'000u);  // a line before a word
  text.replace(42'000, 3, ".\n\n");
  EXPECT_EQ(piece_length(text), 42'002u);  // a paragraph before a line
  text = std::string(kPieceBytes - 1, 'x') + "\xc3\xa4" + std::string(100, 'x');
  EXPECT_EQ(piece_length(text), text.size());
  text = std::string(40'000, 'x') + "\n\xc2\xa0" + std::string(40'000, 'x');
  EXPECT_EQ(piece_length(text), 40'000u);  // not within the run, which a no-break space goes on with
  text = std::string(40'000, 'x') + "  \xc3(" + std::string(40'000, 'x');
  EXPECT_EQ(piece_length(text), 40'004u);  // not within the run, which a byte that is no UTF-8 ends
  EXPECT_GT(piece_length(std::string(2 * kPieceBytes, '\x80')), kPieceBytes - 10);
  // Too long even for one word.
  EXPECT_EQ(piece_length(std::string(kLongestWord, 'x')), kLongestWord);
  EXPECT_EQ(piece_length(std::string(kLongestWord + 1, 'x'), false), kLongestWord);
  EXPECT_EQ(piece_length(std::string(kLongestWord - 1, 'x') + "\xc3\xa4 and more"), kLongestWord - 1);  // not within a character
}

// What tiktoken gives for such texts, and so for their pieces, tests/bench/tokens_exact.py compares.
TEST(DocumentReader, PiecesHaveTheTokensOfTheWholeDocument) {
  const TemporaryFolder folder;
  const auto tokenizer = load_tokenizer("bpe:" TESSERA_FIXTURES "/tokenizer/small.json");
  std::mt19937 random(5);
  const auto mixture = [&](const Texts& characters, std::size_t bytes) {
    std::string out;
    while (out.size() < bytes) out += characters[random() % characters.size()];
    return out;
  };
  const Texts latin = {"e", "t", "a", "o", "i", "n", "s", "h"}, kana = {"あ", "か", "が", "ん", "の", "。", "、", "\u3000"};
  const Texts any = {"a", "b", " ", "\n", "\r\n", "'s", "1", "!", "\u00a0", "\u2003", "é", "漢", "😀", "\u0301", "\t"};
  const Texts bytes = {"a", " ", "  \xc3", "\xff", "\x80", "漢", "\n", "\xe3\x81"};
  std::vector<std::string> documents = {mixture(kana, 300'000), mixture(any, 300'000), mixture(latin, 1'000'000),
                                        "x" + std::string(1'000'000, ' ') + "x", std::string(70'000, 'x') + " " + mixture(latin, 200'000)};
  for (const std::size_t before : {65'520, 65'530, 65'535, 65'536, 131'072})
    for (const Texts& pool : {any, kana}) documents.push_back(mixture(latin, before - before % 3) + mixture(pool, 40) + mixture(latin, 70'000));
  const std::size_t valid = documents.size();
  documents.push_back(mixture(bytes, 300'000));
  documents.push_back(mixture({"\xc3", "x"}, 100'000));
  std::string lines, text;
  for (std::size_t i = 0; i < documents.size(); ++i) {
    text += documents[i] + "\n<|endoftext|>\n";
    if (i < valid) lines += nlohmann::json{{"text", documents[i] + "\n"}}.dump() + "\n";
  }
  put(folder / "a.txt", text);
  put(folder / "a.jsonl", lines);
  for (const char* file : {"a.txt", "a.jsonl"}) {
    DocumentReader reader({folder / file}, {});
    std::vector<std::vector<std::uint32_t>> tokens;
    std::vector<Entry> entries;
    while (reader.next(entries, 100'000))
      for (const Entry& entry : entries)
        reader.pieces(entry, [&](std::string_view piece, bool first) {
          if (first) tokens.emplace_back();
          tokenizer->encode(piece, tokens.back());
        });
    ASSERT_EQ(tokens.size(), file[2] == 't' ? documents.size() : valid);
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      EXPECT_TRUE(tokens[i] == tokenizer->encode(documents[i] + "\n")) << file << ": document " << i;
      EXPECT_TRUE(tokenizer->decode(tokens[i]) == documents[i] + "\n") << file << ": document " << i;
    }
  }
}

TEST(DocumentReader, JsonLines) {
  const TemporaryFolder folder;
  const std::string file = folder / "a.jsonl";
  put(file,
      "{\"id\": 1, \"text\": \"gr\\u00fc\\u00dfe\\n\", \"meta\": {\"text\": \"inner\"}}\n\n  \r\n{\"text\":\"\"}\r\n{\"meta\": [{\"text\": \"x\"}], "
      "\"text\": \"last\"}");
  EXPECT_EQ(documents({file}), (Texts{"grüße\n", "last"}));
  put(file, "{\"body\": \"b\", \"text\": \"t\"}");
  EXPECT_EQ(documents({file}, {.text_key = "body"}), Texts{"b"});
}

TEST(DocumentReader, BadLinesAreNamedOrSkipped) {
  const TemporaryFolder folder;
  const std::string file = folder / "a.jsonl";
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"{\"text\": \"cut", ":2:"},
      {"{\"text\": 5}", "\"text\" is a number, expected text"},
      {"{\"text\": {\"text\": \"x\"}}", "\"text\" is an object, expected text"},
      {"{\"text\": null}", "\"text\" is null, expected text"},
      {"{\"body\": \"x\", \"id\": 1}", "no key \"text\" in this object; it has \"body\", \"id\""},
      {"{}", "it has none"},
      {"[\"text\"]", "expected a JSON object"},
      {"\"text\"", "expected a JSON object"},
      {"{\"text\": \"bad \xff utf-8\"}", "broken JSON"},
      {"{\"text\": \"a\"} {\"text\": \"b\"}", "broken JSON"},
      {"{\"text\": \"" + std::string(2'000'000, 'x'), "broken JSON"},  // a long one, which the reader parses itself
  };
  for (const auto& [line, expected] : cases) {
    put(file, "{\"text\": \"first\"}\n" + line + "\n{\"text\": \"third\"}\n");
    const std::string message = message_of([&] { documents({file}); });
    EXPECT_NE(message.find(file + ":2:"), std::string::npos) << message;
    EXPECT_NE(message.find(expected), std::string::npos) << message;
    EXPECT_LT(message.size(), 500u);
    EXPECT_EQ(documents({file}, {.skip_bad = true}), (Texts{"first", "third"})) << line.substr(0, 100);
  }
}

TEST(DocumentReader, CompressedFilesByContent) {
  const TemporaryFolder folder;
  const std::string text = words(700'000, 3);
  const std::string first = text.substr(0, 300'000), second = text.substr(300'000);
  put(folder / "a.txt.gz", gzip(text));
  put(folder / "two.txt.gz", gzip(first) + gzip(second));
  put(folder / "b.txt.zst", zstd(text));
  put(folder / "two.txt.zst", zstd(first) + zstd("") + zstd(second));
  put(folder / "skip.txt.zst", std::string("\x50\x2a\x4d\x18\x03\0\0\0abc", 11) + zstd(text));
  put(folder / "wrong_name.txt", zstd(text));
  for (const char* name : {"a.txt.gz", "two.txt.gz", "b.txt.zst", "two.txt.zst", "skip.txt.zst", "wrong_name.txt"})
    EXPECT_EQ(documents({folder / name}), Texts{text}) << name;
  put(folder / "empty.txt.gz", gzip(""));
  put(folder / "empty.txt.zst", zstd(""));
  EXPECT_EQ(documents({folder / "empty.txt.gz", folder / "empty.txt.zst"}), Texts{});
}

TEST(DocumentReader, DamagedCompressedFilesAreNamed) {
  const TemporaryFolder folder;
  const std::string text = words(700'000, 4);
  const auto fails = [&](const std::string& name, std::string bytes) {
    put(folder / name, bytes);
    const std::string message = message_of([&] { documents({folder / name}); });
    EXPECT_NE(message.find(name), std::string::npos) << message;
    EXPECT_NE(message.find("offset"), std::string::npos) << message;
  };
  const std::string gz = gzip(text), zst = zstd(text);
  for (const double share : {0.01, 0.3, 0.9}) {
    fails("cut.txt.gz", gz.substr(0, static_cast<std::size_t>(share * static_cast<double>(gz.size()))));
    fails("cut.txt.zst", zst.substr(0, static_cast<std::size_t>(share * static_cast<double>(zst.size()))));
  }
  std::string flipped = gz;
  flipped[gz.size() - 6] ^= 1;  // the checksum
  fails("flip.txt.gz", flipped);
  fails("tail.txt.gz", gz + "junk");
  fails("tail.txt.zst", zst + "junk");
}

// 100 MB in one line of JSON, from a file of some kilobytes.
TEST(DocumentReader, A100MegabyteLineWorks) {
  const TemporaryFolder folder;
  const std::string unit = "many words again and again ";
  std::string line = "{\"text\": \"";
  line.reserve(105'000'000);
  while (line.size() < 100'000'000) line += unit;
  put(folder / "a.jsonl.zst", zstd(line + "\"}\n{\"text\": \"after\"}\n"));
  line.clear();
  line.shrink_to_fit();

  DocumentReader reader({folder / "a.jsonl.zst"}, {});
  std::vector<Entry> entries;
  std::size_t bytes = 0, documents = 0, at = 0;
  while (reader.next(entries, 256 << 10)) {
    std::size_t batch = 0;
    for (const Entry& entry : entries)
      reader.pieces(entry, [&](std::string_view piece, bool first) {
        batch += piece.size();
        documents += first;
        if (documents == 1) {
          for (std::size_t i = 0; i < piece.size(); i += 97) ASSERT_EQ(piece[i], unit[(at + i) % unit.size()]);
          at += piece.size();
        }
      });
    EXPECT_LT(batch, std::size_t{400'000});
    bytes += batch;
  }
  EXPECT_EQ(documents, 2u);
  EXPECT_GE(bytes, 99'999'000u);
}

TEST(DocumentReader, LinesBeyondTheLimitAreReportedOrSkipped) {
  const TemporaryFolder folder;
  const std::string file = folder / "a.jsonl.zst";
  put(file, zstd("{\"text\": \"first\"}\n") + zstd("{\"text\": \"" + std::string(kLongestLine + 1'000'000, 'x') + "\"}\n") +
                zstd("{\"text\": \"third\"}\n"));
  const std::string message = message_of([&] { documents({file}); });
  EXPECT_NE(message.find(file + ":2: the line is longer than 134217728 bytes"), std::string::npos) << message;
  EXPECT_EQ(documents({file}, {.skip_bad = true}), (Texts{"first", "third"}));
}

TEST(ExpandInputs, FilesFoldersAndPatterns) {
  const TemporaryFolder folder;
  std::filesystem::create_directories(folder / "d/sub");
  for (const char* name : {"d/b.txt", "d/a.jsonl.gz", "d/sub/c.md", "d/ignored.dat", "plain"}) put(folder / name, "x");
  EXPECT_EQ(expand_inputs({folder / "plain", folder / "d"}),
            (Texts{folder / "plain", folder / "d/a.jsonl.gz", folder / "d/b.txt", folder / "d/sub/c.md"}));
  EXPECT_EQ(expand_inputs({folder / "d/*.[tj]*", "-"}), (Texts{folder / "d/a.jsonl.gz", folder / "d/b.txt", "-"}));
  EXPECT_EQ(expand_inputs({folder / "d/[bs]*"}), (Texts{folder / "d/b.txt", folder / "d/sub/c.md"}));  // a folder among a pattern's matches
  std::filesystem::create_symlink("loop", folder / "loop");
  EXPECT_NE(message_of([&] { expand_inputs({folder / "loop"}); }).find("loop: cannot be opened: "), std::string::npos);
  EXPECT_THROW(expand_inputs({folder / "missing.txt"}), std::invalid_argument);
  EXPECT_THROW(expand_inputs({folder / "*.none"}), std::invalid_argument);
  std::filesystem::create_directories(folder / "empty");
  EXPECT_THROW(expand_inputs({folder / "empty"}), std::invalid_argument);
  EXPECT_THROW(DocumentReader({folder / "d/ignored.dat"}, {}), std::invalid_argument);  // what is it?
  EXPECT_NO_THROW(DocumentReader({folder / "d/ignored.dat"}, {.format = InputFormat::text}));
  EXPECT_THROW(open_source(folder / "missing.txt"), std::invalid_argument);
  EXPECT_THROW(open_source(folder / "d"), std::invalid_argument);
  EXPECT_EQ(input_format("jsonl"), InputFormat::jsonl);
  EXPECT_THROW(input_format("json"), std::invalid_argument);
}

}  // namespace
}  // namespace tessera
