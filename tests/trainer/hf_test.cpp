// Weights out and in: what PyTorch computed from exported models, and from GPT-2s of its own, is what the CPU backend computes; an export imports to
// the same parameters; what cannot be is refused by name.

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "data/safetensors.h"
#include "kernels/bf16.h"
#include "tests/trainer/hf_cases.h"
#include "trainer/device.h"
#include "trainer/hf_export.h"
#include "trainer/hf_import.h"
#include "trainer/hf_names.h"
#include "trainer/run_folder.h"

namespace tessera {
namespace {

namespace fs = std::filesystem;
using namespace testing;
using Json = nlohmann::ordered_json;

constexpr double kMostError = 1e-4;
const std::string kFixtures = TESSERA_FIXTURES "/hf/";

std::vector<float> tensor_of(const std::string& file, const std::string& name) {
  const SafetensorsFile opened(file);
  const SafetensorsEntry* entry = opened.find(name);
  if (!entry) throw std::runtime_error(file + ": no tensor " + name);
  std::vector<float> values(entry->elements());
  opened.read(*entry, values);
  return values;
}

class HfTest : public ::testing::Test {
 protected:
  HfTest() : folder(fs::temp_directory_path() / ("tessera_hf_" + std::to_string(getpid()))) {
    fs::remove_all(folder);
    fs::create_directories(folder);
  }
  ~HfTest() override { fs::remove_all(folder); }
  std::string path(const std::string& name) const { return folder / name; }

  std::string message(const std::function<void()>& body) const {
    try {
      body();
    } catch (const std::invalid_argument& e) {
      return e.what();
    }
    return "nothing was thrown";
  }

  /// A copy of the fixture gpt2 in which `change` may break something; the message of importing it. Nothing may be left beside.
  std::string import_broken(const std::function<void(Json& config, const std::string& directory)>& change) const {
    fs::remove_all(folder / "broken");
    fs::copy(kFixtures + "gpt2", folder / "broken");
    const std::string config = path("broken/config.json");
    Json json = Json::parse(read_file(config));
    change(json, path("broken"));
    write_file(config, json.dump());
    const std::string text = message([&] { import_hf(path("broken"), path("out"), "bytes"); });
    for (const auto& entry : fs::directory_iterator(folder)) EXPECT_EQ(entry.path().filename(), "broken");
    return text;
  }

  /// The parameters of two checkpoints, which must be of one layout: bit for bit, but for the padding of the embedding.
  void expect_same_parameters(const std::string& a, const std::string& b) const {
    const Config config = read_checkpoint(a).config, other = read_checkpoint(b).config;
    const ModelConfig& m = config.model;
    const StoredParameters x(a), y(b);
    for (const ParameterInfo& p : make_parameter_layout(m).parameters) {
      if (p.name == "wte.weight") {
        EXPECT_EQ(x.read_rows(p.name, m.vocabulary, m.width), y.read_rows(p.name, m.vocabulary, m.width));
      } else {
        EXPECT_EQ(x.read(p.name, p.shape), y.read(p.name, p.shape)) << p.name;
      }
    }
    EXPECT_EQ(make_parameter_layout(other.model).count, make_parameter_layout(m).count);
  }

