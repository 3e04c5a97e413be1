// tessera attention end to end: a file in, the binary, a file out, compared with the double-precision reference, which here gets the unit-length map
// and the head norm as well.

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <random>

#include "data/hdf5_file.h"
#include "tests/cli/run_tessera.h"
#include "tests/kernels/attention_cases.h"

namespace tessera {
namespace {

using reference::AttentionInputs;
using Doubles = std::vector<double>;
using Floats = std::vector<float>;

constexpr std::uint64_t B = 2, H = 2, T = 45, D = 16;

class AttentionCommand : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (std::filesystem::temp_directory_path() / "tessera-attention-XXXXXX").string();
    ASSERT_TRUE(::mkdtemp(pattern.data()));
    folder = pattern;
    std::mt19937_64 rng(5);
    std::normal_distribution<float> normal;
    for (auto* x : {&q, &k, &v, &d_o}) {
      x->resize(B * H * T * D);
      for (float& e : *x) e = normal(rng);
    }
  }
  void TearDown() override { std::filesystem::remove_all(folder); }

  std::string in() const { return folder + "/in.h5"; }
  std::string out() const { return folder + "/out.h5"; }

  /// IN.h5 with q k v do, and what `more` adds.
  template <class F>
  void write_input(F&& more) const {
    auto file = Hdf5File::create(in());
    const Hdf5Shape shape = {B, H, T, D};
    file.write<float>("q", shape, q);
    file.write<float>("k", shape, k);
    file.write<float>("v", shape, v);
    file.write<float>("do", shape, d_o);
    more(file);
    file.close();
  }
  Outcome run(const std::string& options) const { return run_tessera("attention " + in() + " " + out() + " " + options); }

  std::string folder;
  Floats q, k, v, d_o;
};

Doubles widen(const Floats& x) { return {x.begin(), x.end()}; }

Doubles unit_rows(const Doubles& x) {
  Doubles y = x;
  for (std::size_t row = 0; row < x.size(); row += D) {
    double sum = 0;
    for (std::size_t d = 0; d < D; ++d) sum += x[row + d] * x[row + d];
    for (std::size_t d = 0; d < D; ++d) y[row + d] /= std::sqrt(sum);
  }
  return y;
}

/// Gradient of x where y = x / |x| and dy is y's.
Doubles through_unit_rows(const Doubles& x, const Doubles& y, const Doubles& dy) {
  Doubles dx(x.size());
  for (std::size_t row = 0; row < x.size(); row += D) {
    double sum = 0, along = 0;
    for (std::size_t d = 0; d < D; ++d) {
      sum += x[row + d] * x[row + d];
      along += y[row + d] * dy[row + d];
    }
    for (std::size_t d = 0; d < D; ++d) dx[row + d] = (dy[row + d] - y[row + d] * along) / std::sqrt(sum);
  }
  return dx;
}

Floats read(const Hdf5File& file, const std::string& name, const Hdf5Shape& shape) {
  Floats x(file.info(name).elements());
  file.read<float>(name, shape, x);
  return x;
}

constexpr double kTolerance = 1e-4;

