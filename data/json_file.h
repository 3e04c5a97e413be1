#pragma once
// JSON from files that may hold anything.

#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace tessera {

/// Whether a key that an object has twice is an error; otherwise the last one counts.
enum class UniqueKeys { no, yes };

/// The contents of `file` as JSON (nlohmann::json or ordered_json). Nesting deeper than any file of ours or of a tokenizer's is refused: copying and
/// printing such values would overflow the stack. Throws std::invalid_argument naming the file and the byte.
template <typename Json = nlohmann::json>
Json parse_json(const std::string& contents, const std::string& file, UniqueKeys unique = UniqueKeys::no) {
  constexpr int kDeepest = 64;
  std::vector<std::set<std::string>> keys;  // of the objects around the place
  try {
    return Json::parse(contents, [&](int depth, typename Json::parse_event_t event, Json& value) {
      if (depth > kDeepest) throw std::invalid_argument(file + ": JSON nested more than 64 deep");
      if (unique == UniqueKeys::yes) {
        if (event == Json::parse_event_t::object_start) keys.emplace_back();
        if (event == Json::parse_event_t::object_end) keys.pop_back();
        if (event == Json::parse_event_t::key && !keys.back().insert(value.template get<std::string>()).second)
          throw std::invalid_argument(file + ": key " + value.dump(-1, ' ', true).substr(0, 100) + " is there twice");
      }
      return true;
    });
  } catch (const typename Json::parse_error& error) {
    const std::string message = error.what();  // "[json.exception.parse_error.101] parse error at line 1, column 2: ..."
    throw std::invalid_argument(file + ": not valid JSON at byte " + std::to_string(error.byte) + ": " + message.substr(message.find("] ") + 2));
  } catch (const typename Json::exception& error) {  // a number beyond the largest
    const std::string message = error.what();
    throw std::invalid_argument(file + ": not valid JSON: " + message.substr(message.find("] ") + 2));
  }
}

}  // namespace tessera
