// Event files for TensorBoard, read back by a reader of the tests' own (event_reader.h), which is itself held to what TensorBoard's package writes.

#include "trainer/tensorboard/event_file.h"

#include <gtest/gtest.h>
#include <png.h>
#include <unistd.h>

#include <cmath>
#include <ctime>
#include <filesystem>
#include <limits>
#include <map>

#include "tests/trainer/event_reader.h"
#include "trainer/tensorboard/occupancy.h"
#include "trainer/tensorboard/record.h"

namespace tessera {
namespace {

using testing::read_events;
using testing::ReadEvent;
using testing::ReadValue;
using Json = nlohmann::ordered_json;
namespace fs = std::filesystem;

TEST(TfRecord, ChecksumsOfPublishedVectors) {
  std::string rising;
  for (char c = 0; c < 32; ++c) rising += c;
  // RFC 3720, appendix B.4, and the check value of the catalogue of CRCs.
  EXPECT_EQ(crc32c("123456789"), 0xE3069283u);
  EXPECT_EQ(crc32c(std::string(32, '\0')), 0x8A9136AAu);
  EXPECT_EQ(crc32c(std::string(32, '\xff')), 0x62A8AB43u);
  EXPECT_EQ(crc32c(rising), 0x46DD794Eu);
  EXPECT_EQ(crc32c(""), 0u);
  for (std::size_t n = 0; n < 300; n += 7) EXPECT_EQ(crc32c(std::string(n, 'x')), testing::reference_crc32c(std::string(n, 'x'))) << n;
  EXPECT_EQ(masked_crc(0), 0xA282EAD8u);
  EXPECT_EQ(masked_crc(0xE3069283u), 0xC78AB0E5u);  // 0x2507C60D + 0xA282EAD8
}

TEST(TfRecord, FramesAsTensorBoardDoes) {
  const std::string file = read_file(TESSERA_FIXTURES "/tensorboard/reference.tfevents");
  bool cut_off = true;
  std::string framed;
  for (const std::string& record : testing::read_records(file, &cut_off)) framed += tf_record(record);
  EXPECT_FALSE(cut_off);
  EXPECT_EQ(framed, file);

  const auto events = read_events(file);
  ASSERT_EQ(events.size(), 3u);
  EXPECT_EQ(events[0].version, "brain.Event:2");
  EXPECT_EQ(events[0].wall_time, 1732780800.25);
  EXPECT_EQ(events[1].step, 5);
  EXPECT_EQ(events[1].session, 1u);
  EXPECT_EQ(events[2].step, 300);
  ASSERT_EQ(events[2].values.size(), 3u);
  EXPECT_EQ(events[2].values[0].description, "nats a token");
  EXPECT_EQ(events[2].values[0].plugin, "scalars");
  EXPECT_EQ(events[2].values[0].scalar, 2.5f);
  const auto& histogram = events[2].find("thresholds/layer_00")->histogram;
  EXPECT_EQ(histogram->sum_squares, 4.0625);
  EXPECT_EQ(histogram->limits, (std::vector<double>{0.5, 1.5}));
  EXPECT_EQ(histogram->buckets, (std::vector<double>{1, 2}));
  const auto& image = events[2].find("occupancy/active_share")->image;
  EXPECT_EQ(image->height, 48u);
  EXPECT_EQ(image->width, 72u);
  EXPECT_EQ(image->png, std::string("\x89PNG\x00\xff", 6));

  EXPECT_THROW(testing::read_records(std::string(file).replace(20, 1, "x")), std::runtime_error);
}

class EventFileTest : public ::testing::Test {
 protected:
  void SetUp() override { fs::create_directories(folder); }
  void TearDown() override { fs::remove_all(folder); }
  const std::string folder = (fs::temp_directory_path() / ("tessera_events_" + std::to_string(getpid()))).string();
};

TEST_F(EventFileTest, NumbersOfARowAreScalars) {
  EventFile file(folder, 7);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  file.append({{"step", 7}, {"loss", 2.25}, {"tile", {64, 64}}, {"skipped", false}, {"skipped_total", 3}, {"recall_at_8", 0.5}}, nullptr);
  file.append({{"step", 8},
               {"loss", nan},
               {"lr", 1e-3},
               {"validation", {{{"data", "my/data"}, {"share", 1.0}, {"loss", 2.5}, {"bits_per_byte", 1.25}, {"tokens", 10}}}}},
              nullptr);
  file.append({{"step", 9}, {"validation_accuracy", 0.75}, {"accuracy_by_distance", {{{"from", 8}, {"to", 15}, {"answers", 4}, {"accuracy", 0.25}}}}},
              nullptr);
  const auto events = read_events(read_file(file.path()));
  ASSERT_EQ(events.size(), 5u);
  EXPECT_EQ(events[0].version, "brain.Event:2");
  EXPECT_EQ(events[1].session, 1u);
  EXPECT_EQ(events[1].step, 7);
  for (const ReadEvent& event : events) EXPECT_NEAR(event.wall_time, static_cast<double>(time(nullptr)), 60);
  const auto scalars = [](const ReadEvent& event) {
    std::map<std::string, float> found;
    for (const ReadValue& value : event.values) found[value.tag] = value.scalar.value();
    return found;
  };
  EXPECT_EQ(events[2].step, 7);
  EXPECT_EQ(scalars(events[2]), (std::map<std::string, float>{{"train/loss", 2.25f}, {"train/skipped_steps", 3}, {"other/recall_at_8", 0.5f}}));
  EXPECT_EQ(events[2].find("train/loss")->description, "nats a target token, over the step");
  auto second = scalars(events[3]);
  EXPECT_TRUE(std::isnan(second["train/loss"]));
  EXPECT_EQ(events[2].find("train/loss")->plugin, "scalars");
  EXPECT_EQ(events[3].find("train/loss")->description, "");  // once a file
  second.erase("train/loss");
  EXPECT_EQ(second,
            (std::map<std::string, float>{{"train/lr", 1e-3f}, {"validation/my/data/loss", 2.5f}, {"validation/my/data/bits_per_byte", 1.25f}}));
  EXPECT_EQ(scalars(events[4]), (std::map<std::string, float>{{"validation/accuracy", 0.75f}, {"accuracy/distance_00008_to_00015", 0.25f}}));
}

TEST_F(EventFileTest, HeadsAreHistogramsLayersAndAnImage) {
  EventFile file(folder, 1);
  const double inf = std::numeric_limits<double>::infinity();
  EventFile::Heads heads;
  heads.layers = {{0.9, 0.25, 0}, {0.5, 0.125, 0}};
  heads.values = {{"active_share", {{0.5, 0.25, 1.0, 0.25}, {0, 0, 0, 0}}}, {"thresholds", {{-1.0, 2.0, 0.5, inf}, {inf, inf, inf, inf}}}};
  file.append({{"step", 1}, {"loss", 1.0}}, &heads);
  const auto events = read_events(read_file(file.path()));
  ASSERT_EQ(events.size(), 3u);
  const ReadEvent& event = events[2];
  EXPECT_EQ(event.find("edge_sparsity/layer_00")->scalar, 0.9f);
  EXPECT_EQ(event.find("tile_skip_rate/layer_01")->scalar, 0.125f);

  const auto& share = *event.find("active_share/layer_00")->histogram;
  EXPECT_EQ(share.min, 0.25);
  EXPECT_EQ(share.max, 1);
  EXPECT_EQ(share.num, 4);
  EXPECT_EQ(share.sum, 2);
  EXPECT_EQ(share.sum_squares, 0.25 + 0.0625 + 1 + 0.0625);
  ASSERT_EQ(share.limits.size(), 30u);
  ASSERT_EQ(share.buckets.size(), 30u);
  EXPECT_NEAR(share.limits[0], 0.275, 1e-12);
  EXPECT_EQ(share.limits[29], 1);
  for (int i = 0; i < 30; ++i) EXPECT_EQ(share.buckets[i], i == 0 ? 2 : i == 9 || i == 29 ? 1 : 0) << i;  // 0.5 = 0.25 + 0.75 * 10 / 30
  const auto& none = *event.find("active_share/layer_01")->histogram;
  EXPECT_EQ(none.limits, std::vector<double>{0});
  EXPECT_EQ(none.buckets, std::vector<double>{4});
  EXPECT_EQ(event.find("thresholds/layer_00")->histogram->num, 3);  // those that are finite
  EXPECT_EQ(event.find("thresholds/layer_01"), nullptr);
  EXPECT_EQ(event.find("active_share/layer_00")->plugin, "histograms");
  EXPECT_EQ(event.find("occupancy/active_share")->plugin, "images");
  EXPECT_EQ(event.find("occupancy/active_share")->image->width, 4u * 24);
  EXPECT_EQ(event.find("occupancy/active_share")->image->height, 2u * 24);
  EXPECT_EQ(event.find("occupancy/active_share")->image->colorspace, 3u);
}

TEST_F(EventFileTest, EachStartHasALaterName) {
  std::vector<std::string> names;
  write_file(folder + "/events.out.tfevents.9000000000.0041", "");  // by a clock that was ahead
  write_file(folder + "/events.out.tfevents.odd", "");
  write_file(folder + "/metrics.jsonl", "");
  for (int start = 0; start < 3; ++start) names.push_back(fs::path(EventFile(folder, 1).path()).filename());
  EXPECT_EQ(names, (std::vector<std::string>{"events.out.tfevents.9000000000.0042", "events.out.tfevents.9000000000.0043",
                                             "events.out.tfevents.9000000000.0044"}));
  fs::remove_all(folder);
  fs::create_directories(folder);
  const std::string first = fs::path(EventFile(folder, 1).path()).filename();
  EXPECT_EQ(first.size(), std::string("events.out.tfevents.1732780800.0000").size()) << first;
  EXPECT_TRUE(first.ends_with(".0000")) << first;
}

TEST_F(EventFileTest, WhatAKilledRunLeavesIsReadUpToTheLastWholeEvent) {
  EventFile file(folder, 1);
  std::vector<std::size_t> ends;
  for (int step = 1; step <= 3; ++step) {
    file.append({{"step", step}, {"loss", 1.0}}, nullptr);
    ends.push_back(fs::file_size(file.path()));
  }
  const std::string bytes = read_file(file.path());
  for (std::size_t size = ends[1]; size < ends[2]; ++size) {
    bool cut_off = false;
    const auto events = read_events(bytes.substr(0, size), &cut_off);
    ASSERT_EQ(events.size(), 4u) << size;
    EXPECT_EQ(cut_off, size > ends[1]) << size;
  }
}

TEST_F(EventFileTest, AFolderThatIsNotThereIsNamed) { EXPECT_THROW(EventFile(folder + "/none", 1), std::runtime_error); }

TEST(Occupancy, IsAPictureOfLayersAndHeads) {
  const PngImage image = occupancy_image({{1, 0, 1e-9}, {0.0101, 0.1, 0.5}});
  ASSERT_EQ(image.width, 72);
  ASSERT_EQ(image.height, 48);
  png_image png{};
  png.version = PNG_IMAGE_VERSION;
  ASSERT_TRUE(png_image_begin_read_from_memory(&png, image.bytes.data(), image.bytes.size())) << png.message;
  ASSERT_EQ(png.width, 72u);
  ASSERT_EQ(png.height, 48u);
  png.format = PNG_FORMAT_RGB;
  std::vector<std::uint8_t> pixels(PNG_IMAGE_SIZE(png));
  ASSERT_TRUE(png_image_finish_read(&png, nullptr, pixels.data(), 0, nullptr)) << png.message;
  // Matplotlib's viridis at the middle of levels 0, 12, 18, 22 and 23 of 24, four decades: 6 levels each.
  const std::uint32_t expected[2][3] = {{0xfde725, 0xafb8c1, 0x440154}, {0x20958c, 0x70ce57, 0xe1e41e}};
  for (int y = 0; y < 48; ++y)
    for (int x = 0; x < 72; ++x) {
      const std::uint8_t* p = &pixels[static_cast<std::size_t>(y * 72 + x) * 3];
      ASSERT_EQ(static_cast<std::uint32_t>(p[0] << 16 | p[1] << 8 | p[2]), expected[y / 24][x / 24]) << y << ' ' << x;
    }
  EXPECT_EQ(occupancy_image(std::vector<std::vector<double>>(600, std::vector<double>(20, 0.5))).height, 600);  // a pixel a head
}

}  // namespace
}  // namespace tessera