TEST_F(AttentionCommand, EveryScoreGateAndNormalizerAgreesWithTheReference) {
  const char* scores[] = {"dot", "cosine", "fidelity"};
  const char* gates[] = {"relu", "relu2", "relu4", "softmax"};
  const char* normalizers[] = {"none", "length", "sum"};
  const Floats tau = {0.05f, 0.1f}, scale = {6.0f, 9.0f};
  for (int score = 0; score < 3; ++score)
    for (int gate = 0; gate < 4; ++gate)
      for (int normalizer = 0; normalizer < 3; ++normalizer) {
        if (gate == 3 && normalizer > 0) continue;
        write_input([&](Hdf5File& file) {
          if (gate != 3) file.write<float>("tau", {H}, tau);
          if (score != 0) file.write<float>("scale", {H}, scale);
        });
        const auto settings = std::string("--set attention.score=") + scores[score] + " --set attention.gate=" + gates[gate] +
                              " --set attention.normalizer=" + normalizers[normalizer] +
                              " --set attention.epsilon=0.05 --set attention.tile.query=16 --set attention.tile.key=24" +
                              " --set 'attention.pattern={window: {size: 30}}'";
        SCOPED_TRACE(settings);
        const auto outcome = run(settings);
        ASSERT_EQ(outcome.code, 0) << outcome.err;
        EXPECT_EQ(outcome.err.find("dataset"), std::string::npos) << outcome.err;  // all of them were used

        AttentionInputs inputs;
        inputs.shape = {.batch = B, .heads = H, .tokens = T, .head_size = D};
        inputs.math = {
            .score = Score(score), .gate = Gate(gate), .normalizer = gate == 3 ? Normalizer::none : Normalizer(normalizer), .epsilon = 0.05f};
        const bool unit = score != 0;
        const auto raw_q = widen(q), raw_k = widen(k);
        inputs.q = unit ? unit_rows(raw_q) : raw_q;
        inputs.k = unit ? unit_rows(raw_k) : raw_k;
        inputs.v = widen(v);
        inputs.scale = unit ? widen(scale) : Doubles(H, 1 / std::sqrt(double{D}));
        inputs.tau = widen(tau);
        inputs.visible = [](auto, auto, auto i, auto j) { return i - j < 30; };
        const auto expected = reference::attention_forward(inputs);
        auto gradients = reference::attention_backward(inputs, expected, widen(d_o));
        const auto tiles = reference::attention_tiles(inputs, 16, 24);
        if (unit) {
          gradients.dq = through_unit_rows(raw_q, inputs.q, gradients.dq);
          gradients.dk = through_unit_rows(raw_k, inputs.k, gradients.dk);
        }

        const auto file = Hdf5File::open(out());
        const Hdf5Shape whole = {B, H, T, D};
        EXPECT_LT(reference::relative_error(read(file, "o", whole), expected.o), kTolerance);
        EXPECT_LT(reference::relative_error(read(file, "z", {B, H, T}), expected.z), kTolerance);
        EXPECT_LT(reference::relative_error(read(file, "dq", whole), gradients.dq), kTolerance);
        EXPECT_LT(reference::relative_error(read(file, "dk", whole), gradients.dk), kTolerance);
        EXPECT_LT(reference::relative_error(read(file, "dv", whole), gradients.dv), kTolerance);
        EXPECT_LT(reference::relative_error(read(file, "dtau", {H}), gradients.dtau), kTolerance);
        EXPECT_LT(reference::relative_error(read(file, "dscale", {H}), gradients.dscale), kTolerance);
        EXPECT_EQ(file.read<std::uint64_t>("active_edges"), expected.active_edges);
        EXPECT_EQ(file.read<std::uint64_t>("visible_edges"), expected.visible_edges);
        EXPECT_EQ(file.read<std::uint64_t>("empty_rows"), expected.empty_rows);
        EXPECT_EQ(file.read<std::uint64_t>("active_tiles"), tiles.active_tiles);
        EXPECT_EQ(file.read<std::uint64_t>("visible_tiles"), tiles.visible_tiles);
        EXPECT_EQ(file.info("tile_map").shape, (Hdf5Shape{B, H, 3, 2}));
        const auto tile_map = file.read<std::uint8_t>("tile_map");
        for (std::size_t n = 0; n < tile_map.size(); ++n) EXPECT_EQ(tile_map[n], (tiles.bitmap[n / 2] >> (n % 2)) & 1u) << n;
      }
}

