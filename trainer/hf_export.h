#pragma once
// A checkpoint as a folder that Hugging Face's transformers loads.
//
//   model.safetensors        parameters under GPT-2's names, the embedding cut to the vocabulary
//   config.json, generation_config.json
//   tokenizer.json, ...      hf_tokenizer.h
//   configuration_tessera.py, modeling_tessera.py   unless it is a GPT-2
//
// What stock GPT-2 expresses exactly becomes one (model_type gpt2, GPT2LMHeadModel, linear weights [in, out] as its Conv1D has them). Any other model
// carries its PyTorch code (model/hf; trust_remote_code=True): linear weights [out, in], attn.c_gate among them, attn.scale, attn.threshold and
// attn.self_bias a number for each head, attn.sink_keys, sink_values [heads, sinks, head size] and sink_bias [heads, sinks].

#include <string>

#include "model/config.h"

namespace tessera {

enum class HfDtype {
  fp32,
  bf16  // matrices rounded to nearest even; everything else stays fp32
};

struct HfExport {
  std::string checkpoint;                  // its folder
  std::string model_type;                  // "gpt2" or "tessera"
  std::int64_t parameters = 0, bytes = 0;  // bytes: of the folder's files
};

/// Why stock GPT-2 is not this model: "attention.gate is relu2", ...; "" when it is.
std::string not_gpt2(const ModelConfig& model);

/// Writes `output`: whole or absent, in a folder beside it that is renamed at the end. `checkpoint`: see resolve_checkpoint(). Throws
/// std::invalid_argument when `output` is there and `overwrite` is not set, or it holds anything that is no export's.
HfExport export_hf(const std::string& checkpoint, const std::string& output, HfDtype dtype, bool overwrite);

}  // namespace tessera
