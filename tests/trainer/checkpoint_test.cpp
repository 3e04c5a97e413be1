// Checkpoints in one process: what is read back is what was written, on any number of ranks; what does not fit is refused by name.

#include "trainer/checkpoint.h"

#include <fmt/core.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "data/files.h"
#include "data/hdf5_file.h"
#include "data/tokenizer.h"
#include "tests/trainer/thread_ranks.h"
#include "trainer/device.h"
#include "trainer/open_checkpoint.h"
#include "trainer/run_folder.h"
#include "trainer/train_state.h"

namespace tessera {
namespace {

namespace fs = std::filesystem;

Config small_config() {
  Config c = load_config("", {"model.layers=1", "model.heads=2", "model.width=16", "model.context=16", "train.tokens_per_step=16",
                              "train.micro_batch=1", "attention.tile.query=16", "attention.tile.key=16"});
  resolve_vocabulary(c, 50, "the test");
  return c;
}

/// A model on one rank of several, allocated; the moments filled with what rank-independent functions of the flat offset say.
struct Rank {
  Rank(const Config& config, Communicator& comm) : ops(make_cpu_ops(1)), state(config, *ops, comm.rank(), comm.size()) {
    state.plan.allocate(*ops);
    state.bind(*ops, comm);
  }
  void fill() {
    state.initialize(7);
    std::vector<float> m, v;
    for (const auto& s : state.optimizer.segments()) {
      for (std::int64_t i = s.first; i < s.first + s.count; ++i) {
        m.push_back(0.5f + static_cast<float>(i));
        v.push_back(0.25f * static_cast<float>(i));
      }
    }
    ops->upload(state.optimizer.m(), m.data());
    ops->upload(state.optimizer.v(), v.data());
    const std::vector<float> tau{0.125f, -3.5f};
    ops->upload(state.model.thresholds(), tau.data());
    const std::vector<float> balances{1e-7f, -2e-6f};
    ops->upload(state.model.balances(), balances.data());
  }
  std::unique_ptr<Ops> ops;
  TrainState state;
};

class CheckpointTest : public ::testing::Test {
 protected:
  CheckpointTest() : folder(fs::temp_directory_path() / ("tessera_checkpoint_" + std::to_string(getpid()))) {
    fs::remove_all(folder);
    fs::create_directories(folder);
    load_tokenizer("bytes")->save(folder / "tokenizer.json");
  }
  ~CheckpointTest() override { fs::remove_all(folder); }

  CheckpointRequest request(std::int64_t step, int keep = 0) const {
    CheckpointRequest r;
    r.checkpoints = folder / "checkpoints";
    r.position = {step, step - 2, 16 * step, 2, 1};
    r.config = to_yaml(config);
    r.dataset = {"data/x", "bytes", "00ff", "1234", 257, 99};
    r.tokenizer = read_file(folder / "tokenizer.json");
    r.keep = keep;
    return r;
  }
  std::string save(int ranks, std::int64_t step, int keep = 0) const {
    testing::ThreadRanks::run(ranks, [&](Communicator& comm) {
      Rank rank(config, comm);
      rank.fill();
      save_checkpoint(request(step, keep), rank.state.model, rank.state.optimizer, *rank.ops, comm);
    });
    return folder / "checkpoints" / checkpoint_name(step);
  }

