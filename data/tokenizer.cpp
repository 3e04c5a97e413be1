#include "data/tokenizer.h"

#include <fmt/core.h>

#include <filesystem>
#include <stdexcept>

#include "data/bpe.h"
#include "data/files.h"
#include "data/sha256.h"

namespace tessera {
namespace {

constexpr const char* kBytesFile = R"({"tessera_tokenizer": "bytes", "vocabulary": 257, "end_of_text": 256})";

/// Token = byte; the end of text is 256.
class ByteTokenizer final : public Tokenizer {
 public:
  using Tokenizer::decode;
  using Tokenizer::encode;

  void encode(std::string_view text, std::vector<std::uint32_t>& out) const override {
    const std::size_t before = out.size();
    out.resize(before + text.size());
    for (std::size_t i = 0; i < text.size(); ++i) out[before + i] = static_cast<unsigned char>(text[i]);
  }
  void decode(std::uint32_t token, std::string& out) const override {
    if (token > kEnd) throw std::out_of_range(fmt::format("token {} is not in the vocabulary of 257 tokens", token));
    if (token != kEnd) out += static_cast<char>(token);
  }
  std::int64_t vocabulary() const override { return kEnd + 1; }
  std::uint32_t end_of_text() const override { return kEnd; }
  std::string name() const override { return "bytes"; }
  std::string hash() const override { return sha256_hex(kBytesFile); }
  void save(const std::string& file) const override { write_file(file, std::string(kBytesFile) + "\n"); }

 private:
  static constexpr std::uint32_t kEnd = 256;
};

std::unique_ptr<Tokenizer> load_file(const std::string& file) {
  if (std::filesystem::is_directory(file)) {
    throw std::invalid_argument(file + ": is a folder: expected a tokenizer.json in bpe:FILE (gpt2:DIR takes a folder)");
  }
  const std::string contents = read_file(file);
  if (contents.starts_with(std::string_view(kBytesFile))) return std::make_unique<ByteTokenizer>();
  return make_bpe_tokenizer(parse_tokenizer_json(contents, file), "bpe", file);
}

}  // namespace

std::vector<std::uint32_t> Tokenizer::encode(std::string_view text) const {
  std::vector<std::uint32_t> tokens;
  encode(text, tokens);
  return tokens;
}

std::string Tokenizer::decode(const std::vector<std::uint32_t>& tokens) const {
  std::string text;
  for (const std::uint32_t token : tokens) decode(token, text);
  return text;
}

std::unique_ptr<Tokenizer> load_tokenizer(const std::string& spec) {
  if (spec == "bytes") return std::make_unique<ByteTokenizer>();
  const auto argument = [&](const char* kind) { return spec.starts_with(kind) && spec.size() > std::string_view(kind).size(); };
  if (argument("gpt2:")) {
    const std::string directory = spec.substr(5);
    return make_bpe_tokenizer(read_bpe_directory(directory), "gpt2", directory);
  }
  if (argument("bpe:")) return load_file(spec.substr(4));
  throw std::invalid_argument(
      fmt::format("tokenizer \"{}\": expected bytes, gpt2:DIR (vocab.bpe + encoder.json, or merges.txt + vocab.json, or tokenizer.json) or bpe:FILE "
                  "(from `tessera tokenizer train`)",
                  spec));
}

}  // namespace tessera
