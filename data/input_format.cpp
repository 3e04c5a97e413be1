#include "data/input_format.h"

#include <fcntl.h>
#include <fmt/core.h>
#include <glob.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <set>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "data/token_files.h"

namespace tessera {
namespace fs = std::filesystem;
namespace {

constexpr std::array<std::pair<const char*, InputFormat>, 7> kNames = {{{"auto", InputFormat::automatic},
                                                                        {"txt", InputFormat::text},
                                                                        {"jsonl", InputFormat::jsonl},
                                                                        {"parquet", InputFormat::parquet},
                                                                        {"llmc", InputFormat::llmc},
                                                                        {"nanogpt", InputFormat::nanogpt},
                                                                        {"megatron", InputFormat::megatron}}};

/// Extension in lower case, less a .gz or .zst behind it.
std::string extension_of(const std::string& path) {
  fs::path name = fs::path(path).filename();
  if (name.extension() == ".gz" || name.extension() == ".zst") name = name.stem();
  std::string extension = name.extension().string();
  std::transform(extension.begin(), extension.end(), extension.begin(), [](unsigned char c) { return std::tolower(c); });
  return extension;
}

bool is_jsonl(std::string_view extension) { return extension == ".jsonl" || extension == ".ndjson"; }
bool is_text(std::string_view extension) { return extension == ".txt" || extension == ".text" || extension == ".md" || extension == ".rst"; }

/// Whether a folder's file is meant when a file of this format is wanted.
bool belongs(const std::string& path, InputFormat wanted) {
  const std::string extension = extension_of(path);
  const bool text = is_text(extension) || is_jsonl(extension), parquet = extension == ".parquet", tokens = extension == ".bin";
  if (wanted == InputFormat::automatic) return text || parquet || tokens;
  if (is_tokenized(wanted)) return tokens;
  return wanted == InputFormat::parquet ? parquet : text;
}

bool exists(const std::string& path) {
  std::error_code ignored;
  return fs::exists(path, ignored);
}

/// The first bytes of a regular file; of anything else (a pipe can be read only once), or one that cannot be opened, nothing.
std::string head_of(const std::string& path) {
  std::error_code ignored;
  if (!fs::is_regular_file(path, ignored)) return "";
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return "";
  std::array<char, 12> head;
  const ssize_t got = ::read(file, head.data(), head.size());
  ::close(file);
  return std::string(head.data(), static_cast<std::size_t>(std::max<ssize_t>(got, 0)));
}

std::uint32_t first_number(std::string_view head) {
  std::uint32_t number = 0;
  if (head.size() >= sizeof number) std::memcpy(&number, head.data(), sizeof number);
  return number;
}

/// A Megatron pair goes by the name of its .bin.
std::string pair_name(const std::string& path) {
  if (!path.ends_with(".idx")) return path;
  const std::string tokens = fs::path(path).replace_extension(".bin").string();
  return exists(tokens) ? tokens : path;
}

/// A folder's files, sorted, added to `out`.
void add_folder(const std::string& folder, InputFormat wanted, std::vector<std::string>& out) {
  std::vector<std::string> found;
  try {
    for (const auto& item : fs::recursive_directory_iterator(folder))
      if (item.is_regular_file() && belongs(item.path().string(), wanted)) found.push_back(item.path().string());
  } catch (const fs::filesystem_error& e) {
    throw std::invalid_argument(fmt::format("{}: the folder cannot be listed: {}", folder, e.code().message()));
  }
  if (found.empty()) {
    const char* kinds = wanted == InputFormat::automatic ? ".txt, .jsonl, .parquet or .bin files (text plain, .gz or .zst)"
                        : is_tokenized(wanted)           ? ".bin files"
                        : wanted == InputFormat::parquet ? ".parquet files"
                                                         : ".txt or .jsonl files (plain, .gz or .zst)";
    throw std::invalid_argument(fmt::format("{}: the folder holds no {}", folder, kinds));
  }
  std::sort(found.begin(), found.end());
  out.insert(out.end(), found.begin(), found.end());
}

/// The matches of a pattern, sorted by their bytes whatever the locale.
std::vector<std::string> matches_of(const std::string& pattern) {
  glob_t matches{};
  const int status = ::glob(pattern.c_str(), GLOB_NOSORT, nullptr, &matches);
  std::set<std::string> found;
  for (std::size_t i = 0; status == 0 && i < matches.gl_pathc; ++i) found.insert(pair_name(matches.gl_pathv[i]));
  ::globfree(&matches);
  return {found.begin(), found.end()};
}

}  // namespace

InputFormat input_format(const std::string& name) {
  std::string known;
  for (const auto& [word, format] : kNames) {
    if (name == word) return format;
    known += fmt::format("{}{}", known.empty() ? "" : ", ", word);
  }
  throw std::invalid_argument(fmt::format("input format \"{}\": expected one of {}", name, known));
}

std::string to_string(InputFormat format) {
  return std::find_if(kNames.begin(), kNames.end(), [&](const auto& known) { return known.second == format; })->first;
}

bool is_tokenized(InputFormat format) { return format == InputFormat::llmc || format == InputFormat::nanogpt || format == InputFormat::megatron; }

InputFormat format_of(const std::string& path, InputFormat wanted) {
  if (wanted != InputFormat::automatic) return wanted;
  if (path == "-") return InputFormat::text;
  const std::string head = head_of(path);
  if (head.starts_with("PAR1")) return InputFormat::parquet;
  if (head.starts_with("MMIDIDX")) return InputFormat::megatron;
  const std::string extension = extension_of(path);
  const bool has_index = path.ends_with(".bin") && head_of(fs::path(path).replace_extension(".idx").string()).starts_with("MMIDIDX");
  if (!has_index && is_llmc_magic(first_number(head))) return InputFormat::llmc;  // tokens may look like it
  if (is_jsonl(extension)) return InputFormat::jsonl;
  if (extension.empty() || is_text(extension)) return InputFormat::text;
  if (extension == ".parquet") return InputFormat::parquet;
  if (extension == ".idx") return InputFormat::megatron;
  if (extension == ".bin") {
    if (exists(fs::path(path).replace_extension(".idx").string())) return InputFormat::megatron;
    if (!path.ends_with("bin")) return InputFormat::llmc;  // compressed: the stream's first bytes are looked at when it is read
    throw std::invalid_argument(fmt::format(
        "{}: what kind of .bin this is cannot be told: it begins neither with 20240520 nor with 20240801 (llm.c; found {}) and has no .idx "
        "beside it (Megatron). If it is nanoGPT's, uint16 tokens without a header, pass --format nanogpt",
        path, head.size() < 4 ? fmt::format("{} bytes", head.size()) : std::to_string(first_number(head))));
  }
  throw std::invalid_argument(fmt::format(
      "{}: neither the content nor the extension {} says what this is; say it with --format (txt, jsonl, parquet, llmc, nanogpt or megatron)", path,
      extension));
}

std::vector<std::string> expand_inputs(const std::vector<std::string>& inputs, InputFormat wanted) {
  std::vector<std::string> out;
  const auto add = [&](const std::string& path) {
    std::error_code ignored;
    if (fs::is_directory(path, ignored))
      add_folder(path, wanted, out);
    else
      out.push_back(pair_name(path));
  };
  for (const std::string& input : inputs) {
    std::error_code error;
    if (input == "-" || fs::exists(fs::status(input, error))) {
      add(input);
      continue;
    }
    if (error && error != std::errc::no_such_file_or_directory && error != std::errc::not_a_directory)
      throw std::invalid_argument(fmt::format("{}: cannot be opened: {}", input, error.message()));
    const bool pattern = input.find_first_of("*?[") != std::string::npos;
    const std::vector<std::string> found = pattern ? matches_of(input) : std::vector<std::string>();
    if (found.empty())
      throw std::invalid_argument(
          fmt::format("{}: no such file{}", input.empty() ? "\"\"" : input, pattern ? " matches this pattern" : " or folder"));
    for (const std::string& path : found) add(path);
  }
  return out;
}

}  // namespace tessera
