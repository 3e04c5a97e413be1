// tessera attention on the GPU gives what it gives on the CPU, up to bf16: that the same tensors go in and come out. How exact the kernels are is
// tested in tests/kernels/cuda.

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <random>
#include <vector>

#include "data/hdf5_file.h"
#include "tests/cli/gpu.h"
#include "tests/cli/run_tessera.h"

namespace tessera {
namespace {

constexpr std::uint64_t B = 2, H = 2, T = 200, D = 64;

class AttentionOnGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (std::filesystem::temp_directory_path() / "tessera-attention-XXXXXX").string();
    ASSERT_TRUE(::mkdtemp(pattern.data()));
    folder = pattern;
  }
  void TearDown() override { std::filesystem::remove_all(folder); }

  void write_input(std::uint64_t head_size) const {
    std::mt19937_64 rng(7);
    std::normal_distribution<float> normal;
    auto file = Hdf5File::create(folder + "/in.h5");
    const Hdf5Shape shape = {B, H, T, head_size};
    for (const char* name : {"q", "k", "v", "do"}) {
      std::vector<float> x(B * H * T * head_size);
      for (float& e : x) e = std::bit_cast<float>(std::bit_cast<std::uint32_t>(normal(rng)) & 0xffff0000u);  // values that bf16 has
      file.write<float>(name, shape, x);
    }
    file.write<float>("tau", {H}, std::vector<float>{0.5f, 1.0f});
    file.write<float>("scale", {H}, std::vector<float>{8, 6});
    std::vector<float> gain(H * head_size);
    for (std::size_t n = 0; n < gain.size(); ++n) gain[n] = 1.0f + 0.01f * static_cast<float>(n % 17);
    file.write<float>("gain", {H, head_size}, gain);
    std::vector<std::int32_t> start(B * T);
    for (std::size_t n = 0; n < start.size(); ++n) start[n] = n % T < 90 ? 0 : 90;
    file.write<std::int32_t>("document_start", {B, T}, start);
    file.close();
  }

  Outcome run(const std::string& device, const std::string& options) const {
    return run_tessera("attention " + folder + "/in.h5 " + folder + "/" + device + ".h5 --set device=" + device + " " + options);
  }

  std::vector<float> read(const std::string& device, const std::string& name) const {
    const auto file = Hdf5File::open(folder + "/" + device + ".h5");
    return file.read<float>(name);
  }

  std::string folder;
};

TEST_F(AttentionOnGpu, OtherHeadSizesAndTilesAreTwo) {
  write_input(32);
  const Outcome size = run("cuda", "");
  EXPECT_EQ(size.code, 2);
  EXPECT_NE(size.err.find("dataset q: device cuda computes head sizes 64 and 128, found 32"), std::string::npos) << size.err;
  const Outcome tile = run("cuda", "--set attention.tile.query=32");
  EXPECT_EQ(tile.code, 2);
  EXPECT_NE(tile.err.find("device cuda computes tiles of 64 x 64"), std::string::npos) << tile.err;
  if (no_gpu().empty()) return;
  write_input(64);
  const Outcome none = run("cuda", "");
  EXPECT_EQ(none.code, 2);
  EXPECT_NE(none.err.find("device cuda: "), std::string::npos) << none.err;
}

TEST_F(AttentionOnGpu, AgreesWithTheCpu) {
  TESSERA_NEEDS_GPU();
  for (const std::uint64_t head_size : {64, 128}) {
    write_input(head_size);
    for (const std::string options :
         {"--set attention.epsilon=0.05", "--set attention.score=dot --set attention.gate=relu --set attention.normalizer=length",
          "--set attention.score=dot --set attention.gate=softmax", "--set attention.normalizer=rms --document-mask",
          "--visit all --set 'attention.pattern={window: {size: 70}}' --set attention.epsilon=0.05"}) {
      SCOPED_TRACE(options + ", head size " + std::to_string(head_size));
      for (const char* device : {"cpu", "cuda"}) {
        const Outcome outcome = run(device, options);
        ASSERT_EQ(outcome.code, 0) << outcome.err;
      }
      std::vector<std::string> names = {"o", "dq", "dk", "dv", "z"};
      const bool rms = options.find("rms") != std::string::npos;
      if (rms) names.push_back("dgain");
      for (const std::string& name : names) {
        const auto expected = read("cpu", name), found = read("cuda", name);
        ASSERT_EQ(found.size(), expected.size());
        double error = 0, size = 0;
        for (std::size_t n = 0; n < expected.size(); ++n) {
          error += std::pow(static_cast<double>(found[n]) - static_cast<double>(expected[n]), 2);
          size += std::pow(static_cast<double>(expected[n]), 2);
        }
        // bf16 has 8 bits: unit vectors are off by 2^-9 each, scores of 8 by as much of 8, squared gates by twice that. Normalizer rms divides a row
        // with hardly an active edge by its own small size, so that there the error of a gate counts in full; no epsilon bounds it.
        EXPECT_LT(std::sqrt(error / size), rms ? 0.06 : 0.03) << name;
      }
      const auto cpu = Hdf5File::open(folder + "/cpu.h5"), cuda = Hdf5File::open(folder + "/cuda.h5");
      for (const char* name : {"visible_edges", "visible_tiles"}) EXPECT_EQ(cuda.read<std::uint64_t>(name), cpu.read<std::uint64_t>(name)) << name;
      const auto visible = cpu.read<std::uint64_t>("visible_edges"), expected = cpu.read<std::uint64_t>("active_edges"),
                 found = cuda.read<std::uint64_t>("active_edges");
      for (std::size_t h = 0; h < H; ++h)
        EXPECT_NEAR(static_cast<double>(found[h]), static_cast<double>(expected[h]), 0.01 * static_cast<double>(visible[h])) << h;
    }
  }
}

}  // namespace
}  // namespace tessera
