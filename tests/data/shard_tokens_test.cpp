#include "data/shard_tokens.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <hdf5.h>
#include <sys/stat.h>

#include <memory>
#include <random>

#include "data/files.h"
#include "data/fletcher32.h"
#include "tests/data/support.h"

namespace tessera {
namespace {

using namespace test;

/// By the words: two sums modulo 65535 over big-endian words of 16 bits.
std::uint32_t naive_fletcher(const std::vector<std::byte>& bytes) {
  std::uint32_t first = 0, second = 0;
  const auto add = [](std::uint32_t a, std::uint32_t b) { return (a + b) / 65536 + (a + b) % 65536; };  // the carry comes back in
  for (std::size_t i = 0; i < bytes.size(); i += 2) {
    first = add(first, std::to_integer<std::uint32_t>(bytes[i]) << 8 | std::to_integer<std::uint32_t>(bytes[i + 1]));
    second = add(second, first);
  }
  return second << 16 | first;
}

TEST(Fletcher32, IsThatOfTheWords) {
  std::mt19937 random(1);
  for (const std::size_t size : {0, 2, 4, 62, 64, 66, 1000, 16382, 16384, 16386, 32768, 70002}) {
    for (const int kind : {0, 1, 2}) {
      std::vector<std::byte> bytes(size);
      for (std::byte& b : bytes) b = static_cast<std::byte>(kind == 0 ? random() : kind == 1 ? 0xff : 0);
      EXPECT_EQ(fletcher32(bytes), naive_fletcher(bytes)) << size << " " << kind;
      if (size > 2) {
        bytes[size / 2] ^= std::byte{1};
        EXPECT_EQ(fletcher32(bytes), naive_fletcher(bytes)) << size << " " << kind;
      }
    }
  }
}

class ShardTokensTest : public testing::Test {
 protected:
  static constexpr std::uint64_t kTokens = 10'000, kChunk = 1024;

