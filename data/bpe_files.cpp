#include <fmt/core.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string_view>
#include <unordered_map>

#include "data/bpe.h"
#include "data/files.h"
#include "data/json_file.h"

namespace tessera {
namespace {

using nlohmann::json;

[[noreturn]] void fail(const std::string& where, const std::string& what) { throw std::invalid_argument(where + ": " + what); }

/// A value as it is shown in a message.
std::string shown(const json& value) {
  std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);  // a broken line may hold any bytes
  return text.size() <= 100 ? text : text.substr(0, 97) + "...";
}

/// A vocabulary under construction: the text of each token (in stand-in characters) and its id.
class Vocabulary {
 public:
  explicit Vocabulary(const std::string& file) : file_(file) {}

  void add(const std::string& text, const json& id, const std::string& key) {
    if (!id.is_number_unsigned() || id.get<std::uint64_t>() >= UINT32_MAX) {
      fail(file_, fmt::format("{}: token {}: expected an id (an integer from 0), found {}", key, shown(text), shown(id)));
    }
    const auto [known, is_new] = id_of_.emplace(text, id.get<std::uint32_t>());
    if (!is_new && known->second != id.get<std::uint32_t>()) {
      fail(file_, fmt::format("{}: token {} has id {} and id {}", key, shown(text), known->second, shown(id)));
    }
  }
  void add_special(const std::string& text) { special_.push_back(id_of_.at(text)); }

  /// The id of an ordinary token, or of none.
  const std::uint32_t* find(const std::string& text) const {
    const auto found = id_of_.find(text);
    return found == id_of_.end() ? nullptr : &found->second;
  }

  /// The definition but for its merges: checks that the ids are 0 .. N-1 and turns characters into bytes.
  BpeDefinition finish() {
    BpeDefinition out;
    std::sort(special_.begin(), special_.end());
    special_.erase(std::unique(special_.begin(), special_.end()), special_.end());
    out.special = special_;
    const std::uint32_t* end = find(kEndOfText);
    if (!end || !std::binary_search(special_.begin(), special_.end(), *end)) {
      fail(file_, fmt::format("no end-of-text token: expected {} in the vocabulary", kEndOfText));
    }
    out.end_of_text = *end;

    std::vector<const std::string*> text_of(id_of_.size());
    for (const auto& [text, id] : id_of_) {
      if (id >= text_of.size()) continue;  // then another id is missing, which the loop below reports
      if (text_of[id]) fail(file_, fmt::format("id {} is given to {} and to {}", id, shown(*text_of[id]), shown(text)));
      text_of[id] = &text;
    }
    for (std::uint32_t id = 0; id < text_of.size(); ++id) {
      if (!text_of[id])
        fail(file_, fmt::format("no token has id {}: {} tokens need the ids 0 to {} without a gap", id, text_of.size(), text_of.size() - 1));
      const bool special = std::binary_search(special_.begin(), special_.end(), id);
      out.tokens.push_back(special ? *text_of[id] : bytes_of(*text_of[id], id));
    }
    return out;
  }

 private:
  std::string bytes_of(const std::string& text, std::uint32_t id) const {
    static const auto byte_of = [] {
      std::unordered_map<std::string_view, char> map;
      for (int byte = 0; byte < 256; ++byte) map.emplace(byte_characters()[byte], static_cast<char>(byte));
      return map;
    }();
    std::string bytes;
    for (std::size_t i = 0; i < text.size();) {
      const std::size_t length = static_cast<unsigned char>(text[i]) < 0x80 ? 1 : 2;  // every stand-in character takes one or two bytes
      const auto found = byte_of.find(std::string_view(text).substr(i, length));
      if (found == byte_of.end()) {
        fail(file_, fmt::format("token {} (id {}) has a character that stands for no byte: not a byte-level vocabulary, or an unlisted special token",
                                shown(text), id));
      }
      bytes += found->second;
      i += length;
    }
    return bytes;
  }

