// Every parser of files against damaged ones: seeds, and from each seed thousands of cases with flipped bits, cuts, splices and edited numbers.
// The cases are the same in every run. Only a std::exception that names the file may come of one, in bounded memory; a crash is caught in a child
// process and reported with its case. TESSERA_FUZZ_CASES=20 runs twenty times as many.

#include <fmt/core.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <zlib.h>
#include <zstd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <new>

#include "data/dataset.h"
#include "data/document_reader.h"
#include "data/files.h"
#include "data/parquet_source.h"
#include "data/prepare.h"
#include "data/row_filter.h"
#include "data/safetensors.h"
#include "data/tokenizer.h"
#include "tests/data/support.h"
#include "tests/data/support_tokens.h"

namespace {
std::atomic<std::size_t> largest_request{0};
}

namespace {
// What a damaged length field asks for shows here, whether or not the system would have given it.
[[gnu::noinline]] void* allocate(std::size_t bytes) {
  std::size_t largest = largest_request;
  while (bytes > largest && !largest_request.compare_exchange_weak(largest, bytes)) {
  }
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

using namespace test;
using Texts = std::vector<std::string>;

constexpr std::size_t kMostRequested = 64 << 20;

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {  // splitmix64
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  std::size_t below(std::size_t count) { return count ? next() % count : 0; }
  template <typename T>
  const T& of(const std::vector<T>& values) {
    return values[below(values.size())];
  }

 private:
  std::uint64_t state_;
};

/// Where a field is likelier than elsewhere: near the front, as headers are, half of the time.
std::size_t place(Random& random, std::size_t size) { return random.below(random.below(2) ? size : std::min<std::size_t>(size, 64)); }

void overwrite(std::string& bytes, std::size_t at, const std::string& with) {
  for (std::size_t i = 0; i < with.size() && at + i < bytes.size(); ++i) bytes[at + i] = with[i];
}

void mutate_once(std::string& bytes, const Texts& seeds, Random& random) {
  static const std::vector<std::uint64_t> numbers = {
      0,          1,          2,          127,        128,        255,        256,        32767, 65535,     65536,
      0x7fffffff, 0x80000000, 0xffffffff, 1ull << 32, 1ull << 40, 1ull << 62, 1ull << 63, ~0ull, ~0ull - 7, 0x7fffffffffffffff};
  static const Texts words = {"0",
                              "-1",
                              "4294967296",
                              "18446744073709551616",
                              "1e999",
                              "1e-999",
                              "null",
                              "true",
                              "[]",
                              "{}",
                              "\"\"",
                              "\"",
                              "\\",
                              "\\ud800",
                              "\\u0000",
                              "[[[[[[[[",
                              "{\"a\":",
                              ",",
                              "\n",
                              "\r\n",
                              "\xff",
                              "\xc3",
                              "\xf4\x90\x80\x80",
                              "<|endoftext|>",
                              " "};
  if (bytes.empty()) bytes = random.of(seeds);
  const std::size_t at = place(random, bytes.size());
  switch (random.below(9)) {
    case 0: bytes[at] = static_cast<char>(bytes[at] ^ (1 << random.below(8))); break;
    case 1: bytes[at] = static_cast<char>(random.next()); break;
    case 2: bytes.resize(at); break;
    case 3: bytes.erase(at, 1 + random.below(16)); break;
    case 4: bytes.insert(at, random.of(words)); break;
    case 5: overwrite(bytes, at, little_endian<std::uint32_t>({static_cast<std::uint32_t>(random.of(numbers))})); break;
    case 6: overwrite(bytes, at, little_endian<std::uint64_t>({random.of(numbers)})); break;
    case 7: {  // the end of another
      const std::string& other = random.of(seeds);
      bytes = bytes.substr(0, at) + other.substr(std::min(other.size(), random.below(2) ? at : random.below(other.size())));
      break;
    }
    case 8: {  // a stretch of it, again
      const std::string stretch = bytes.substr(random.below(bytes.size()), 1 + random.below(40));
      bytes.insert(at, stretch);
      break;
    }
  }
}

/// `parse` reads what stands at `path`; it may throw a std::exception with `path`'s folder in its message.
void fuzz(const std::string& path, const Texts& seeds, std::size_t cases, const std::function<void()>& parse) {
  const char* times = std::getenv("TESSERA_FUZZ_CASES");
  cases *= times ? std::max(1, std::atoi(times)) : 1;
  // The case under way, where the parent sees it after a crash.
  auto* now = static_cast<std::size_t*>(::mmap(nullptr, sizeof(std::size_t), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  ASSERT_NE(now, MAP_FAILED);
  const auto make = [&](std::size_t number) {
    Random random(number + 1);
    std::string bytes = number < seeds.size() ? seeds[number] : random.of(seeds);
    if (number >= seeds.size())
      for (std::size_t i = 1 + random.below(3); i > 0; --i) mutate_once(bytes, seeds, random);
    return bytes;
  };
  const std::string folder = folder_of(path);
  const bool held = holds_in_child([&] {
    std::size_t parsed = 0;
    for (*now = 0; *now < cases; ++*now) {
      const std::string bytes = make(*now);
      std::filesystem::remove(path);  // writing over a file waits for the disk on some systems
      put(path, bytes);
      largest_request = 0;
      std::string problem;
      try {
        parse();
        ++parsed;
      } catch (const std::exception& e) {
        if (std::string_view(e.what()).find(folder) == std::string_view::npos) problem = fmt::format("the message names no file: {}", e.what());
        if (std::string_view(e.what()).size() > 4000) problem = fmt::format("a message of {} bytes", std::string_view(e.what()).size());
      } catch (...) {
        problem = "something that is no std::exception";
      }
      if (largest_request > kMostRequested) problem += fmt::format(" {} bytes asked for at once", largest_request.load());
      ASSERT_EQ(problem, "") << "case " << *now << " (" << bytes.size() << " bytes): " << testing::PrintToString(bytes.substr(0, 2000));
      if (*now + 1 == seeds.size()) {
        EXPECT_EQ(parsed, seeds.size()) << "a seed is damaged itself";
      }
    }
  });
  EXPECT_TRUE(held) << "case " << *now << ": " << testing::PrintToString(make(*now).substr(0, 2000));
  ::munmap(now, sizeof(std::size_t));
}

void read_all(const std::string& file, ReaderOptions options) {
  options.vocabulary = 257;
  options.end_of_text = 256;
  DocumentReader reader({file}, options);
  std::vector<Entry> entries;
  while (reader.next(entries, 64 << 10))
    for (const Entry& entry : entries)
      if (entry.tokens.empty()) reader.pieces(entry, [](std::string_view, bool) {});
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

std::string zstd(const std::string& bytes) {
  std::string out(ZSTD_compressBound(bytes.size()), '\0');
  out.resize(ZSTD_compress(out.data(), out.size(), bytes.data(), bytes.size(), 3));
  return out;
}

/// A vocabulary of the 256 bytes, a few merges and the end of text, as vocab.json and merges.txt and as tokenizer.json.
struct Vocabulary {
  std::string vocab = "{", merges = "#version: 0.2\n", json;
  Vocabulary() {
    std::string list;
    std::uint32_t id = 0;
    const auto add = [&](const std::string& text) {
      vocab += fmt::format("{}\"{}\": {}", id ? ", " : "", text == "\"" || text == "\\" ? "\\" + text : text, id), ++id;
    };
    for (int i = 0; i < 256; ++i) {
      std::string c;
      const int shift = i - 33 < 0 ? i : i <= 126 ? -1 : i <= 160 ? i - 127 + 33 : i == 173 ? 67 : -1;  // GPT-2's stand-ins for what does not print
      const int code = shift < 0 ? i : 256 + shift;
      if (code < 0x80) {
        c = static_cast<char>(code);
      } else {
        c = {static_cast<char>(0xc0 | (code >> 6)), static_cast<char>(0x80 | (code & 63))};
      }
      add(c);
    }
    for (const auto& [left, right] : {std::pair<std::string, std::string>{"t", "h"}, {"th", "e"}, {"a", "n"}}) {
      add(left + right);
      merges += left + " " + right + "\n";
      list += fmt::format("{}\"{} {}\"", list.empty() ? "" : ", ", left, right);
    }
    add("<|endoftext|>");
    vocab += "}";
    json = fmt::format(
        R"({{"added_tokens": [{{"id": {}, "content": "<|endoftext|>", "special": true}}], "normalizer": null, "pre_tokenizer": {{"type": "ByteLevel", "add_prefix_space": false, "use_regex": true}}, "model": {{"type": "BPE", "vocab": {}, "merges": [{}]}}}})",
        id - 1, vocab, list);
  }
};

/// A small dataset in DIR/data, and its files' contents.
struct SmallDataset {
  explicit SmallDataset(const TemporaryFolder& folder) {
    std::string lines;
    for (int i = 0; i < 60; ++i) lines += fmt::format("{{\"text\": \"document {} of sixty\"}}\n", i);
    put(folder / "t.jsonl", lines);
    PrepareOptions options;
    options.inputs = {folder / "t.jsonl"};
    options.output = path = folder / "data";
    options.validation_fraction = 0.2;
    prepare_dataset(*load_tokenizer("bytes"), options);
  }
  std::string path;
};

TEST(Fuzz, VocabularyFiles) {
  const TemporaryFolder folder;
  const Vocabulary good;
  const auto load = [&] { load_tokenizer("gpt2:" + folder.path())->encode("the man and the hand"); };
  put(folder / "merges.txt", good.merges);
  fuzz(folder / "vocab.json", {good.vocab}, 1500, load);
  put(folder / "vocab.json", good.vocab);
  fuzz(folder / "merges.txt", {good.merges}, 1500, load);
}

TEST(Fuzz, TokenizerJson) {
  const TemporaryFolder folder;
  const auto tokenizer = load_tokenizer("bytes");
  tokenizer->save(folder / "bytes.json");
  const std::string path = folder / "tokenizer.json";
  fuzz(path, {Vocabulary().json, read_file(folder / "bytes.json")}, 3000, [&] { load_tokenizer("bpe:" + path)->encode("the man and the hand"); });
}

// Deep nesting must overflow no stack: found by the cases above with longer runs.
TEST(Fuzz, DeepJson) {
  const TemporaryFolder folder;
  const std::string deep = std::string(300'000, '[') + std::string(300'000, ']');
  const SmallDataset data(folder);
  put(folder / "tokenizer.json", "{\"model\": " + deep + "}");
  put(folder / "a.jsonl", "{\"x\": " + deep + ", \"text\": \"here\"}\n");
  put(data.path + "/dataset.json", "{\"format\": " + deep + "}");
  EXPECT_NE(message_of([&] { load_tokenizer("bpe:" + (folder / "tokenizer.json")); }).find("tokenizer.json: JSON nested more than 64 deep"),
            std::string::npos);
  EXPECT_NE(message_of([&] { read_dataset(data.path); }).find("JSON nested more than 64 deep"), std::string::npos);
  EXPECT_EQ(message_of([&] { read_all(folder / "a.jsonl", {}); }), "");
  put(folder / "tokenizer.json", "{\"model\": 1e999}");  // found by the cases above
  EXPECT_NE(message_of([&] { load_tokenizer("bpe:" + (folder / "tokenizer.json")); }).find("tokenizer.json: not valid JSON: number overflow"),
            std::string::npos);
}

TEST(Fuzz, JsonLines) {
  const TemporaryFolder folder;
  const Texts lines = {
      "{\"text\": \"one\"}\n{\"id\": [1, {\"text\": 2.5e3}], \"text\": \"tw\\u00f6 \\ud83d\\ude00\", \"x\": null}\r\n\n{\"text\":\"\"}\n",
      "{\"text\": \"a\\nb\\\\ \\\"quoted\\\"\", \"n\": -0.0, \"t\": true}\n{\"a\": {\"b\": [[[]]]}, \"text\": \"\xe4\xb8\xad\"}"};
  Texts seeds = lines;
  for (const std::string& text : lines) seeds.push_back(gzip(text)), seeds.push_back(zstd(text));
  fuzz(folder / "a.jsonl", seeds, 4000, [&] { read_all(folder / "a.jsonl", {.skip_bad = false}); });
  fuzz(folder / "a.jsonl", seeds, 2000, [&] { read_all(folder / "a.jsonl", {.skip_bad = true}); });
  fuzz(folder / "a.txt", {"one\n<|endoftext|>\ntwo\r\n<|endoftext|>\r\n\xff\xfe three", gzip("one\n<|endoftext|>\ntwo"), zstd("<|endoftext|>\n")},
       2000, [&] { read_all(folder / "a.txt", {}); });
}

TEST(Fuzz, TokenFiles) {
  const TemporaryFolder folder;
  const std::string path = folder / "a.bin";
  const Texts seeds = {llmc_file<std::uint16_t>({256, 1, 2, 256, 3}), llmc_file<std::uint32_t>({256, 1, 2, 256, 3}),
                       llmc_file<std::uint16_t>(std::vector<std::uint16_t>(40'000, 7))};
  fuzz(path, seeds, 4000, [&] { read_all(path, {}); });
  fuzz(path, seeds, 1000, [&] { read_all(path, {.format = InputFormat::llmc}); });
  fuzz(path, {little_endian<std::uint16_t>({1, 2, 256, 3, 256})}, 1000, [&] { read_all(path, {.format = InputFormat::nanogpt}); });
}

TEST(Fuzz, MegatronPairs) {
  const TemporaryFolder folder;
  const std::string index = megatron_index(8, 2, {3, 1, 0, 2}, {0, 1, 1, 2, 4}), tokens = little_endian<std::uint16_t>({1, 2, 3, 256, 5, 6});
  put(folder / "m.bin", tokens);
  fuzz(folder / "m.idx", {index}, 5000, [&] { read_all(folder / "m.bin", {}); });
  put(folder / "m.idx", index);
  fuzz(folder / "m.bin", {tokens}, 500, [&] { read_all(folder / "m.bin", {}); });
}

TEST(Fuzz, Parquet) {
  if (!has_parquet_support()) GTEST_SKIP() << "NOT TESTED: this build has no Parquet library";
  const TemporaryFolder folder;
  const std::string path = folder / "a.parquet", fixtures = TESSERA_FIXTURES "/parquet/";
  fuzz(path, {read_file(fixtures + "snappy.parquet"), read_file(fixtures + "zstd.parquet")}, 1000, [&] { read_all(path, {}); });
}

TEST(Fuzz, Shards) {
  const TemporaryFolder folder;
  const SmallDataset data(folder);
  const std::string shard = data.path + "/train/shard_00000.h5";
  fuzz(shard, {read_file(shard)}, 1200, [&] {
    if (!is_shard(shard)) return;
    describe_shard(shard, true);
    verify_shard(shard);
    const DatasetInfo info = read_dataset(data.path);
    TokenReader reader(info, info.train);
    std::vector<std::int32_t> tokens(reader.size());
    reader.read(0, tokens);
    reader.read_document_starts(0, tokens);
  });
}

TEST(Fuzz, Manifests) {
  const TemporaryFolder folder;
  const SmallDataset data(folder);
  const std::string manifest = data.path + "/dataset.json";
  // The first version had no checksum over itself: damage gets further there.
  const std::string text = read_file(manifest);
  std::string first = text.substr(0, text.rfind(",\n  \"sha256\"")) + "\n}\n";
  first.replace(first.find("\"version\": 2"), 12, "\"version\": 1");
  fuzz(manifest, {text, first, first}, 3000, [&] {
    const DatasetInfo info = read_dataset(data.path);
    describe_dataset(data.path, true);
    for (const SplitInfo* split : {&info.train, &info.validation}) {
      TokenReader reader(info, *split);
      std::vector<std::int32_t> tokens(std::min<std::uint64_t>(reader.size(), 10'000));
      reader.read(0, tokens);
    }
  });
}

TEST(Fuzz, Safetensors) {
  const TemporaryFolder folder;
  const auto read_folder = [&] {
    for (const SafetensorsFolder opened(folder.path()); const auto& [name, place] : opened.tensors()) {
      std::vector<float> values(place.entry->elements());  // no more than the file holds
      if (SafetensorsFile::is_float(place.entry->dtype)) place.file->read(*place.entry, values);
    }
  };
  const std::string published = TESSERA_FIXTURES "/hf/gpt2_published/", one = "model-00001-of-00002.safetensors",
                    two = "model-00002-of-00002.safetensors";
  const std::string small = little_endian<std::uint64_t>({112}) +
                            R"({"a":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]},"b":{"dtype":"BOOL","shape":[],"data_offsets":[4,5]}}  )"
                            "12345";
  fuzz(folder / "model.safetensors", {read_file(TESSERA_FIXTURES "/hf/mixed.safetensors"), small, small}, 3000, read_folder);
  std::filesystem::remove(folder / "model.safetensors");
  put(folder / one, read_file(published + one));
  put(folder / two, read_file(published + two));
  fuzz(folder / "model.safetensors.index.json", {read_file(published + "model.safetensors.index.json")}, 1000, read_folder);
}

TEST(Fuzz, Conditions) {
  Random random(1);
  const Texts seeds = {"score>=3", "language == 'en'", "a!=\"b c\"", "x<-1.5e-3"};
  for (int i = 0; i < 20'000; ++i) {
    std::string text = random.of(seeds);
    for (std::size_t k = 1 + random.below(3); k > 0; --k) mutate_once(text, seeds, random);
    try {
      const RowFilter filter = parse_row_filter(text);
      EXPECT_FALSE(filter.column.empty());
      EXPECT_TRUE(filter.number || !filter.orders());
    } catch (const std::invalid_argument& e) {
      EXPECT_NE(std::string_view(e.what()).find("--where"), std::string_view::npos);
    }
  }
}

}  // namespace
}  // namespace tessera
