#pragma once
// A model in Hugging Face's format as a checkpoint: GPT-2 as it is published, and our own exports (hf_export.h).
//
// Of GPT-2: config.json of model_type gpt2; tensors with or without the prefix "transformer.", in model.safetensors or in the files of its index;
// linear weights [in, out]; the mask buffers attn.bias and attn.masked_bias are dropped; lm_head.weight must equal the embedding. What our model does
// not do is refused by name: another activation, another epsilon, an untied head, ...

#include <cstdint>
#include <string>

namespace tessera {

struct HfImport {
  std::string checkpoint;  // the folder written
  std::string model_type;  // "gpt2" or "tessera"
  std::string tokenizer;   // its name
  std::int64_t parameters = 0;
};

/// Writes a checkpoint of weights alone (checkpoint.h) as the folder `output`: whole or absent. tokenizer: a SPEC of load_tokenizer(), or "" for that
/// of the folder. Everything is checked before anything is written. Throws std::invalid_argument naming the file and the key or tensor, also when
/// `output` is there already.
HfImport import_hf(const std::string& directory, const std::string& output, const std::string& tokenizer = "");

}  // namespace tessera
