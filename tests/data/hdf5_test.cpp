#include <fmt/core.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <numeric>
#include <thread>

#include "data/files.h"
#include "data/hdf5_file.h"
#include "tests/data/support.h"

namespace tessera {
namespace {

using test::file_bytes;
using test::flip_bit;
using test::put;
using test::TemporaryFolder;
using test::with_file_size_limit;

template <typename T>
std::vector<T> counting(std::size_t n) {
  std::vector<T> out(n);
  std::iota(out.begin(), out.end(), T(1));
  return out;
}

template <typename T>
void expect_round_trip(Hdf5File& file, const std::string& path, const std::string& name) {
  const auto values = counting<T>(60);
  file.write<T>(name, {3, 4, 5}, values);
  file.close();
  const Hdf5File back = Hdf5File::open(path);
  EXPECT_EQ(back.read<T>(name), values);
  EXPECT_EQ(back.info(name).type, hdf5_type<T>());
  EXPECT_EQ(back.info(name).shape, (Hdf5Shape{3, 4, 5}));
  EXPECT_TRUE(back.info(name).fletcher32);
}

TEST(Hdf5File, EveryTypeRoundTrips) {
  const TemporaryFolder folder;
  const auto run = [&]<typename T>(T) {
    const std::string path = folder / "t.h5";
    Hdf5File file = Hdf5File::create(path);
    expect_round_trip<T>(file, path, "group/sub/x");
  };
  run(std::uint8_t{}), run(std::uint16_t{}), run(std::uint32_t{}), run(std::int32_t{});
  run(std::int64_t{}), run(std::uint64_t{}), run(float{}), run(double{});
}

TEST(Hdf5File, LargeArraysAreWrittenInPiecesOfWholeChunks) {
  const TemporaryFolder folder;
  const std::string path = folder / "t.h5";
  const auto values = counting<std::uint32_t>(7 * 1000 * 1001);  // 27 MiB: more than one locked piece, and chunks that do not divide it
  {
    Hdf5File file = Hdf5File::create(path);
    file.write<std::uint32_t>("x", {7, 1000, 1001}, values);
    file.write<std::uint32_t>("flat", {values.size()}, values);
    file.close();
  }
  const Hdf5File file = Hdf5File::open(path);
  EXPECT_EQ(file.read<std::uint32_t>("x"), values);
  EXPECT_EQ(file.read<std::uint32_t>("flat"), values);
  EXPECT_EQ(file.info("flat").chunk, (Hdf5Shape{1 << 18}));
  EXPECT_EQ(file.datasets(), (std::vector<std::string>{"flat", "x"}));
}

TEST(Hdf5File, PartsScalarsEmptyAndAppend) {
  const TemporaryFolder folder;
  const std::string path = folder / "t.h5";
  {
    Hdf5File file = Hdf5File::create(path);
    file.create_dataset("grid", Hdf5Type::f32, {4, 6}, {2, 4});
    file.write_part<float>("grid", {1, 2}, {2, 3}, std::vector<float>{1, 2, 3, 4, 5, 6});
    file.write<double>("scalar", {}, std::vector<double>{2.5});
    file.write<std::int32_t>("empty", {0, 5}, std::vector<std::int32_t>{});
    file.create_dataset("row", Hdf5Type::u16, {0}, {8}, true);
    for (std::uint16_t i = 0; i < 30; i += 3)
      file.append<std::uint16_t>("row", std::vector<std::uint16_t>{i, std::uint16_t(i + 1), std::uint16_t(i + 2)});
    file.close();
    file.close();  // does nothing
  }
  const Hdf5File file = Hdf5File::open(path);
  std::vector<float> part(4);
  file.read_part<float>("grid", {0, 2}, {2, 2}, part);
  EXPECT_EQ(part, (std::vector<float>{0, 0, 1, 2}));
  EXPECT_EQ(file.read<double>("grid")[2 * 6 + 4], 6.0);  // converts within a kind
  EXPECT_EQ(file.read<double>("scalar"), std::vector<double>{2.5});
  EXPECT_EQ(file.info("scalar").shape, Hdf5Shape{});
  EXPECT_TRUE(file.read<std::int32_t>("empty").empty());
  const auto row = file.read<std::int32_t>("row");
  ASSERT_EQ(row.size(), 30u);
  EXPECT_EQ(row[29], 29);
  EXPECT_THROW(file.read<float>("row"), std::runtime_error);                                     // integers as floats
  EXPECT_THROW(file.read<float>("nothing"), std::runtime_error);                                 // no such dataset
  EXPECT_THROW(file.read<float>("no/thing"), std::runtime_error);                                // nor group
  EXPECT_THROW(file.read_part<float>("grid", {3, 0}, {2, 2}, part), std::invalid_argument);      // outside
  EXPECT_THROW(file.read_part<float>("grid", {0, 0}, {3, 2}, part), std::invalid_argument);      // more than the memory holds
  EXPECT_THROW(file.read<float>("grid", {6, 4}, std::span<float>(part)), std::runtime_error);    // another shape
  EXPECT_THROW(file.read_part<float>("grid", {~0ull, 0}, {2, 2}, part), std::invalid_argument);  // overflow
  EXPECT_FALSE(file.contains("no/thing"));
  EXPECT_TRUE(file.contains("grid"));
}

TEST(Hdf5File, Attributes) {
  const TemporaryFolder folder;
  const std::string path = folder / "t.h5";
  const std::string large(200'000, 'x');  // more than fits in an object header
  {
    Hdf5File file = Hdf5File::create(path);
    file.write<float>("a/b", {1}, std::vector<float>{1});
    file.set_attribute("text", "grüße");
    file.set_attribute("empty", "");
    file.set_attribute("large", large);
    file.set_attribute("count", std::int64_t{-5});
    file.set_attribute("count", 7u);  // replaces
    file.set_attribute("rate", 0.1);
    for (int i = 0; i < 20; ++i) file.set_attribute(fmt::format("n{}", i), i, "a/b");
    file.close();
  }
  const Hdf5File file = Hdf5File::open(path);
  EXPECT_EQ(file.string_attribute("text"), "grüße");
  EXPECT_EQ(file.string_attribute("empty"), "");
  EXPECT_EQ(file.string_attribute("large"), large);
  EXPECT_EQ(file.integer_attribute("count"), 7);
  EXPECT_EQ(file.real_attribute("rate"), 0.1);
  EXPECT_EQ(file.integer_attribute("n13", "a/b"), 13);
  EXPECT_EQ(file.attributes(), (std::vector<std::string>{"count", "empty", "large", "rate", "text"}));
  EXPECT_EQ(file.attributes("a/b").size(), 20u);
  EXPECT_FALSE(file.has_attribute("nothing"));
  EXPECT_THROW(file.string_attribute("nothing"), std::runtime_error);
  EXPECT_THROW(file.string_attribute("count"), std::runtime_error);
  EXPECT_THROW(file.integer_attribute("text"), std::runtime_error);
}

TEST(Hdf5File, OpenSaysWhatIsWrong) {
  const TemporaryFolder folder;
  EXPECT_THROW(Hdf5File::open(folder / "missing.h5"), std::invalid_argument);
  write_file(folder / "text.h5", "not HDF5");
  EXPECT_THROW(Hdf5File::open(folder / "text.h5"), std::invalid_argument);
  write_file(folder / "empty.h5", "");
  EXPECT_THROW(Hdf5File::open(folder / "empty.h5"), std::invalid_argument);
  EXPECT_THROW(Hdf5File::open(folder.path()), std::exception);
  EXPECT_THROW(Hdf5File::create(folder / "missing/x.h5"), std::runtime_error);
  EXPECT_THROW(Hdf5File::create(folder / "text.h5/x.h5"), std::runtime_error);
  Hdf5File file = Hdf5File::create(folder / "w.h5");
  file.close();
  EXPECT_THROW(file.read<float>("x"), std::logic_error);
  EXPECT_THROW(Hdf5File::open(folder / "w.h5").set_attribute("a", 1), std::logic_error);
}

TEST(Hdf5File, TwoThreadsOnTwoFiles) {
  const TemporaryFolder folder;
  const auto values = counting<float>(300'000);
  const auto work = [&](const std::string& path) {
    for (int i = 0; i < 10; ++i) {
      Hdf5File out = Hdf5File::create(path);
      out.write<float>("x", {values.size()}, values);
      out.close();
      ASSERT_EQ(Hdf5File::open(path).read<float>("x"), values);
      EXPECT_THROW(Hdf5File::open(path).read<float>("y"), std::runtime_error);
    }
  };
  std::thread a(work, folder / "a.h5"), b(work, folder / "b.h5");
  a.join();
  b.join();
}

void write_sample(const std::string& path) {
  Hdf5File file = Hdf5File::create(path);
  file.set_attribute("name", "sample");
  file.create_dataset("row", Hdf5Type::u32, {0}, {1024}, true);
  for (int i = 0; i < 40; ++i) file.append<std::uint32_t>("row", counting<std::uint32_t>(1000));
  file.write<float>("m/x", {100, 300}, counting<float>(30'000));
  file.write<double>("scalar", {}, std::vector<double>{1});
  for (int i = 0; i < 30; ++i) file.set_attribute(fmt::format("a{}", i), i);
  file.close();
}

TEST(Hdf5File, FullDiskThrowsOnceAndLeavesTheProcessSound) {
  const TemporaryFolder folder;
  write_sample(folder / "good.h5");
  const std::size_t whole = file_bytes(folder / "good.h5");
  // In a child, which then exits in order with the library's exit handlers: any crash or hang in them shows in its status.
  for (std::size_t limit = 0; limit < whole; limit += whole / 30 + 13) {
    const int status = with_file_size_limit(limit, [&] {
      try {
        write_sample(folder / "bad.h5");
      } catch (const std::runtime_error& e) {
        const std::string text = e.what();
        return text.find("bad.h5: writing ") != std::string::npos && text.find("File too large") != std::string::npos ? 7 : 8;
      }
      return 9;
    });
    ASSERT_TRUE(WIFEXITED(status)) << "limit " << limit << ": signal " << WTERMSIG(status);
    ASSERT_EQ(WEXITSTATUS(status), 7) << "limit " << limit;
  }
}

TEST(Hdf5File, FullDiskWithoutCloseIsAlsoSafe) {
  const TemporaryFolder folder;
  const int status = with_file_size_limit(50'000, [&] {
    Hdf5File file = Hdf5File::create(folder / "bad.h5");
    try {
      file.write<float>("x", {3'000'000}, counting<float>(3'000'000));
    } catch (const std::runtime_error&) {
      return 7;
    }
    return 9;
  });
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 7);
}

TEST(Hdf5File, EveryFlippedByteIsFoundOrHarmless) {
  const TemporaryFolder folder;
  const std::string path = folder / "t.h5", bad = folder / "bad.h5";
  const auto values = counting<std::uint16_t>(5000);
  {
    Hdf5File file = Hdf5File::create(path);
    file.set_attribute("name", "sample");
    file.create_dataset("row", Hdf5Type::u16, {0}, {1024}, true);
    file.append<std::uint16_t>("row", values);
    file.close();
  }
  const std::string bytes = read_file(path);
  put(bad, bytes);
  EXPECT_TRUE(test::holds_in_child([&] {
    int found = 0;
    for (std::size_t i = 0; i < bytes.size(); i += 7) {
      flip_bit(bad, i, static_cast<int>(i % 8));
      try {
        const Hdf5File file = Hdf5File::open(bad);
        EXPECT_EQ(file.read<std::uint16_t>("row"), values) << "byte " << i;
        EXPECT_EQ(file.string_attribute("name"), "sample") << "byte " << i;
      } catch (const std::exception& e) {
        EXPECT_NE(std::string(e.what()).find("bad.h5"), std::string::npos) << e.what();
        ++found;
      }
      flip_bit(bad, i, static_cast<int>(i % 8));  // back
    }
    EXPECT_GT(found, 1000);  // nearly all of the 10000 bytes of data, a seventh of them tried
  }));
  for (std::size_t size = 0; size < bytes.size(); size += 397) {
    put(bad, bytes.substr(0, size));
    EXPECT_THROW(Hdf5File::open(bad), std::exception) << size;
  }
}

TEST(Files, WriteReadAndReplace) {
  const TemporaryFolder folder;
  const std::string path = folder / "a.txt";
  write_file(path, "one");
  write_file(path, std::string(300'000, 'x') + '\0');
  EXPECT_EQ(read_file(path), std::string(300'000, 'x') + '\0');
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1);  // nothing left aside
  EXPECT_THROW(read_file(folder / "missing"), std::invalid_argument);
  EXPECT_THROW(read_file(folder.path()), std::invalid_argument);
  EXPECT_THROW(write_file(folder / "missing/a.txt", "x"), std::runtime_error);
  EXPECT_THROW(make_folder(path + "/sub"), std::invalid_argument);
  EXPECT_THROW(write_file("/dev/full", "x"), std::invalid_argument);  // refused before anything is renamed over the device
  EXPECT_FALSE(std::filesystem::is_regular_file("/dev/full"));
  EXPECT_THROW(sync_folder(folder / "missing"), std::runtime_error);
  EXPECT_NO_THROW(sync_folder(folder.path()));
}

TEST(Files, FullDiskKeepsTheOldFile) {
  const TemporaryFolder folder;
  const std::string path = folder / "a.txt";
  write_file(path, "old");
  const int status = with_file_size_limit(1000, [&] {
    try {
      write_file(path, std::string(5000, 'x'));
    } catch (const std::runtime_error& e) {
      return std::string(e.what()).find("a.txt: writing 4000 bytes at offset 1000 failed") != std::string::npos ? 7 : 8;
    }
    return 9;
  });
  EXPECT_EQ(WEXITSTATUS(status), 7);
  EXPECT_EQ(read_file(path), "old");
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1);
}

}  // namespace
}  // namespace tessera
