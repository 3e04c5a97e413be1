#include "trainer/hf_export.h"

#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>

#include "data/files.h"
#include "data/safetensors.h"
#include "kernels/bf16.h"
#include "trainer/hf_modeling.h"
#include "trainer/hf_names.h"
#include "trainer/hf_tokenizer.h"
#include "trainer/open_checkpoint.h"
#include "trainer/schema.h"

namespace tessera {
namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;
namespace {

const std::set<std::string> kFiles = {"model.safetensors", "config.json", "generation_config.json",   "tokenizer.json",     "tokenizer_config.json",
                                      "vocab.json",        "merges.txt",  "configuration_tessera.py", "modeling_tessera.py"};

/// What both kinds of config.json have.
Json common_config(const CheckpointContents& c, const char* dtype) {
  const std::uint32_t end = c.tokenizer->end_of_text();
  return {{"vocab_size", c.config.model.vocabulary}, {"bos_token_id", end}, {"eos_token_id", end}, {"pad_token_id", end}, {"torch_dtype", dtype}};
}

Json gpt2_config(const CheckpointContents& c, HfDtype dtype) {
  const ModelConfig& m = c.config.model;
  Json json{{"model_type", "gpt2"},
            {"architectures", {"GPT2LMHeadModel"}},
            {"n_layer", m.layers},
            {"n_head", m.heads},
            {"n_embd", m.width},
            {"n_positions", m.context},
            {"n_inner", m.width * m.mlp_ratio},
            {"activation_function", "gelu_new"},
            {"layer_norm_epsilon", kHfNormEpsilon},
            {"scale_attn_weights", true},
            {"tie_word_embeddings", true},
            {"attn_pdrop", 0.0},
            {"embd_pdrop", 0.0},
            {"resid_pdrop", 0.0}};
  json.update(common_config(c, dtype == HfDtype::bf16 ? "bfloat16" : "float32"));
  return json;
}

void collect_masks(const PatternSpec& p, Json& masks) {
  for (const PatternSpec& child : p.children) collect_masks(child, masks);
  if (p.kind != PatternSpec::Kind::blocks) return;
  Json rows = Json::array();
  for (std::int64_t r = 0; r < p.mask->rows; ++r) {
    std::string row;
    for (std::int64_t k = 0; k < p.mask->rows; ++k) row += p.mask->visible[static_cast<std::size_t>(r * p.mask->rows + k)] ? '1' : '0';
    rows.push_back(row);
  }
  masks[hash_of(*p.mask)] = {{"block", p.mask->block}, {"rows", rows}};
}

Json tessera_config(const CheckpointContents& c) {
  const ModelConfig& m = c.config.model;
  const Json keys = Json::parse(to_json(c.config));
  Json json{{"model_type", "tessera"},
            {"architectures", {"TesseraForCausalLM"}},
            {"auto_map", {{"AutoConfig", "configuration_tessera.TesseraConfig"}, {"AutoModelForCausalLM", "modeling_tessera.TesseraForCausalLM"}}},
            {"num_hidden_layers", m.layers},
            {"num_attention_heads", m.heads},
            {"hidden_size", m.width},
            {"max_position_embeddings", m.context},
            {"mlp_ratio", m.mlp_ratio},
            {"positions", keys["model"]["positions"]},
            {"rotary_base", keys["model"]["rotary_base"]},
            {"norm", keys["model"]["norm"]},
            {"norm_epsilon", kHfNormEpsilon},
            {"bias", m.bias},
            {"attention", keys["attention"]}};
  Json masks = Json::object();
  collect_masks(m.attention.pattern.base, masks);
  for (const auto& o : m.attention.pattern.overrides) collect_masks(o.pattern, masks);
  if (!masks.empty()) json["block_masks"] = masks;
  json.update(common_config(c, "float32"));  // whatever the weights are stored in: their thresholds are for sums in fp32
  json["end_of_text_id"] = c.tokenizer->end_of_text();
  json["use_cache"] = false;
  return json;
}

std::string as_f32(const std::vector<float>& values) { return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)}; }

std::string as_bf16(const std::vector<float>& values) {
  std::string bytes(values.size() * sizeof(std::uint16_t), '\0');
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::uint16_t narrow = to_bf16(values[i]);
    std::memcpy(bytes.data() + i * sizeof narrow, &narrow, sizeof narrow);
  }
  return bytes;
}