  ShardTokensTest() {
    std::mt19937 random(2);
    for (std::uint64_t i = 0; i < kTokens; ++i) tokens.push_back(static_cast<std::int32_t>(random() % 50'000));
  }

  template <typename T>
  std::string chunked() {
    Hdf5File file = Hdf5File::create(path);
    file.create_dataset("tokens", hdf5_type<T>(), {0}, {kChunk}, true);
    file.append<std::int32_t>("tokens", tokens);
    file.close();
    return path;
  }
  /// A file of one dataset whose creation properties are `properties`, as other programs may write it.
  void foreign(hid_t properties, hid_t type) {
    const hid_t file = H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
    const hsize_t size = kTokens;
    const hid_t space = H5Screate_simple(1, &size, nullptr);
    const hid_t dataset = H5Dcreate2(file, "tokens", type, space, H5P_DEFAULT, properties, H5P_DEFAULT);
    ASSERT_GE(H5Dwrite(dataset, H5T_NATIVE_INT32, H5S_ALL, H5S_ALL, H5P_DEFAULT, tokens.data()), 0);
    H5Dclose(dataset);
    H5Sclose(space);
    H5Pclose(properties);
    H5Fclose(file);
  }
  ShardTokens reader(std::int64_t vocabulary = 50'000) const {
    return {path, kTokens, vocabulary, [](const Hdf5File&) {}};
  }

  void expect_all(ShardTokens& shard) const {
    for (const std::uint64_t first : {std::uint64_t{0}, std::uint64_t{1}, kChunk - 1, kChunk, std::uint64_t{4321}, kTokens - 1})
      for (const std::uint64_t count : {std::uint64_t{1}, std::uint64_t{3}, kChunk, 3 * kChunk + 5, kTokens}) {
        std::vector<std::int32_t> out(std::min(count, kTokens - first), -1);
        shard.read(first, out);
        ASSERT_TRUE(std::equal(out.begin(), out.end(), tokens.begin() + static_cast<std::ptrdiff_t>(first))) << first << " " << count;
      }
  }

  TemporaryFolder folder;
  const std::string path = folder / "a.h5";
  std::vector<std::int32_t> tokens;
};

TEST_F(ShardTokensTest, EveryLayoutGivesTheSameTokens) {
  for (const bool wide : {false, true}) {
    wide ? chunked<std::uint32_t>() : chunked<std::uint16_t>();
    const auto where = Hdf5File::open(path).placement("tokens");
    ASSERT_TRUE(where);
    EXPECT_TRUE(where->fletcher32);
    EXPECT_EQ(where->offsets.size(), 10u);
    ShardTokens shard = reader();
    expect_all(shard);
    shard.close();
    EXPECT_FALSE(shard.is_open());
    expect_all(shard);
  }
  foreign(H5Pcreate(H5P_DATASET_CREATE), H5T_STD_U16LE);  // in one piece
  ASSERT_TRUE(Hdf5File::open(path).placement("tokens"));
  ShardTokens contiguous = reader();
  expect_all(contiguous);

  const hid_t compressed = H5Pcreate(H5P_DATASET_CREATE);
  H5Pset_chunk(compressed, 1, std::vector<hsize_t>{kChunk}.data());
  H5Pset_shuffle(compressed);
  foreign(compressed, H5T_STD_U16LE);
  EXPECT_FALSE(Hdf5File::open(path).placement("tokens"));
  ShardTokens through_library = reader();
  expect_all(through_library);
  through_library.close();
  expect_all(through_library);

  foreign(H5Pcreate(H5P_DATASET_CREATE), H5T_STD_U16BE);
  EXPECT_FALSE(Hdf5File::open(path).placement("tokens"));
  ShardTokens other_order = reader();
  expect_all(other_order);
}

TEST_F(ShardTokensTest, DamageAfterOpeningIsFoundAndNamed) {
  chunked<std::uint16_t>();
  const std::uint64_t at = Hdf5File::open(path).placement("tokens")->offsets[3] + 100;
  ShardTokens shard = reader();
  std::vector<std::int32_t> out(10);
  shard.read(3 * kChunk + 40, out);  // chunk 3 is sound, and known to be
  const timespec times[2] = {{0, UTIME_OMIT}, {12345, 0}};
  flip_bit(path, at);
  ASSERT_EQ(::utimensat(AT_FDCWD, path.c_str(), times, 0), 0);  // the clock of files is coarse
  shard.read(2 * kChunk, out);                                  // another chunk
  const std::string message = message_of([&] { shard.read(3 * kChunk + 40, out); });
  EXPECT_NE(message.find(path + ": tokens 3112 to 3122 cannot be read: the shard is damaged"), std::string::npos) << message;
  EXPECT_NE(message.find("chunk 3, tokens 3072 to 4096: Fletcher-32"), std::string::npos) << message;
  EXPECT_EQ(message_of([&] { shard.read(3 * kChunk + 40, out); }), message);  // again
  shard.read(0, out);                                                         // the rest can be read all the same
  flip_bit(path, at);
  const timespec later[2] = {{0, UTIME_OMIT}, {12346, 0}};
  ASSERT_EQ(::utimensat(AT_FDCWD, path.c_str(), later, 0), 0);
  expect_all(shard);
}

TEST_F(ShardTokensTest, CutShortWhileOpen) {
  chunked<std::uint16_t>();
  ShardTokens shard = reader();
  expect_all(shard);
  std::filesystem::resize_file(path, 5000);
  std::vector<std::int32_t> out(10);
  for (int i = 0; i < 2; ++i) EXPECT_NE(message_of([&] { shard.read(9000, out); }).find(path), std::string::npos);
  std::filesystem::remove(path);
  EXPECT_NE(message_of([&] { shard.read(9000, out); }).find(path + ": cannot be opened"), std::string::npos);
  chunked<std::uint16_t>();
  expect_all(shard);
}

// The library would share what it knows of a file between all who open it, also with those who have closed it since.
TEST_F(ShardTokensTest, ManyMayHaveTheSameFileOpen) {
  chunked<std::uint16_t>();
  auto first = std::make_unique<Hdf5File>(Hdf5File::open(path));
  const Hdf5File second = Hdf5File::open(path);
  const auto expected = first->placement("tokens");
  ASSERT_TRUE(expected);
  ASSERT_TRUE(second.placement("tokens"));
  EXPECT_EQ(second.placement("tokens")->offsets, expected->offsets);
  first.reset();
  EXPECT_EQ(second.placement("tokens")->offsets, expected->offsets);
  EXPECT_EQ(second.read<std::int32_t>("tokens"), tokens);
}

TEST_F(ShardTokensTest, TokensOutsideTheVocabulary) {
  chunked<std::uint16_t>();
  ShardTokens shard = reader(*std::max_element(tokens.begin(), tokens.end()));
  std::vector<std::int32_t> out(kTokens);
  EXPECT_NE(message_of([&] { shard.read(0, out); }).find("lies outside the vocabulary of"), std::string::npos);
  tokens[77] = static_cast<std::int32_t>(0xfffffff0);
  for (std::int32_t& token : tokens) token &= 0x7fffffff;
  tokens[77] |= 1 << 30;
  chunked<std::uint32_t>();
  ShardTokens wide = reader();
  EXPECT_NE(message_of([&] { wide.read(0, out); }).find("token 2147483632 at index 77"), std::string::npos) << message_of([&] { wide.read(0, out); });
}

}  // namespace
}  // namespace tessera