// rms: o = u / rms(u) * gain, and the gradients through it by finite differences of that formula on the reference's sums.
TEST_F(AttentionCommand, HeadNorm) {
  Floats gain(H * D);
  for (std::size_t n = 0; n < gain.size(); ++n) gain[n] = 0.5f + 0.1f * static_cast<float>(n % 7);
  write_input([&](Hdf5File& file) { file.write<float>("gain", {H, D}, gain); });
  const auto outcome = run("--set attention.normalizer=rms --set attention.threshold.init=0.5 --json");
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_EQ(outcome.out.front(), '{');

  AttentionInputs inputs;
  inputs.shape = {.batch = B, .heads = H, .tokens = T, .head_size = D};
  inputs.math = {.score = Score::cosine, .gate = Gate::relu2, .normalizer = Normalizer::rms};
  const auto raw_q = widen(q);
  inputs.q = unit_rows(raw_q);
  inputs.k = unit_rows(widen(k));
  inputs.v = widen(v);
  inputs.scale = Doubles(H, 8.0);
  inputs.tau = Doubles(H, 0.5);
  inputs.visible = [](auto, auto, auto, auto) { return true; };
  const auto sums = reference::attention_forward(inputs);
  Doubles o(sums.o.size()), d_sum(sums.o.size()), d_gain(H * D);
  for (std::size_t row = 0; row < o.size(); row += D) {
    const std::size_t h = row / D / T % H;
    const double* u = &sums.o[row];
    const auto rms = [&](std::size_t moved, double step) {
      double sum = 0;
      for (std::size_t d = 0; d < D; ++d) sum += (u[d] + (d == moved ? step : 0)) * (u[d] + (d == moved ? step : 0));
      return std::sqrt(sum / D + 1e-5);
    };
    const auto value = [&](std::size_t moved, double step) {  // <do, o> with one element of u moved
      double sum = 0;
      for (std::size_t d = 0; d < D; ++d) sum += double{d_o[row + d]} * gain[h * D + d] * (u[d] + (d == moved ? step : 0)) / rms(moved, step);
      return sum;
    };
    for (std::size_t d = 0; d < D; ++d) {
      o[row + d] = u[d] / rms(D, 0) * gain[h * D + d];
      d_gain[h * D + d] += double{d_o[row + d]} * u[d] / rms(D, 0);
      const double step = 1e-5 * rms(D, 0);
      d_sum[row + d] = (value(d, step) - value(d, -step)) / (2 * step);
    }
  }
  const auto gradients = reference::attention_backward(inputs, sums, d_sum);

  const auto file = Hdf5File::open(out());
  const Hdf5Shape whole = {B, H, T, D};
  EXPECT_LT(reference::relative_error(read(file, "o", whole), o), kTolerance);
  EXPECT_LT(reference::relative_error(read(file, "dgain", {H, D}), d_gain), kTolerance);
  EXPECT_LT(reference::relative_error(read(file, "dv", whole), gradients.dv), kTolerance);
  EXPECT_LT(reference::relative_error(read(file, "dq", whole), through_unit_rows(raw_q, inputs.q, gradients.dq)), kTolerance);
}

TEST_F(AttentionCommand, VisitAllAndActiveGiveTheSameFileContents) {
  write_input([](Hdf5File& file) {
    std::vector<std::int32_t> start(B * T);
    for (std::size_t n = 0; n < start.size(); ++n) start[n] = static_cast<std::int32_t>(n % T < 20 ? 0 : n % T < 21 ? 20 : 21);
    file.write<std::int32_t>("document_start", {B, T}, start);
  });
  const std::string settings = "--document-mask --set attention.threshold.init=6 --set attention.tile.query=16 --set attention.tile.key=16 --visit ";
  ASSERT_EQ(run(settings + "all").code, 0);
  std::filesystem::rename(out(), folder + "/all.h5");
  ASSERT_EQ(run(settings + "active").code, 0);
  const auto all = Hdf5File::open(folder + "/all.h5"), active = Hdf5File::open(out());
  ASSERT_EQ(all.datasets(), active.datasets());
  for (const auto& name : all.datasets()) {
    if (all.info(name).type != Hdf5Type::f32) continue;
    const auto x = all.read<float>(name), y = active.read<float>(name);
    EXPECT_EQ(std::memcmp(x.data(), y.data(), x.size() * sizeof(float)), 0) << name;
  }
  const auto active_tiles = active.read<std::uint64_t>("active_tiles"), visible_tiles = active.read<std::uint64_t>("visible_tiles");
  EXPECT_LT(active_tiles[0], visible_tiles[0]);
  EXPECT_EQ(active.read<std::uint64_t>("visible_edges")[0], B * (20 * 21 / 2 + 1 + 24 * 25 / 2));
}