void write_weights(const std::string& file, const CheckpointContents& c, HfDtype dtype, bool gpt2) {
  const ModelConfig& m = c.config.model;
  const StoredParameters stored(c.info.directory);
  const std::vector<float> thresholds = stored.thresholds(m.layers, m.heads);
  const std::vector<HfTensor> tensors = hf_tensors(m, gpt2);
  std::vector<SafetensorsTensor> written;
  for (const HfTensor& t : tensors) {
    SafetensorsTensor w{t.name, t.matrix && dtype == HfDtype::bf16 ? "BF16" : "F32", {}};
    for (int i = 0; i < t.shape.rank; ++i) w.shape.push_back(static_cast<std::uint64_t>(t.shape[i]));
    written.push_back(std::move(w));
  }
  write_safetensors(file, written, {{"format", "pt"}}, [&](std::size_t i) {
    const HfTensor& t = tensors[i];
    std::vector<float> values;
    if (t.source == HfTensor::Source::thresholds) {
      const auto first = thresholds.begin() + static_cast<std::ptrdiff_t>(t.layer) * m.heads;
      values.assign(first, first + m.heads);
    } else if (t.source == HfTensor::Source::constant_scale) {
      values.assign(static_cast<std::size_t>(m.heads), m.attention.scale_init);
    } else {
      const bool padded = !t.transposed && t.shape != t.stored;  // the embedding, whose padding is left out
      values = padded ? stored.read_rows(t.parameter, t.shape[0], t.shape[1]) : stored.read(t.parameter, t.stored);
      if (t.transposed) values = transposed(values, t.stored[0], t.stored[1]);
    }
    return written[i].dtype == "BF16" ? as_bf16(values) : as_f32(values);
  });
}

/// Throws when `output` may not be replaced.
void check_output(const std::string& output, bool overwrite) {
  if (!fs::exists(fs::symlink_status(output))) return;
  if (!fs::is_directory(fs::symlink_status(output)))
    throw std::invalid_argument(output + ": there is something that is no folder; choose another --output");
  if (!overwrite) throw std::invalid_argument(output + ": already there; choose another --output, or replace it with --overwrite");
  for (const auto& entry : fs::directory_iterator(output)) {
    const std::string name = entry.path().filename();
    if (!kFiles.contains(name) || !entry.is_regular_file())
      throw std::invalid_argument(
          fmt::format("{}: holds {}, which is not of an export, so --overwrite does not replace it; choose another --output", output, name));
  }
}

}  // namespace

std::string not_gpt2(const ModelConfig& m) {
  const AttentionConfig& a = m.attention;
  if (a.gate != Gate::softmax) return "attention.gate is not softmax";
  if (a.score != Score::dot) return "attention.score is not dot";
  if (a.document_mask) return "attention.document_mask is set";
  if (a.output_gate) return "attention.output_gate is set";
  if (m.positions != Positions::learned) return "model.positions is not learned";
  if (m.norm != NormKind::layernorm) return "model.norm is not layernorm";
  if (!m.bias) return "model.bias is not set";
  for (int l = 0; l < m.layers; ++l)
    for (int h = 0; h < m.heads; ++h)
      if (describe(a.pattern.at(l, h)) != "causal") return fmt::format("attention.pattern of layer {}, head {} is not causal", l, h);
  return "";
}

HfExport export_hf(const std::string& checkpoint, const std::string& output, HfDtype dtype, bool overwrite) {
  std::string target = output;
  while (target.size() > 1 && target.ends_with('/')) target.pop_back();
  check_output(target, overwrite);
  const CheckpointContents c = read_checkpoint(checkpoint);
  require_text(c.info, "an export for transformers");
  const bool gpt2 = not_gpt2(c.config.model).empty();
  HfExport result{c.info.directory, gpt2 ? "gpt2" : "tessera", c.info.parameters, 0};

  const std::string aside = fmt::format("{}.tmp-{}", target, ::getpid()), old = fmt::format("{}.old-{}", target, ::getpid());
  make_folder(aside);
  try {
    const auto write = [&](const std::string& name, const std::string& contents) { write_file(aside + "/" + name, contents); };
    write("config.json", (gpt2 ? gpt2_config(c, dtype) : tessera_config(c)).dump(2) + "\n");
    const std::uint32_t end = c.tokenizer->end_of_text();
    write("generation_config.json", Json{{"bos_token_id", end}, {"eos_token_id", end}, {"pad_token_id", end}, {"use_cache", gpt2}}.dump(2) + "\n");
    for (const auto& [name, contents] : hf_tokenizer_files(c.info.directory + "/tokenizer.json", c.config.model.context)) write(name, contents);
    if (!gpt2) {
      write("configuration_tessera.py", kConfigurationFile);
      write("modeling_tessera.py", kModelingFile);
    }
    write_weights(aside + "/model.safetensors", c, dtype, gpt2);
    for (const auto& entry : fs::directory_iterator(aside)) result.bytes += static_cast<std::int64_t>(entry.file_size());
    sync_folder(aside);
    check_output(target, overwrite);  // it may have come into being
    const bool replaces = fs::exists(target);
    if (replaces) fs::rename(target, old);
    fs::rename(aside, target);
    sync_folder(folder_of(target));
    if (replaces) fs::remove_all(old);
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(aside, ignored);
    throw;
  }
  return result;
}

}  // namespace tessera