  std::string file_;
  std::unordered_map<std::string, std::uint32_t> id_of_;
  std::vector<std::uint32_t> special_;
};

BpeMerge resolve_merge(const Vocabulary& vocabulary, const std::string& left, const std::string& right, const std::string& where) {
  const auto id = [&](const std::string& text) {
    const std::uint32_t* found = vocabulary.find(text);
    if (!found) fail(where, fmt::format("merge of {} and {}: {} is not in the vocabulary", shown(left), shown(right), shown(text)));
    return *found;
  };
  return {id(left), id(right), id(left + right)};
}

/// "left right", exactly one space.
BpeMerge parse_merge(const Vocabulary& vocabulary, const std::string& line, const std::string& where) {
  const std::size_t space = line.find(' ');
  if (space == std::string::npos || space == 0 || space + 1 == line.size() || line.find(' ', space + 1) != std::string::npos) {
    fail(where, fmt::format("expected a merge, two tokens with one space between, found {}", shown(line)));
  }
  return resolve_merge(vocabulary, line.substr(0, space), line.substr(space + 1), where);
}

BpeDefinition read_vocabulary_and_merges(const std::string& vocabulary_file, const std::string& merges_file) {
  Vocabulary vocabulary(vocabulary_file);
  const json tokens = parse_json(read_file(vocabulary_file), vocabulary_file);
  if (!tokens.is_object()) fail(vocabulary_file, "expected an object of tokens and their ids, found " + shown(tokens));
  for (const auto& [text, id] : tokens.items()) vocabulary.add(text, id, "vocabulary");
  if (vocabulary.find(kEndOfText)) vocabulary.add_special(kEndOfText);
  BpeDefinition out = vocabulary.finish();

  const std::string merges = read_file(merges_file);
  std::size_t number = 0;
  for (std::size_t begin = 0; begin < merges.size();) {
    const std::size_t end = std::min(merges.find('\n', begin), merges.size());
    std::string line = merges.substr(begin, end - begin);
    begin = end + 1;
    ++number;
    if (line.ends_with('\r')) line.pop_back();
    if (number == 1 && line.starts_with("#version")) continue;
    if (line.empty() && begin >= merges.size()) break;
    out.merges.push_back(parse_merge(vocabulary, line, fmt::format("{}:{}", merges_file, number)));
  }
  return out;
}

const json& member(const json& object, const std::string& key, json::value_t type, const std::string& file) {
  const std::string name = key.substr(key.rfind('.') + 1);
  const auto found = object.find(name);
  const std::string expected = type == json::value_t::string ? "a string" : std::string("an ") + json(type).type_name();  // object, array
  if (found == object.end()) fail(file, fmt::format("{} is missing: expected {}", key, expected));
  if (found->type() != type) fail(file, fmt::format("{}: expected {}, found {}", key, expected, shown(*found)));
  return *found;
}

/// What this tokenizer does not do is refused, since its tokens would not be those that the file promises.
void check_pipeline(const json& root, const json& model, const std::string& file) {
  const auto refuse = [&](const std::string& key, const std::string& expected, const json& found) {
    fail(file, fmt::format("{}: expected {}, found {}: Tessera reads byte-level BPE with GPT-2's pattern", key, expected, shown(found)));
  };
  if (const json type = model.value("type", json("BPE")); type != "BPE") refuse("model.type", "BPE", type);
  for (const char* key : {"dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"}) {
    const json value = model.value(key, json());
    if (!value.is_null() && value != "" && value != false && value != 0.0) refuse(std::string("model.") + key, "none", value);
  }
  if (const json normalizer = root.value("normalizer", json()); !normalizer.is_null()) refuse("normalizer", "null", normalizer);
  const json splitter = root.value("pre_tokenizer", json());
  if (!splitter.is_object() || splitter.value("type", json()) != "ByteLevel" || splitter.value("add_prefix_space", json(true)) != false ||
      splitter.value("use_regex", json(true)) != true) {
    refuse("pre_tokenizer", "ByteLevel with add_prefix_space false and use_regex true", splitter);
  }
}

/// A token as those files write it: a special one as it is, another in stand-in characters.
std::string token_text(const BpeDefinition& definition, std::uint32_t id) {
  if (std::binary_search(definition.special.begin(), definition.special.end(), id)) return definition.tokens[id];
  std::string text;
  for (const char byte : definition.tokens[id]) text += byte_characters()[static_cast<unsigned char>(byte)];
  return text;
}

}  // namespace

BpeDefinition read_bpe_directory(const std::string& directory) {
  const std::filesystem::path folder(directory);
  if (!std::filesystem::is_directory(folder)) fail(directory, "is not a folder: expected one with vocab.bpe and encoder.json");
  const auto has = [&](const char* name) { return std::filesystem::exists(folder / name); };
  const auto path = [&](const char* name) { return (folder / name).string(); };
  for (const auto& [merges, vocabulary] : {std::pair{"vocab.bpe", "encoder.json"}, std::pair{"merges.txt", "vocab.json"}}) {
    if (has(merges) && has(vocabulary)) return read_vocabulary_and_merges(path(vocabulary), path(merges));
  }
  if (has("tokenizer.json")) return parse_tokenizer_json(read_file(path("tokenizer.json")), path("tokenizer.json"));
  for (const auto& [one, other] : {std::pair{"vocab.bpe", "encoder.json"}, std::pair{"merges.txt", "vocab.json"}}) {
    if (has(one) != has(other)) fail(directory, fmt::format("{} is there and {} is missing", has(one) ? one : other, has(one) ? other : one));
  }
  fail(directory, "no tokenizer: expected vocab.bpe and encoder.json, or merges.txt and vocab.json, or tokenizer.json");
}