TEST_F(AttentionCommand, ClearErrors) {
  const auto rejects = [&](const std::string& options, const std::string& part) {
    const auto outcome = run(options);
    EXPECT_EQ(outcome.code, 2) << outcome.err;
    EXPECT_NE(outcome.err.find(part), std::string::npos) << "expected: " << part << "\nfound: " << outcome.err;
    EXPECT_FALSE(std::filesystem::exists(out()));
  };
  const auto nothing = [](Hdf5File&) {};
  rejects("", "in.h5");  // no such file
  std::filesystem::create_directory(in());
  rejects("", "in.h5: is a folder, expected an HDF5 file");
  std::filesystem::remove(in());
  write_input(nothing);
  rejects("--document-mask", "there is no dataset document_start; expected int32 [2, 45]");
  rejects("--visit some", "--visit");
  rejects("--set train.steps=3", "tessera attention takes the keys attention.*");
  rejects("--set attention.gat=relu", "attention.gate");  // the nearest key
  write_input([](Hdf5File& file) { file.write<float>("tau", {3}, Floats(3, 0.0f)); });
  rejects("", "dataset tau: expected the shape [2], found [3]");
  write_input([](Hdf5File& file) { file.write<double>("scale", {2}, Doubles(2, 1.0)); });
  rejects("", "dataset scale: expected float32, found float64");
  write_input([](Hdf5File& file) { file.write<std::int32_t>("document_start", {B, T}, std::vector<std::int32_t>(B * T, 7)); });
  rejects("--document-mask", "dataset document_start: element [0, 0] is 7; expected 0");

  q[D * T + 3] = std::nanf("");
  write_input(nothing);
  rejects("", "dataset q: element [0, 1, 0, 3] is nan; expected finite numbers");

  auto file = Hdf5File::create(in());
  file.write<float>("q", {1, 1, 2, 8}, Floats(16));
  file.write<float>("k", {1, 1, 2, 8}, Floats(16));
  file.close();
  rejects("", "there is no dataset v; expected q, k, v and do, float32 [B, H, T, D]");
  file = Hdf5File::create(in());
  file.write<float>("q", {1, 2, 8}, Floats(16));
  file.close();
  rejects("", "dataset q: expected a shape [B, H, T, D], all at least 1; found [1, 2, 8]");
  file = Hdf5File::create(in());
  file.write<float>("q", {1, 1, 2, 12}, Floats(24));
  file.close();
  rejects("", "dataset q: expected a head size D that is a multiple of 8, up to 256; found 12");
}

TEST_F(AttentionCommand, FilesThatCannotBeWritten) {
  write_input([](Hdf5File&) {});
  auto outcome = run_tessera("attention " + in() + " " + folder + "/none/out.h5");
  EXPECT_EQ(outcome.code, 2);
  EXPECT_NE(outcome.err.find("none does not exist"), std::string::npos) << outcome.err;
  outcome = run_tessera("attention " + in() + " " + folder);
  EXPECT_EQ(outcome.code, 2);
  EXPECT_NE(outcome.err.find("expected a file to write, found a folder"), std::string::npos) << outcome.err;
  outcome = run_tessera("attention " + in() + " " + in());
  EXPECT_EQ(outcome.code, 2);
  EXPECT_NE(outcome.err.find("the same file"), std::string::npos) << outcome.err;
  // A failing run leaves an earlier result as it was.
  ASSERT_EQ(run("").code, 0);
  const auto size = std::filesystem::file_size(out());
  ASSERT_EQ(run_tessera("attention " + in() + " " + out(), "ulimit -f 1; trap '' XFSZ; ").code, 1);
  EXPECT_EQ(std::filesystem::file_size(out()), size);
  std::size_t files = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder)) ++files;
  EXPECT_EQ(files, 2u);  // in.h5, out.h5: nothing half-written
}

TEST_F(AttentionCommand, DatasetsWithoutEffectAreNamed) {
  write_input([](Hdf5File& file) { file.write<float>("scale", {H}, Floats(H, 1.0f)); });
  const auto outcome = run("--set attention.score=dot");
  EXPECT_EQ(outcome.code, 0);
  EXPECT_NE(outcome.err.find("dataset scale has no effect here"), std::string::npos) << outcome.err;
}

}  // namespace
}  // namespace tessera
