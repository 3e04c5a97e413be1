#pragma once
// What an input file is, and which files a command line means.
//
//   .txt .text .md .rst, none   text: one document, or several with a line `<|endoftext|>` between them; plain, gzip or Zstandard
//   .jsonl .ndjson              an object a line, its text under one key; plain, gzip or Zstandard
//   .parquet                    a table with a column of texts (parquet_source.h); its content begins with PAR1
//   .bin                        tokens (token_files.h): llm.c and modded-nanogpt (content: magic 20240520 or 20240801), Megatron (a .idx that begins
//                               with MMIDIDX beside it). nanoGPT's .bin has no header, so that nothing but --format nanogpt can say it is one
//
// Content decides where it can (PAR1, the magic numbers), else the extension. Standard input is text, unless it begins with a JSON object (the reader
// looks) or --format says what it is.

#include <string>
#include <vector>

namespace tessera {

enum class InputFormat { automatic, text, jsonl, parquet, llmc, nanogpt, megatron };

/// "auto", "txt", "jsonl", "parquet", "llmc", "nanogpt" or "megatron"; throws std::invalid_argument for another name.
InputFormat input_format(const std::string& name);
std::string to_string(InputFormat format);
/// Whether such a file holds tokens, so that nothing is left to tokenize.
bool is_tokenized(InputFormat format);

/// What `path` is; `wanted` unless that is automatic. Throws std::invalid_argument when neither content nor extension says.
InputFormat format_of(const std::string& path, InputFormat wanted);

/// Files of the arguments, in order: a file itself, a folder's files (recursively, sorted, those whose extension fits), a pattern's matches
/// (* ? [...], sorted; files and folders). A Megatron pair is one file, named by its .bin. "-" is standard input. The order is that of the names,
/// whatever the file system's. Throws std::invalid_argument when one is missing or yields no file.
std::vector<std::string> expand_inputs(const std::vector<std::string>& inputs, InputFormat wanted = InputFormat::automatic);

}  // namespace tessera
