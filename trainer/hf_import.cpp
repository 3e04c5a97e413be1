#include "trainer/hf_import.h"

#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <regex>
#include <stdexcept>

#include "data/files.h"
#include "data/json_file.h"
#include "data/safetensors.h"
#include "trainer/checkpoint.h"
#include "trainer/hf_names.h"
#include "trainer/hf_tokenizer.h"
#include "trainer/schema.h"

namespace tessera {
namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;
namespace {

[[noreturn]] void fail(const std::string& where, const std::string& what) { throw std::invalid_argument(where + ": " + what); }

std::string shown(const Json& value) {
  const std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  return text.size() <= 100 ? text : text.substr(0, 97) + "...";
}

/// config.json with its keys checked as they are taken.
class HfConfig {
 public:
  explicit HfConfig(const std::string& directory) : file_(directory + "/config.json") {
    if (!fs::exists(file_)) fail(directory, "no config.json in this folder; expected a model as Hugging Face's transformers saves it");
    root_ = parse_json<Json>(read_file(file_), file_, UniqueKeys::yes);
    if (!root_.is_object()) fail(file_, "expected an object, found " + shown(root_));
  }
  const std::string& file() const { return file_; }
  bool contains(const char* key) const { return root_.contains(key); }
  const Json& at(const char* key) const {
    if (!contains(key)) fail(file_, fmt::format("{} is missing", key));
    return root_.at(key);
  }
  std::int64_t integer(const char* key) const {
    const Json& value = at(key);
    if (!value.is_number_unsigned() || value.get<std::uint64_t>() < 1 || value.get<std::uint64_t>() > (std::uint64_t{1} << 31))
      fail(file_, fmt::format("{}: expected an integer from 1 to 2^31, found {}", key, shown(value)));
    return value.get<std::int64_t>();
  }
  /// Where the key is there, it must be one of `allowed`.
  void require(const char* key, const std::vector<Json>& allowed) const {
    if (!contains(key) || std::find(allowed.begin(), allowed.end(), root_.at(key)) != allowed.end()) return;
    std::string list;
    for (const Json& value : allowed) list += (list.empty() ? "" : " or ") + value.dump();
    fail(file_, fmt::format("{}: expected {}, which is what this model computes, found {}", key, list, shown(root_.at(key))));
  }

 private:
  std::string file_;
  Json root_;
};

/// The configuration as our schema has it, model and attention.
Json gpt2_keys(const HfConfig& c) {
  c.require("activation_function", {"gelu_new", "gelu_pytorch_tanh"});  // two names of one function
  c.require("layer_norm_epsilon", {kHfNormEpsilon});
  c.require("scale_attn_weights", {true});
  c.require("scale_attn_by_inverse_layer_idx", {false});
  c.require("add_cross_attention", {false});
  c.require("tie_word_embeddings", {true});
  c.require("is_encoder_decoder", {false});
  const std::int64_t layers = c.integer("n_layer"), heads = c.integer("n_head"), width = c.integer("n_embd"), positions = c.integer("n_positions");
  c.require("n_ctx", {positions});
  const std::int64_t hidden = c.contains("n_inner") && !c.at("n_inner").is_null() ? c.integer("n_inner") : 4 * width;
  if (hidden % width != 0) fail(c.file(), fmt::format("n_inner: expected a multiple of n_embd {}, found {}", width, hidden));
  if (width % heads != 0 || width / heads % 8 != 0 || width / heads > 256)
    fail(c.file(), fmt::format("n_embd {} / n_head {} is a head size of {:.6g}; expected a multiple of 8 up to 256", width, heads,
                               static_cast<double>(width) / static_cast<double>(heads)));
  return {{"model",
           {{"layers", layers},
            {"heads", heads},
            {"width", width},
            {"context", positions},
            {"mlp_ratio", hidden / width},
            {"positions", "learned"},
            {"norm", "layernorm"},
            {"bias", true}}},
          {"attention", {{"score", "dot"}, {"gate", "softmax"}, {"normalizer", "none"}, {"threshold", {{"mode", "fixed"}}}}}};
}

Json tessera_keys(const HfConfig& c) {
  c.require("norm_epsilon", {kHfNormEpsilon});
  return {{"model",
           {{"layers", c.at("num_hidden_layers")},
            {"heads", c.at("num_attention_heads")},
            {"width", c.at("hidden_size")},
            {"context", c.at("max_position_embeddings")},
            {"mlp_ratio", c.at("mlp_ratio")},
            {"positions", c.at("positions")},
            {"rotary_base", c.at("rotary_base")},
            {"norm", c.at("norm")},
            {"bias", c.at("bias")}}},
          {"attention", c.at("attention")}};
}

/// Our configuration with these keys.
Config config_of(const Json& keys, const std::string& file) {
  try {
    return parse_config(keys.dump(), file, {});
  } catch (const ConfigError& e) {  // lines and columns are those of the text made here
    throw ConfigError(std::regex_replace(e.what(), std::regex(R"((config\.json):1:[0-9]+:)"), "$1:"));
  }
}

/// The block masks of an export as files, which the configuration names. They are read from a folder of their own, and lie in the checkpoint at the
/// end.
class MaskFiles {
 public:
  MaskFiles(const HfConfig& c, const std::string& output) : output_(output), aside_(fmt::format("{}.masks-{}", output, ::getpid())) {
    if (!c.contains("block_masks")) return;
    const Json& masks = c.at("block_masks");
    if (!masks.is_object()) fail(c.file(), "block_masks: expected an object, found " + shown(masks));
    for (const auto& [hash, mask] : masks.items()) {
      const bool good = hash.size() == 64 && hash.find_first_not_of("0123456789abcdef") == std::string::npos && mask.is_object() &&
                        mask.contains("block") && mask["block"].is_number_unsigned() && mask.contains("rows") && mask["rows"].is_array();
      if (!good) fail(c.file(), fmt::format("block_masks: expected {{SHA-256: {{block: tokens, rows: [...]}}}}, found {}", shown({{hash, mask}})));
      std::string text = fmt::format("block {}\n", mask["block"].get<std::uint64_t>());
      for (const Json& row : mask["rows"]) {
        if (!row.is_string()) fail(c.file(), fmt::format("block_masks: {}: expected rows of 0 and 1, found {}", hash, shown(row)));
        text += row.get<std::string>() + "\n";
      }
      files_.emplace_back(fmt::format("mask_{}.txt", hash), text);
    }
    if (files_.empty()) return;
    make_folder(aside_);
    for (const auto& [name, text] : files_) write_file(aside_ + "/" + name, text);
  }
  ~MaskFiles() {
    std::error_code ignored;
    if (!files_.empty()) fs::remove_all(aside_, ignored);
  }
  MaskFiles(const MaskFiles&) = delete;
  MaskFiles& operator=(const MaskFiles&) = delete;

