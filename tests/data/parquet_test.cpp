// Parquet files that pyarrow wrote: tests/fixtures/parquet/make.py says what is in them.

#include "data/parquet_source.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "data/document_reader.h"
#include "data/files.h"
#include "tests/data/support.h"

namespace tessera {
namespace {

using namespace test;
using Texts = std::vector<std::string>;

const std::string kFolder = TESSERA_FIXTURES "/parquet/";

#define NEEDS_PARQUET()                                                                                  \
  if (!has_parquet_support())                                                                            \
  GTEST_SKIP() << "NOT TESTED: this build has no Parquet library. pip install pyarrow, then cmake with " \
                  "-DTESSERA_ARROW_ROOT=$(python3 -c \"import pyarrow; print(pyarrow.__path__[0])\")"

Texts documents(const std::string& file, const Texts& where = {}, const std::string& column = "text") {
  ReaderOptions options;
  options.where = where;
  options.text_key = column;
  DocumentReader reader({file}, options);
  Texts out;
  std::vector<Entry> entries;
  while (reader.next(entries, 1000))
    for (const Entry& entry : entries)
      EXPECT_TRUE(reader.pieces(entry, [&](std::string_view piece, bool first) {
        if (first) out.emplace_back();
        out.back() += piece;
      }));
  EXPECT_LE(reader.consumed_bytes(), std::filesystem::file_size(file));
  return out;
}

/// The text of a row of snappy.parquet; those of rows 3 and 7 are null and empty.
std::string row(int i) {
  std::string text = "Document " + std::to_string(i) + ": ünï";
  for (int k = 0; k < i; ++k) text += " word";
  return text;
}
Texts rows(std::initializer_list<int> numbers) {
  Texts out;
  for (const int i : numbers) out.push_back(row(i));
  return out;
}

TEST(Parquet, WithoutTheLibraryTheErrorSaysWhatToDo) {
  if (has_parquet_support()) GTEST_SKIP() << "this build has the library";
  const std::string message = message_of([] { DocumentReader({kFolder + "snappy.parquet"}, {}); });
  EXPECT_NE(message.find("snappy.parquet: this build of Tessera reads no Parquet files"), std::string::npos) << message;
  EXPECT_NE(message.find("pip install pyarrow, then cmake with -DTESSERA_ARROW_ROOT="), std::string::npos) << message;
}

TEST(Parquet, TextsOfAColumn) {
  NEEDS_PARQUET();
  EXPECT_EQ(documents(kFolder + "snappy.parquet"), rows({0, 1, 2, 4, 5, 6, 8, 9}));
  EXPECT_EQ(documents(kFolder + "snappy.parquet", {}, "url").at(9), "https://example.org/9");
  EXPECT_EQ(documents(kFolder + "snappy.parquet", {}, "language"), (Texts{"en", "fr", "en", "fr", "en", "fr", "en", "fr", "en", "fr"}));
  const Texts many = documents(kFolder + "zstd.parquet");
  ASSERT_EQ(many.size(), 300u);
  for (int i = 0; i < 300; ++i) {
    const std::string once = "Row " + std::to_string(i) + " ";
    ASSERT_EQ(many[static_cast<std::size_t>(i)], once + once + once);
  }
}

TEST(Parquet, RowGroupsMayBeEmpty) {
  NEEDS_PARQUET();
  EXPECT_EQ(documents(kFolder + "empty_groups.parquet"), (Texts{"one", "two"}));
}

TEST(Parquet, RowsByCondition) {
  NEEDS_PARQUET();
  const std::string file = kFolder + "snappy.parquet", all = kFolder + "zstd.parquet";
  EXPECT_EQ(documents(file, {"score>=3"}), rows({6, 8, 9}));
  EXPECT_EQ(documents(file, {"score<=2.5"}), rows({0, 1, 2, 4}));  // null fulfils nothing
  EXPECT_EQ(documents(file, {"int_score!=4", "language==en"}), rows({0, 2, 6, 8}));
  EXPECT_EQ(documents(file, {"id=='<urn:uuid:8>'"}), rows({8}));
  EXPECT_EQ(documents(file, {"language!='en'", "int_score>5"}), rows({9}));
  EXPECT_EQ(documents(file, {"score>100"}), Texts{});
  EXPECT_EQ(documents(all, {"i32<-140"}).size(), 10u);
  EXPECT_EQ(documents(all, {"u32>=4294967290"}).size(), 6u);
  EXPECT_EQ(documents(all, {"u64>18446744073709551610"}).size(), 5u);
  EXPECT_EQ(documents(all, {"f32==2.9"}).size(), 1u);
  EXPECT_EQ(documents(all, {"kept==true"}).size(), 100u);
  EXPECT_EQ(documents(all, {"kept!=true", "f32<3"}).size(), 20u);
}

TEST(Parquet, WhatCannotBeIsSaid) {
  NEEDS_PARQUET();
  const std::string file = kFolder + "snappy.parquet", all = kFolder + "zstd.parquet";
  const auto expect = [](const std::string& path, const Texts& where, const std::string& column, const std::string& what) {
    const std::string message = message_of([&] { documents(path, where, column); });
    EXPECT_EQ(message.find(path + ": "), 0u) << message;
    EXPECT_NE(message.find(what), std::string::npos) << "expected \"" << what << "\" in: " << message;
  };
  expect(file, {}, "body", "has no column \"body\" (it has text, id, url, language, score, int_score); choose another with --text-key");
  expect(file, {}, "meta", "nested, expected single values: column \"meta\"");
  expect(file, {}, "score", "column \"score\" is DOUBLE, expected text");
  expect(file, {"quality>1"}, "text", "has no column \"quality\"");
  expect(file, {"language>=3"}, "text", "text is compared with == and != only");
  expect(file, {"score==good"}, "text", "expected a number to compare with");
  expect(all, {"kept==yes"}, "text", "expected == true or == false");
  expect(all, {"when>3"}, "text", "which --where does not compare");
}

TEST(Parquet, DamagedFilesAreNamedWithTheirRowGroup) {
  NEEDS_PARQUET();
  const TemporaryFolder folder;
  const std::string bytes = read_file(kFolder + "zstd.parquet"), file = folder / "a.parquet";
  const auto message = [&](const std::string& damaged) {
    put(file, damaged);
    return message_of([&] { documents(file); });
  };
  EXPECT_NE(message(bytes.substr(0, bytes.size() - 1)).find("a.parquet: damaged, or no Parquet file: "), std::string::npos);
  EXPECT_NE(message("PAR1").find("damaged, or no Parquet file"), std::string::npos);
  EXPECT_NE(message("").find("damaged, or no Parquet file"), std::string::npos);
  EXPECT_NE(message("no such thing at all").find("damaged, or no Parquet file"), std::string::npos);
  std::string pages = bytes;  // the first pages of the first column, and with them the first row group
  for (std::size_t i = 4; i < 400; ++i) pages[i] = static_cast<char>(0xff);
  EXPECT_NE(message(pages).find("a.parquet: row group 0 of 2"), std::string::npos) << message(pages);
  EXPECT_THROW(documents(folder / "missing.parquet"), std::invalid_argument);

  // Nothing but an exception that names the file, wherever a byte is damaged (without page checksums some damage shows only in the text).
  for (std::size_t i = 0; i < bytes.size(); i += 13) {
    std::string damaged = bytes;
    damaged[i] = static_cast<char>(damaged[i] ^ (1 << (i % 8)));
    const std::string what = message(damaged);
    EXPECT_TRUE(what.empty() || what.starts_with(file)) << what;
  }
}

}  // namespace
}  // namespace tessera