  fs::path folder;
  Config config = small_config();
};

TEST_F(CheckpointTest, ComesBackExactlyOnAnyNumberOfRanks) {
  for (const int wrote : {1, 2, 3}) {
    const std::string directory = save(wrote, 10 + wrote);
    EXPECT_TRUE(verify_checkpoint(directory).empty());
    for (const int reads : {1, 2, 3, 5}) {
      testing::ThreadRanks::run(reads, [&](Communicator& comm) {
        Rank expected(config, comm), rank(config, comm);
        expected.fill();
        load_model(directory, rank.state.model, *rank.ops);
        load_optimizer(directory, rank.state.model.layout(), rank.state.optimizer, *rank.ops);
        const auto same = [&](const Tensor& a, const Tensor& b) { return std::memcmp(a.data, b.data, a.bytes()) == 0; };
        EXPECT_TRUE(same(rank.state.model.weights(), expected.state.model.weights())) << wrote << " to " << reads;
        EXPECT_TRUE(same(rank.state.model.thresholds(), expected.state.model.thresholds()));
        EXPECT_TRUE(same(rank.state.model.balances(), expected.state.model.balances()));
        EXPECT_TRUE(same(rank.state.optimizer.m(), expected.state.optimizer.m())) << wrote << " to " << reads;
        EXPECT_TRUE(same(rank.state.optimizer.v(), expected.state.optimizer.v()));
      });
    }
  }
}

// A run that had none goes on with zeros, and one that has none any more needs no place for them.
TEST_F(CheckpointTest, BalancesAreOnlyThoseOfRunsThatHaveThem) {
  const std::string with = save(1, 11);
  config.model.attention.threshold.balance = 0;
  testing::ThreadRanks::run(1, [&](Communicator& comm) {
    Rank rank(config, comm);
    EXPECT_FALSE(rank.state.model.balances());
    EXPECT_FALSE(rank.state.model.threshold_gradients());
    load_model(with, rank.state.model, *rank.ops);
    save_checkpoint(request(12), rank.state.model, rank.state.optimizer, *rank.ops, comm);
  });
  const std::string without = folder / "checkpoints" / checkpoint_name(12);
  EXPECT_FALSE(Hdf5File::open(without + "/model.h5").contains("balances"));
  config = small_config();
  testing::ThreadRanks::run(1, [&](Communicator& comm) {
    Rank rank(config, comm);
    load_model(without, rank.state.model, *rank.ops);
    const auto* m = static_cast<const float*>(rank.state.model.balances().data);
    EXPECT_EQ(std::vector<float>(m, m + 2), std::vector<float>(2, 0.0f));
  });
}

// A run from before balances were made must not get them silently when it goes on.
TEST_F(CheckpointTest, ARunThatIsOlderThanAKeyGoesOnWithoutIt) {
  config.model.attention.threshold.balance = 0;
  CheckpointRequest old = request(5);
  const std::size_t at = old.config.find("    balance: ");
  ASSERT_NE(at, std::string::npos);
  old.config.erase(at, old.config.find('\n', at) + 1 - at);
  testing::ThreadRanks::run(1, [&](Communicator& comm) {
    Rank rank(config, comm);
    rank.state.initialize(7);
    save_checkpoint(old, rank.state.model, rank.state.optimizer, *rank.ops, comm);
  });
  const RunFolder run{folder};
  EXPECT_EQ(find_start(run, true, config, old.dataset).checkpoint, folder / "checkpoints" / checkpoint_name(5));
  try {
    find_start(run, true, small_config(), old.dataset);
    ADD_FAILURE() << "no error";
  } catch (const ConfigError& e) {
    EXPECT_NE(std::string(e.what()).find("attention.threshold.balance: 0.0 in the checkpoint, 0.1"), std::string::npos) << e.what();
  }
}

/// One file, as an older build wrote it for a rank that owned [first, first + count).
void write_format_1(const std::string& file, const ParameterLayout& layout, const std::string& hash, std::int64_t first, std::int64_t count) {
  Hdf5File h5 = Hdf5File::create(file);
  h5.set_attribute("format", 1);
  h5.set_attribute("step", 5);
  h5.set_attribute("first", first);
  h5.set_attribute("count", count);
  h5.set_attribute("parameters", layout.count);
  h5.set_attribute("layout", hash);
  std::vector<float> m, v;
  for (std::int64_t i = first; i < first + count; ++i) {
    m.push_back(0.5f + static_cast<float>(i));
    v.push_back(0.25f * static_cast<float>(i));
  }
  if (count > 0) {
    h5.write<float>("m", {m.size()}, m);
    h5.write<float>("v", {v.size()}, v);
  }
  h5.close();
}

TEST_F(CheckpointTest, OptimizersOfTheFirstFormatAreRead) {
  const std::string directory = save(3, 5);
  const auto file = [&](int rank) { return fmt::format("{}/optimizer_{:04}_of_0003.h5", directory, rank); };
  const std::string hash = Hdf5File::open(file(0)).string_attribute("layout");
  EXPECT_EQ(Hdf5File::open(file(0)).integer_attribute("format"), 2);
  EXPECT_EQ(Hdf5File::open(file(0)).info("segments").shape.at(1), 2u);
  const ParameterLayout layout = make_parameter_layout(config.model);
  const std::int64_t third = layout.count / 3 + 100;
  write_format_1(file(0), layout, hash, 0, third);
  write_format_1(file(1), layout, hash, third, layout.count - third);
  write_format_1(file(2), layout, hash, layout.count, 0);
  for (const int reads : {1, 2, 5}) {
    testing::ThreadRanks::run(reads, [&](Communicator& comm) {
      Rank expected(config, comm), rank(config, comm);
      expected.fill();
      load_optimizer(directory, layout, rank.state.optimizer, *rank.ops);
      const auto same = [&](const Tensor& a, const Tensor& b) { return std::memcmp(a.data, b.data, a.bytes()) == 0; };
      EXPECT_TRUE(same(rank.state.optimizer.m(), expected.state.optimizer.m())) << reads;
      EXPECT_TRUE(same(rank.state.optimizer.v(), expected.state.optimizer.v())) << reads;
    });
  }

  const auto alone = make_single_communicator();
  Rank rank(config, *alone);
  write_format_1(file(0), layout, hash, 0, third - 1);  // an element is missing
  EXPECT_THROW(load_optimizer(directory, layout, rank.state.optimizer, *rank.ops), std::runtime_error);
  write_format_1(file(0), layout, hash, 0, third);
  write_format_1(file(1), layout, hash, third + 1, layout.count - third);  // beyond the end
  EXPECT_THROW(load_optimizer(directory, layout, rank.state.optimizer, *rank.ops), std::runtime_error);
}

TEST_F(CheckpointTest, SaysWhatItIs) {
  const std::string directory = save(2, 12);
  const CheckpointInfo info = read_checkpoint_info(directory);
  EXPECT_EQ(info.position.step, 12);
  EXPECT_EQ(info.position.updates, 10);
  EXPECT_EQ(info.position.tokens, 192);
  EXPECT_EQ(info.position.skipped, 2);
  EXPECT_EQ(info.position.nonfinite_in_a_row, 1);
  EXPECT_EQ(info.ranks, 2);
  EXPECT_EQ(info.dataset.fingerprint, "1234");
  EXPECT_EQ(to_yaml(parse_config(info.config, "test", {})), to_yaml(config));
  // Others read the model without us: each parameter under its name and in its shape.
  const Hdf5File h5 = Hdf5File::open(directory + "/model.h5");
  EXPECT_EQ(h5.info("parameters/wte.weight").shape, (Hdf5Shape{64, 16}));
  EXPECT_EQ(h5.info("parameters/h.0.attn.c_attn.weight").shape, (Hdf5Shape{48, 16}));
  EXPECT_EQ(h5.read<float>("thresholds"), (std::vector<float>{0.125f, -3.5f}));
  EXPECT_EQ(h5.read<float>("balances"), (std::vector<float>{1e-7f, -2e-6f}));
}

TEST_F(CheckpointTest, OpensWhereItsDeviceIsNot) {
  config =
      load_config("", {"model.layers=1", "model.heads=1", "model.width=64", "model.context=16", "train.tokens_per_step=16", "train.micro_batch=1"});
  resolve_vocabulary(config, 257, "the test");
  const auto alone = make_single_communicator();
  CheckpointRequest r = request(5);
  Config trained = config;
  trained.device = "cuda";
  r.config = to_yaml(trained);
  r.dataset.tokenizer_hash = load_tokenizer("bytes")->hash();
  Rank rank(config, *alone);
  rank.fill();
  const std::string directory = save_checkpoint(r, rank.state.model, rank.state.optimizer, *rank.ops, *alone);
  const auto open = [&](const std::string& device) {
    return OpenCheckpoint(directory, OpenCheckpoint::Use::generate, {.threads = 1, .visit = "", .device = device}, *alone).notice;
  };
  EXPECT_EQ(open("cpu"), "");
  const std::string problem = device_problem("cuda");
  if (problem.empty()) {
    EXPECT_EQ(open(""), "");
    EXPECT_EQ(open("cuda"), "");
  } else {
    EXPECT_EQ(open(""), "trained on cuda, computed on cpu: " + problem);
    EXPECT_THROW(open("cuda"), ConfigError);
  }
}

TEST_F(CheckpointTest, KeepsTheNewestAndNeverCountsIncompleteOnes) {
  for (const int step : {5, 10, 15}) save(1, step);
  fs::remove(folder / "checkpoints/step_00000010/COMPLETE.json");
  fs::create_directories(folder / "checkpoints/step_00000099.tmp");
  fs::create_directories(folder / "checkpoints/notes");
  auto entries = list_checkpoints(folder / "checkpoints");
  ASSERT_EQ(entries.size(), 3u);
  EXPECT_FALSE(entries[1].complete);
  save(1, 20, 2);
  entries = list_checkpoints(folder / "checkpoints");
  std::vector<std::int64_t> complete;
  for (const auto& e : entries)
    if (e.complete) complete.push_back(e.step);
  EXPECT_EQ(complete, (std::vector<std::int64_t>{15, 20}));

  EXPECT_EQ(resolve_checkpoint(folder), (folder / "checkpoints/step_00000020").string());
  EXPECT_EQ(resolve_checkpoint(folder / "checkpoints"), (folder / "checkpoints/step_00000020").string());
  EXPECT_EQ(resolve_checkpoint(folder / "checkpoints/step_00000015"), (folder / "checkpoints/step_00000015").string());
  EXPECT_THROW(resolve_checkpoint(folder / "checkpoints/step_00000010"), std::invalid_argument);
  EXPECT_THROW(resolve_checkpoint(folder / "checkpoints/notes"), std::invalid_argument);
  EXPECT_THROW(resolve_checkpoint(folder / "none"), std::invalid_argument);
  EXPECT_TRUE(list_checkpoints(folder / "none").empty());
}

TEST_F(CheckpointTest, EachKindOfDamageIsNamed) {
  const std::string directory = save(2, 5);
  const auto says = [&](const std::string& text) {
    const auto problems = verify_checkpoint(directory);
    return std::any_of(problems.begin(), problems.end(), [&](const std::string& p) { return p.find(text) != std::string::npos; });
  };
  fs::remove(directory + "/tokenizer.json");
  EXPECT_TRUE(says("tokenizer.json: missing"));
  fs::resize_file(directory + "/optimizer_0001_of_0002.h5", 77);
  EXPECT_TRUE(says("optimizer_0001_of_0002.h5: 77 bytes"));
  std::string bytes = read_file(directory + "/model.h5");
  bytes[bytes.size() / 3] ^= 1;
  write_file(directory + "/model.h5", bytes);
  EXPECT_TRUE(says("model.h5: the contents do not match"));
  EXPECT_EQ(verify_checkpoint(directory).size(), 3u);
  for (const char* marker : {"", "{", "{\"format\": 1}", "{\"format\": 9, \"ranks\": 1, \"files\": []}", "[1]"}) {
    write_file(directory + "/COMPLETE.json", marker);
    ASSERT_EQ(verify_checkpoint(directory).size(), 1u) << marker;
    const std::string problem = verify_checkpoint(directory)[0];
    EXPECT_TRUE(problem.starts_with(directory + "/COMPLETE.json: ")) << problem;
    EXPECT_NE(
        problem.find(std::string(marker).find('9') == std::string::npos ? "expected a JSON object with" : "format 9, this build reads format 1"),
        std::string::npos)
        << problem;
    EXPECT_EQ(problem.find("json.exception"), std::string::npos) << problem;
    EXPECT_THROW(read_checkpoint_info(directory), std::runtime_error) << marker;
  }
}

TEST_F(CheckpointTest, OtherModelsAreRefused) {
  const std::string directory = save(1, 5);
  Config wider = config;
  wider.model.width = 32;
  const auto alone = make_single_communicator();
  Rank rank(wider, *alone);
  try {
    load_model(directory, rank.state.model, *rank.ops);
    ADD_FAILURE() << "nothing was thrown";
  } catch (const std::runtime_error& e) {
    EXPECT_NE(std::string(e.what()).find("model.h5: dataset parameters/"), std::string::npos) << e.what();
  }
  EXPECT_THROW(load_optimizer(directory, rank.state.model.layout(), rank.state.optimizer, *rank.ops), std::runtime_error);
}

TEST_F(CheckpointTest, EveryFlippedBitOfTheMarkerIsNoticed) {
  const std::string directory = save(2, 5), marker = directory + "/COMPLETE.json", sound = read_file(marker);
  for (std::size_t at = 0; at < sound.find("files"); ++at) {  // what follows are the checksums that other tests are about
    if (sound[at] == ' ' || sound[at] == '\n') continue;      // another blank means the same
    for (int bit = 0; bit < 8; ++bit) {
      std::string flipped = sound;
      flipped[at] = static_cast<char>(flipped[at] ^ (1 << bit));
      std::ofstream(marker, std::ios::binary) << flipped;
      EXPECT_FALSE(verify_checkpoint(directory).empty()) << flipped;
    }
  }
}

TEST_F(CheckpointTest, FoldersWithAbsurdNumbersAreNotCheckpoints) {
  save(1, 5);
  fs::create_directories(folder / "checkpoints/step_99999999999999999999999");
  EXPECT_EQ(list_checkpoints(folder / "checkpoints").size(), 1u);
}

TEST_F(CheckpointTest, AFailureOnOneRankLeavesNothing) {
  save(2, 5);
  testing::ThreadRanks::run(2, [&](Communicator& comm) {
    Rank rank(config, comm);
    rank.fill();
    CheckpointRequest r = request(6, 1);
    r.between_files = [&] {
      if (comm.rank() == 1) throw std::runtime_error("the disk is full");
    };
    EXPECT_THROW(save_checkpoint(r, rank.state.model, rank.state.optimizer, *rank.ops, comm), std::runtime_error);
    r.between_files = [&] {
      if (comm.rank() == 0) throw std::runtime_error("the disk is full");
    };
    EXPECT_THROW(save_checkpoint(r, rank.state.model, rank.state.optimizer, *rank.ops, comm), std::runtime_error);
  });
  const auto entries = list_checkpoints(folder / "checkpoints");
  ASSERT_EQ(entries.size(), 1u);
  EXPECT_TRUE(entries[0].complete && verify_checkpoint(entries[0].directory).empty());
  EXPECT_EQ(std::distance(fs::directory_iterator(folder / "checkpoints"), fs::directory_iterator()), 1);
}

}  // namespace
}  // namespace tessera