  const std::vector<std::pair<std::string, std::string>>& files() const { return files_; }

  /// Names the files set aside in every pattern `blocks` of a configuration.
  void enter(Json& value) const {
    if (value.is_object() && value.contains("blocks") && value["blocks"].is_object() && value["blocks"].contains("sha256") &&
        value["blocks"]["sha256"].is_string())
      value["blocks"]["file"] = fmt::format("{}/mask_{}.txt", aside_, value["blocks"]["sha256"].get<std::string>());
    if (value.is_structured())
      for (Json& child : value) enter(child);
  }
  /// Names those of the checkpoint.
  void settle(PatternSpec& p) const {
    for (PatternSpec& child : p.children) settle(child);
    if (p.kind == PatternSpec::Kind::blocks) p.file = fmt::format("{}/mask_{}.txt", output_, hash_of(*p.mask));
  }

 private:
  std::string output_, aside_;
  std::vector<std::pair<std::string, std::string>> files_;
};

/// What Tokenizer::save() writes, by way of a file beside `output`.
std::string saved(const Tokenizer& tokenizer, const std::string& output) {
  const AtomicFile file(output + ".tokenizer");  // never committed: removed again
  tokenizer.save(file.temporary());
  return read_file(file.temporary());
}

bool is_mask_buffer(const std::string& name) {
  static const std::regex pattern(R"(h\.[0-9]+\.attn\.(bias|masked_bias))");
  return std::regex_match(name, pattern);
}

/// The tensors of a folder by the model's names.
class HfWeights {
 public:
  HfWeights(const std::string& directory, const std::vector<HfTensor>& wanted, bool gpt2) : folder_(directory) {
    std::map<std::string, const HfTensor*> by_name;
    for (const HfTensor& t : wanted) by_name.emplace(t.parameter, &t);
    for (const auto& [name, place] : folder_.tensors()) {
      const std::string plain = name.starts_with(kHfPrefix) ? name.substr(std::string_view(kHfPrefix).size()) : name;
      if (is_mask_buffer(plain) && gpt2) continue;
      const bool head = name == "lm_head.weight";
      if (!head && !by_name.contains(plain))
        fail(place.file->path(), fmt::format("tensor {}: there is no such parameter in the model that config.json describes", shown(name)));
      if (!places_.emplace(head ? name : plain, place).second)
        fail(place.file->path(), fmt::format("tensor {} is there twice, with and without {}", shown(plain), kHfPrefix));
      check_shape(*by_name.at(head ? "wte.weight" : plain), name, place);
    }
    for (const HfTensor& t : wanted)
      if (!places_.contains(t.parameter)) fail(directory, fmt::format("tensor {} is missing from the safetensors files", shown(t.parameter)));
  }

  std::vector<float> read(const HfTensor& t) const { return read_place(places_.at(t.parameter)); }

  /// Throws unless the classifier, where it is stored, is the embedding.
  void check_tied() const {
    const auto head = places_.find("lm_head.weight");
    if (head == places_.end()) return;
    const std::vector<float> a = read_place(head->second), b = read_place(places_.at("wte.weight"));
    const auto [first, other] = std::mismatch(a.begin(), a.end(), b.begin());
    if (first != a.end())
      fail(head->second.file->path(), fmt::format("lm_head.weight differs from wte.weight, first in element {} ({} and {}): expected a tied head",
                                                  first - a.begin(), *first, *other));
  }

