#pragma once
// Text in and out of generation: prompts from files, and new text to a terminal in whole characters.

#include <string>
#include <string_view>
#include <vector>

namespace tessera {

/// The prompts of a file, plain, gzip or Zstandard; "-" is standard input. With a key, or for .jsonl and .ndjson (key "prompt" unless given), an
/// object a line, the prompt under that key; otherwise a prompt a line. Blank lines are left out. Throws std::invalid_argument naming file and line
/// for what is no such line or no UTF-8, and for a file without a prompt.
std::vector<std::string> read_prompts(const std::string& file, const std::string& key);

/// Throws std::invalid_argument "<where>: ..." with the offset of the first byte of `text` that is not UTF-8.
void check_utf8(const std::string& where, std::string_view text);

/// Bytes of tokens in, whole characters out: a token may end inside one. Bytes that are no UTF-8 pass as they are.
class CharacterStream {
 public:
  /// What can be shown now of all that came: everything but a character still incomplete at its end.
  std::string add(std::string_view bytes);
  /// The rest.
  std::string finish();

 private:
  std::string held_;
};

}  // namespace tessera
