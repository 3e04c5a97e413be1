#pragma once
// Tokenizers in the files that Hugging Face's transformers reads.

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "data/tokenizer.h"

namespace tessera {

/// tokenizer.json, tokenizer_config.json, and vocab.json + merges.txt where there are merges: name and contents. AutoTokenizer makes the same tokens
/// of them, but that it takes "<|endoftext|>" in a text for the special token. `file`: the tokenizer as Tokenizer::save() wrote it; context: tokens.
std::vector<std::pair<std::string, std::string>> hf_tokenizer_files(const std::string& file, std::int64_t context);

/// The tokenizer of a model's folder: tokenizer.json, else vocab.json + merges.txt, else vocab.bpe + encoder.json. What hf_tokenizer_files() made of
/// `bytes` is `bytes` again. Throws std::invalid_argument naming the folder or file.
std::unique_ptr<Tokenizer> read_hf_tokenizer(const std::string& directory);

}  // namespace tessera