 private:
  static std::vector<float> read_place(const SafetensorsFolder::Place& place) {
    std::vector<float> values(place.entry->elements());
    place.file->read(*place.entry, values);
    return values;
  }
  static void check_shape(const HfTensor& t, const std::string& name, const SafetensorsFolder::Place& place) {
    const auto& found = place.entry->shape;
    bool same = static_cast<int>(found.size()) == t.shape.rank;
    for (int i = 0; same && i < t.shape.rank; ++i) same = found[static_cast<std::size_t>(i)] == static_cast<std::uint64_t>(t.shape[i]);
    if (!same)
      fail(place.file->path(),
           fmt::format("tensor {}: shape {}, expected {} as config.json says", shown(name), place.entry->shape_text(), t.shape.str()));
    if (!SafetensorsFile::is_float(place.entry->dtype))
      fail(place.file->path(), fmt::format("tensor {}: {}, expected F32, BF16, F16 or F64", shown(name), place.entry->dtype));
  }

  SafetensorsFolder folder_;
  std::map<std::string, SafetensorsFolder::Place> places_;  // by plain name, and lm_head.weight
};

}  // namespace

HfImport import_hf(const std::string& directory, const std::string& output, const std::string& tokenizer_spec) {
  std::string target = output;
  while (target.size() > 1 && target.ends_with('/')) target.pop_back();
  if (fs::exists(fs::symlink_status(target))) fail(target, "already there; choose another --output");
  if (!fs::is_directory(directory)) fail(directory, "no such folder; expected a model as Hugging Face's transformers saves it");
  const HfConfig hf(directory);
  const Json type = hf.at("model_type");
  if (type != "gpt2" && type != "tessera")
    fail(hf.file(), fmt::format("model_type: expected \"gpt2\" or \"tessera\" (an export of ours), found {}", shown(type)));
  const bool gpt2 = type == "gpt2";

  const MaskFiles masks(hf, target);
  Json keys = gpt2 ? gpt2_keys(hf) : tessera_keys(hf);
  masks.enter(keys);
  const std::int64_t vocabulary = hf.integer("vocab_size");
  keys["model"]["vocabulary"] = vocabulary;
  if (const Json& context = keys["model"]["context"]; context.is_number_integer())  // evaluation takes micro-batches of this many
    keys["train"] = {{"micro_batch", 4}, {"tokens_per_step", 4 * context.get<std::int64_t>()}};
  Config config = config_of(keys, hf.file());

  const auto tokenizer = tokenizer_spec.empty() ? read_hf_tokenizer(directory) : load_tokenizer(tokenizer_spec);
  if (tokenizer->vocabulary() != vocabulary)
    fail(hf.file(), fmt::format("vocab_size is {}, and the tokenizer of {} has {} tokens: expected them equal. Another tokenizer: --tokenizer",
                                vocabulary, tokenizer_spec.empty() ? directory : tokenizer_spec, tokenizer->vocabulary()));

  const ModelConfig model = config.model;
  const std::vector<HfTensor> tensors = hf_tensors(model, gpt2);
  const HfWeights weights(directory, tensors, gpt2);
  weights.check_tied();

  std::map<std::string, const HfTensor*> of_parameter;
  std::vector<float> thresholds(static_cast<std::size_t>(model.layers) * static_cast<std::size_t>(model.heads));
  for (const HfTensor& t : tensors) {
    if (t.source == HfTensor::Source::parameter) {
      of_parameter.emplace(t.parameter, &t);
      continue;
    }
    const std::vector<float> values = weights.read(t);
    if (t.source == HfTensor::Source::thresholds) {
      std::copy(values.begin(), values.end(), thresholds.begin() + static_cast<std::ptrdiff_t>(t.layer) * model.heads);
    } else if (std::ranges::any_of(values, [&](float c) { return c != model.attention.scale_init; })) {
      fail(directory, fmt::format("tensor {}: expected attention.scale_init {} for every head, as attention.scale_learned is false", t.name,
                                  model.attention.scale_init));
    }
  }
  masks.settle(config.model.attention.pattern.base);
  for (auto& o : config.model.attention.pattern.overrides) masks.settle(o.pattern);

  CheckpointRequest request;
  request.config = to_yaml(config);
  request.dataset = {directory, tokenizer->name(), tokenizer->hash(), "", vocabulary, 0, {}};
  request.tokenizer = saved(*tokenizer, target);
  const auto values = [&](const ParameterInfo& p) {
    const HfTensor& t = *of_parameter.at(p.name);
    std::vector<float> v = weights.read(t);
    if (t.transposed) v = transposed(v, t.shape[0], t.shape[1]);
    v.resize(static_cast<std::size_t>(p.shape.numel()));  // the embedding's padding: zeros
    return v;
  };
  save_weights(target, request, model, values, thresholds, masks.files());
  return {target, gpt2 ? "gpt2" : "tessera", tokenizer->name(), make_parameter_layout(model).count};
}

}  // namespace tessera