BpeDefinition parse_tokenizer_json(const std::string& contents, const std::string& file) {
  const json root = parse_json(contents, file);
  if (!root.is_object()) fail(file, "expected an object, found " + shown(root));
  const json& model = member(root, "model", json::value_t::object, file);
  check_pipeline(root, model, file);

  Vocabulary vocabulary(file);
  for (const auto& [text, id] : member(model, "model.vocab", json::value_t::object, file).items()) vocabulary.add(text, id, "model.vocab");
  const json added = root.value("added_tokens", json::array());
  if (!added.is_array()) fail(file, "added_tokens: expected an array, found " + shown(added));
  for (const json& token : added) {
    if (!token.is_object()) fail(file, "added_tokens: expected objects, found " + shown(token));
    const std::string content = member(token, "added_tokens.content", json::value_t::string, file);
    if (token.value("special", json(false)) != true) {
      fail(file, fmt::format("added_tokens: {} is not special: text that holds it would get other tokens than the file promises", shown(content)));
    }
    vocabulary.add(content, token.value("id", json()), "added_tokens");
    vocabulary.add_special(content);
  }
  BpeDefinition out = vocabulary.finish();

  const json& merges = member(model, "model.merges", json::value_t::array, file);
  for (std::size_t i = 0; i < merges.size(); ++i) {
    const std::string where = fmt::format("{}: model.merges[{}]", file, i);
    const json& merge = merges[i];
    if (merge.is_string()) {
      out.merges.push_back(parse_merge(vocabulary, merge, where));
    } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      out.merges.push_back(resolve_merge(vocabulary, merge[0], merge[1], where));
    } else {
      fail(where, "expected \"left right\" or [\"left\", \"right\"], found " + shown(merge));
    }
  }
  return out;
}

std::string format_tokenizer_json(const BpeDefinition& definition) {
  const auto text_of = [&](std::uint32_t id) { return token_text(definition, id); };
  std::string added, vocabulary, merges;
  for (const std::uint32_t id : definition.special) {
    added += fmt::format(
        R"({}    {{"id": {}, "content": {}, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}})",
        added.empty() ? "\n" : ",\n", id, json(text_of(id)).dump());
  }
  for (std::uint32_t id = 0; id < definition.tokens.size(); ++id) {
    vocabulary += fmt::format("{}      {}: {}", id == 0 ? "\n" : ",\n", json(text_of(id)).dump(), id);
  }
  for (const BpeMerge& merge : definition.merges) {
    merges += fmt::format("{}      {}", merges.empty() ? "\n" : ",\n", json(text_of(merge.left) + " " + text_of(merge.right)).dump());
  }
  constexpr const char* kByteLevel = R"({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true})";
  return fmt::format(R"({{
  "version": "1.0",
  "truncation": null,
  "padding": null,
  "added_tokens": [{0}
  ],
  "normalizer": null,
  "pre_tokenizer": {3},
  "post_processor": null,
  "decoder": {3},
  "model": {{
    "type": "BPE",
    "dropout": null,
    "unk_token": null,
    "continuing_subword_prefix": null,
    "end_of_word_suffix": null,
    "fuse_unk": false,
    "byte_fallback": false,
    "ignore_merges": false,
    "vocab": {{{1}
    }},
    "merges": [{2}
    ]
  }}
}}
)",
                     added, vocabulary, merges, kByteLevel);
}

std::string format_vocabulary_json(const BpeDefinition& definition) {
  std::string text;
  for (std::uint32_t id = 0; id < definition.tokens.size(); ++id)
    text += fmt::format("{}{}: {}", id == 0 ? "{" : ",\n", json(token_text(definition, id)).dump(), id);
  return text + "}\n";
}

std::string format_merges(const BpeDefinition& definition) {
  std::string text = "#version: 0.2\n";
  for (const BpeMerge& merge : definition.merges)
    text += fmt::format("{} {}\n", token_text(definition, merge.left), token_text(definition, merge.right));
  return text;
}

}  // namespace tessera