  fs::path folder;
};

TEST_F(HfTest, AGpt2OfTransformersGivesItsLogits) {
  const std::vector<float> expected = tensor_of(kFixtures + "gpt2_logits.safetensors", "logits"),
                           ids = tensor_of(kFixtures + "gpt2_logits.safetensors", "tokens");
  const std::vector<std::int32_t> tokens(ids.begin(), ids.end());
  const HfImport imported = import_hf(kFixtures + "gpt2", path("gpt2"), "bytes");
  EXPECT_EQ(imported.model_type, "gpt2");
  EXPECT_EQ(verify_checkpoint(path("gpt2")), std::vector<std::string>{});
  EXPECT_LT(relative_error(hf_logits(path("gpt2"), tokens), expected, tokens.size()), kMostError);

  // The form in which GPT-2 was published holds the same.
  import_hf(kFixtures + "gpt2_published", path("published"), "bytes");
  expect_same_parameters(path("gpt2"), path("published"));

  // And what we export of it is what transformers saved, tensor for tensor.
  export_hf(path("gpt2"), path("again"), HfDtype::fp32, false);
  const SafetensorsFile theirs(kFixtures + "gpt2/model.safetensors"), ours(path("again/model.safetensors"));
  ASSERT_EQ(ours.entries().size(), theirs.entries().size());
  for (const SafetensorsEntry& e : theirs.entries()) {
    ASSERT_NE(ours.find(e.name), nullptr) << e.name;
    EXPECT_EQ(ours.find(e.name)->shape, e.shape) << e.name;
    EXPECT_EQ(tensor_of(ours.path(), e.name), tensor_of(theirs.path(), e.name)) << e.name;
  }
  const Json there = Json::parse(read_file(kFixtures + "gpt2/config.json")), here = Json::parse(read_file(path("again/config.json")));
  for (const char* key : {"model_type", "architectures", "n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "activation_function",
                          "layer_norm_epsilon", "tie_word_embeddings", "scale_attn_weights", "eos_token_id"})
    EXPECT_EQ(here.at(key), there.at(key)) << key;
}

TEST_F(HfTest, PyTorchComputedTheSameFromTheExports) {
  const std::string recorded = kFixtures + "logits.safetensors";
  const std::vector<float> ids = tensor_of(recorded, "tokens");
  const std::vector<std::int32_t> tokens = hf_tokens();
  ASSERT_TRUE(std::equal(tokens.begin(), tokens.end(), ids.begin(), ids.end())) << "the fixture is of other tokens: see check_export.py";
  for (const HfCase& c : hf_cases()) {
    make_hf_checkpoint(c, path(c.name));
    const auto found = c.name == "documents" ? hf_log_probabilities(path(c.name), tokens) : hf_logits(path(c.name), tokens);
    EXPECT_LT(relative_error(found, tensor_of(recorded, c.name), tokens.size(), 8), kMostError) << c.name;
  }
}

TEST_F(HfTest, AnExportImportsToTheSameParameters) {
  for (const HfCase& c : hf_cases()) {
    SCOPED_TRACE(c.name);
    make_hf_checkpoint(c, path(c.name));
    const HfExport e = export_hf(path(c.name), path(c.name + "-hf"), HfDtype::fp32, false);
    EXPECT_EQ(e.model_type, c.model_type);
    EXPECT_EQ(fs::exists(path(c.name + "-hf/modeling_tessera.py")), c.model_type == "tessera");
    fs::remove(path(c.name + ".mask.txt"));  // an import brings its own
    const HfImport i = import_hf(path(c.name + "-hf"), path(c.name + "-back"));
    EXPECT_EQ(i.tokenizer, "bytes");
    EXPECT_EQ(verify_checkpoint(path(c.name + "-back")), std::vector<std::string>{});
    write_file(path(c.name + ".mask.txt"), kHfMask);
    expect_same_parameters(path(c.name), path(c.name + "-back"));
    const CheckpointContents back = read_checkpoint(path(c.name + "-back")), first = read_checkpoint(path(c.name));
    const ModelConfig& m = first.config.model;
    const AttentionConfig& a = m.attention;
    if (a.gate != Gate::softmax && (a.threshold.mode == ThresholdMode::fixed || a.threshold.mode == ThresholdMode::controlled)) {
      EXPECT_EQ(StoredParameters(path(c.name)).thresholds(m.layers, m.heads), StoredParameters(path(c.name + "-back")).thresholds(m.layers, m.heads));
    }
    EXPECT_EQ(back.tokenizer->hash(), first.tokenizer->hash());
    EXPECT_EQ(back.info.ranks, 0);
    // Out again: the same bytes.
    export_hf(path(c.name + "-back"), path(c.name + "-again"), HfDtype::fp32, false);
    for (const auto& entry : fs::directory_iterator(path(c.name + "-hf"))) {
      const std::string name = entry.path().filename();
      if (name == "config.json") {  // but for where the mask lies, and tiles
        Json one = Json::parse(read_file(entry.path())), other = Json::parse(read_file(path(c.name + "-again/config.json")));
        for (Json* json : {&one, &other})
          if (json->contains("attention") && (*json)["attention"]["pattern"].contains("blocks"))
            (*json)["attention"]["pattern"]["blocks"].erase("file");
        EXPECT_EQ(one, other);
      } else {
        EXPECT_TRUE(read_file(entry.path()) == read_file(path(c.name + "-again/" + name))) << name;
      }
    }
  }
}

TEST_F(HfTest, Bf16RoundsMatricesAlone) {
  make_hf_checkpoint(hf_cases()[1], path("a"));
  export_hf(path("a"), path("hf"), HfDtype::bf16, false);
  const SafetensorsFile file(path("hf/model.safetensors"));
  EXPECT_EQ(file.metadata().at("format"), "pt");
  const ModelConfig m = read_checkpoint(path("a")).config.model;
  for (const ParameterInfo& p : make_parameter_layout(m).parameters) {
    EXPECT_EQ(file.find("transformer." + p.name)->dtype, p.decayed ? "BF16" : "F32") << p.name;
    std::vector<float> expected = hf_values(p);
    if (p.name == "wte.weight") expected.resize(static_cast<std::size_t>(m.vocabulary * m.width));
    for (float& v : expected)
      if (p.decayed) v = from_bf16(to_bf16(v));
    EXPECT_EQ(tensor_of(file.path(), "transformer." + p.name), expected) << p.name;
  }
  import_hf(path("hf"), path("back"));
  const ParameterInfo p = make_parameter_layout(m).find("h.0.mlp.c_fc.weight");
  EXPECT_EQ(StoredParameters(path("back")).read(p.name, p.shape), tensor_of(file.path(), "transformer." + p.name));
}

TEST_F(HfTest, ABpeTokenizerComesBack) {
  const auto bpe = load_tokenizer("bpe:" TESSERA_FIXTURES "/tokenizer/small.json");
  Config config = load_config("", {"model={layers: 1, heads: 1, width: 8, context: 16}", "train={tokens_per_step: 16, micro_batch: 1}"});
  resolve_vocabulary(config, bpe->vocabulary(), "the test");
  CheckpointRequest request;
  request.config = to_yaml(config);
  request.dataset = {"test", "bpe", bpe->hash(), "", bpe->vocabulary(), 0, {}};
  bpe->save(path("t.json"));
  request.tokenizer = read_file(path("t.json"));
  save_weights(path("a"), request, config.model, hf_values, {0.5f});
  export_hf(path("a"), path("hf"), HfDtype::fp32, false);
  import_hf(path("hf"), path("back"));
  EXPECT_EQ(read_checkpoint(path("back")).tokenizer->hash(), bpe->hash());
  fs::remove(path("hf/tokenizer.json"));  // vocab.json and merges.txt say the same
  import_hf(path("hf"), path("back2"));
  EXPECT_EQ(read_checkpoint(path("back2")).tokenizer->hash(), bpe->hash());
  fs::remove(path("hf/vocab.json"));
  EXPECT_NE(message([&] {
              import_hf(path("hf"), path("back3"));
            }).find("no tokenizer: expected tokenizer.json, or vocab.json and merges.txt; or name one with --tokenizer"),
            std::string::npos);
  EXPECT_NE(message([&] {
              import_hf(path("hf"), path("back3"), "bytes");
            }).find("config.json: vocab_size is 600, and the tokenizer of bytes has 257 tokens"),
            std::string::npos);
}

TEST_F(HfTest, WhatAGpt2OfOursIsNotIsRefusedByKey) {
  const std::vector<std::pair<std::string, Json>> changes = {{"activation_function", "relu"},
                                                             {"layer_norm_epsilon", 1e-6},
                                                             {"scale_attn_weights", false},
                                                             {"scale_attn_by_inverse_layer_idx", true},
                                                             {"add_cross_attention", true},
                                                             {"tie_word_embeddings", false},
                                                             {"n_layer", 0},
                                                             {"n_layer", "2"},
                                                             {"n_embd", 17},
                                                             {"n_inner", 63},
                                                             {"n_ctx", 23},
                                                             {"model_type", "llama"},
                                                             {"vocab_size", 258}};
  for (const auto& [key, value] : changes) {
    const std::string text = import_broken([&, k = key, v = value](Json& config, const std::string&) { config[k] = v; });
    EXPECT_TRUE(text.starts_with(path("broken/config.json: "))) << text;
    EXPECT_NE(text.find(key), std::string::npos) << text;
  }
  const std::string missing = import_broken([](Json& config, const std::string&) { config.erase("n_head"); });
  EXPECT_NE(missing.find("config.json: n_head is missing"), std::string::npos) << missing;
}

TEST_F(HfTest, TensorsThatDoNotFitAreNamed) {
  const auto rewrite = [&](const std::function<void(std::vector<SafetensorsTensor>&, std::map<std::string, std::string>&)>& change) {
    return import_broken([&](Json&, const std::string& directory) {
      const std::string file = directory + "/model.safetensors", bytes = read_file(file);
      std::vector<SafetensorsTensor> tensors;
      std::map<std::string, std::string> contents;
      {
        const SafetensorsFile opened(file);
        for (const SafetensorsEntry& e : opened.entries()) {
          tensors.push_back({e.name, e.dtype, e.shape});
          contents[e.name] = bytes.substr(e.first, e.bytes);
        }
      }
      change(tensors, contents);
      write_safetensors(file, tensors, {}, [&](std::size_t i) { return contents.at(tensors[i].name); });
    });
  };
  const std::string head = rewrite([](auto& tensors, auto& contents) {
    tensors.push_back({"lm_head.weight", "F32", {257, 16}});
    contents["lm_head.weight"] = contents.at("transformer.wte.weight");
    contents["lm_head.weight"][7] ^= 1;
  });
  EXPECT_NE(head.find("model.safetensors: lm_head.weight differs from wte.weight, first in element 1"), std::string::npos) << head;
  const std::string missing =
      rewrite([](auto& tensors, auto&) { std::erase_if(tensors, [](const auto& t) { return t.name == "transformer.h.1.ln_2.bias"; }); });
  EXPECT_NE(missing.find("tensor \"h.1.ln_2.bias\" is missing"), std::string::npos) << missing;
  const std::string shape = rewrite([](auto& tensors, auto&) {
    for (auto& t : tensors)
      if (t.name == "transformer.h.0.attn.c_attn.weight") std::swap(t.shape[0], t.shape[1]);
  });
  EXPECT_NE(shape.find("tensor \"transformer.h.0.attn.c_attn.weight\": shape [48, 16], expected [16,48]"), std::string::npos) << shape;
  const std::string unknown = rewrite([](auto& tensors, auto& contents) {
    tensors.push_back({"score.weight", "F32", {1}});
    contents["score.weight"] = "1234";
  });
  EXPECT_NE(unknown.find("tensor \"score.weight\": there is no such parameter"), std::string::npos) << unknown;
  const std::string twice = rewrite([](auto& tensors, auto& contents) {
    tensors.push_back({"ln_f.bias", "F32", {16}});
    contents["ln_f.bias"] = contents.at("transformer.ln_f.bias");
  });
  EXPECT_NE(twice.find("tensor \"ln_f.bias\" is there twice, with and without transformer."), std::string::npos) << twice;
  const std::string type = rewrite([](auto& tensors, auto&) {
    for (auto& t : tensors)
      if (t.name == "transformer.ln_f.bias") t.dtype = "I32";
  });
  EXPECT_NE(type.find("tensor \"transformer.ln_f.bias\": I32, expected F32, BF16, F16 or F64"), std::string::npos) << type;
}

TEST_F(HfTest, FoldersAreNotOverwrittenByChance) {
  make_hf_checkpoint(hf_cases()[1], path("a"));
  export_hf(path("a"), path("hf"), HfDtype::fp32, false);
  EXPECT_NE(message([&] {
              export_hf(path("a"), path("hf/"), HfDtype::fp32, false);
            }).find("already there; choose another --output, or replace it with --overwrite"),
            std::string::npos);
  EXPECT_NE(message([&] { import_hf(path("hf"), path("a")); }).find("already there"), std::string::npos);
  export_hf(path("a"), path("hf"), HfDtype::bf16, true);
  EXPECT_EQ(SafetensorsFile(path("hf/model.safetensors")).find("transformer.wte.weight")->dtype, "BF16");
  write_file(path("hf/notes.txt"), "mine");
  EXPECT_NE(message([&] { export_hf(path("a"), path("hf"), HfDtype::fp32, true); }).find("holds notes.txt, which is not of an export"),
            std::string::npos);
  EXPECT_EQ(read_file(path("hf/notes.txt")), "mine");
  EXPECT_NE(message([&] { export_hf(path("none"), path("x"), HfDtype::fp32, false); }).find("no such folder"), std::string::npos);
  EXPECT_FALSE(fs::exists(path("x")));
}

TEST_F(HfTest, WeightsAloneCannotBeResumed) {
  make_hf_checkpoint(hf_cases()[1], path("runs/a/checkpoints/step_00000000"));
  const CheckpointContents c = read_checkpoint(path("runs/a"));
  EXPECT_EQ(c.info.ranks, 0);
  EXPECT_EQ(verify_checkpoint(c.info.directory), std::vector<std::string>{});
  const std::string text = message([&] { find_start({path("runs/a")}, true, c.config, c.info.dataset); });
  EXPECT_NE(text.find("holds weights alone, without optimizer state. Start a new run from them: --set run.init="), std::string::npos) << text;
}

// With PyTorch: every case exported, loaded by transformers, compared whole. See check_export.py, which also records the fixture.
TEST_F(HfTest, TransformersLoadsEveryExport) {
  const char* named = std::getenv("TESSERA_PYTHON");
  const std::string python = named ? named : "python3";
  if (std::system((python + " -c 'import torch, transformers' >/dev/null 2>&1").c_str()) != 0)
    GTEST_SKIP() << "NOT TESTED: " << python << " has no torch and transformers (TESSERA_PYTHON names another)";
  const char* kept = std::getenv("TESSERA_HF_CASES");
  const std::string root = kept ? kept : path("cases");
  const std::string text = "It's 12 o'clock;\n\n\tna\xc3\xafve caf\xc3\xa9s  \xe4\xb8\xad\xe6\x96\x87 \xf0\x9f\x99\x82!\r\n";
  const std::vector<std::int32_t> tokens = hf_tokens();
  for (const HfCase& c : hf_cases()) {
    const std::string directory = root + "/" + c.name;
    fs::create_directories(directory);
    make_hf_checkpoint(c, path(c.name));
    export_hf(path(c.name), directory + "/model", HfDtype::fp32, false);
    write_file(directory + "/text.txt", text);
    const bool documents = c.name == "documents";
    std::map<std::string, std::vector<float>> values;
    values["tokens"].assign(tokens.begin(), tokens.end());
    values[documents ? "log_probabilities" : "logits"] = documents ? hf_log_probabilities(path(c.name), tokens) : hf_logits(path(c.name), tokens);
    for (const std::uint32_t token : load_tokenizer("bytes")->encode(text)) values["text_tokens"].push_back(static_cast<float>(token));
    std::vector<SafetensorsTensor> tensors;
    for (const auto& [name, v] : values) {
      const std::uint64_t rows = name == "text_tokens" ? v.size() : tokens.size();
      tensors.push_back({name, "F32", v.size() == rows ? std::vector<std::uint64_t>{rows} : std::vector<std::uint64_t>{rows, v.size() / rows}});
    }
    write_safetensors(directory + "/ours.safetensors", tensors, {}, [&](std::size_t i) {
      const std::vector<float>& v = values.at(tensors[i].name);
      return std::string(reinterpret_cast<const char*>(v.data()), v.size() * sizeof(float));
    });
  }
  const int status = std::system((python + " " + kFixtures + "check_export.py " + root).c_str());
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

}  // namespace
}  // namespace tessera
