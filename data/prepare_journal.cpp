#include "data/prepare_journal.h"

#include <fmt/core.h>
#include <sys/stat.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "data/files.h"
#include "data/prepare.h"
#include "data/sha256.h"

namespace tessera {
using Json = nlohmann::ordered_json;
namespace {

constexpr int kJournalVersion = 2;
constexpr const char* kAdvice = "repeat the command as it was, or leave --resume away to start anew";

/// File names are bytes, JSON is text: what is no UTF-8 is replaced, the same way each time.
std::string dump(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

void compare(const Json& before, const Json& now) {
  for (const auto& [key, value] : now.items()) {
    if (key == "files" || before.at(key) == value) continue;
    throw std::invalid_argument(
        fmt::format("--resume: the interrupted run had {} {}, this one has {}; {}", key, dump(before.at(key)), dump(value), kAdvice));
  }
  const Json &old_files = before.at("files"), &files = now.at("files");
  for (std::size_t i = 0; i < std::min(old_files.size(), files.size()); ++i) {
    const std::string name = files[i].at(0), old_name = old_files[i].at(0);
    if (name != old_name)
      throw std::invalid_argument(
          fmt::format("--resume: the inputs are others than those of the interrupted run: {} where {} was; {}", name, old_name, kAdvice));
    if (files[i] != old_files[i])
      throw std::invalid_argument(fmt::format("--resume: {} has changed since the interrupted run; leave --resume away to start anew", name));
  }
  if (old_files.size() != files.size())
    throw std::invalid_argument(
        fmt::format("--resume: there are {} input files, the interrupted run had {}; {}", files.size(), old_files.size(), kAdvice));
}

}  // namespace

Json settings_of(const Tokenizer& tokenizer, const PrepareOptions& options, const std::vector<std::string>& files) {
  Json list = Json::array();
  for (const std::string& file : files) {
    struct stat found {};
    ::stat(file.c_str(), &found);
    list.push_back({file, found.st_size, found.st_mtim.tv_sec, found.st_mtim.tv_nsec});
  }
  const Json out = {{"tokenizer", tokenizer.name() + " " + tokenizer.hash()},
                    {"--validation-fraction", options.validation_fraction},
                    {"--shard-tokens", options.shard_tokens},
                    {"--dedup", options.dedup},
                    {"--format", static_cast<int>(options.reader.format)},
                    {"--text-key", options.reader.text_key},
                    {"--where", options.reader.where},
                    {"files", list}};
  return Json::parse(dump(out));  // as it reads when it comes back
}

PrepareJournal::PrepareJournal(std::string file, Json settings, double seconds)
    : file_(std::move(file)), settings_(std::make_unique<Json>(std::move(settings))), seconds_(seconds) {}
PrepareJournal::~PrepareJournal() = default;

Json PrepareJournal::load() const {
  const std::string text = read_file(file_);
  Json json;
  try {
    const std::size_t line = text.find('\n');  // the first holds the SHA-256 of the rest
    if (line == std::string::npos || sha256_hex(text.substr(line + 1)) != text.substr(0, line)) throw std::runtime_error("its checksum is wrong");
    json = Json::parse(text.substr(line + 1));
    if (json.at("version") != kJournalVersion) throw std::runtime_error("it is another version's");
  } catch (const std::exception& e) {
    throw std::runtime_error(fmt::format("{}: the journal of the interrupted run is damaged ({}); start anew, without --resume", file_, e.what()));
  }
  compare(json.at("settings"), *settings_);
  return json.at("state");
}

bool PrepareJournal::due(bool shard_finished) const {
  const double passed = std::chrono::duration<double>(Clock::now() - last_).count();
  return passed >= std::max(shard_finished ? seconds_ / 10 : seconds_, 20 * cost_);  // recording takes at most a twentieth of the time
}

void PrepareJournal::record(Json state) {
  const auto begin = Clock::now();
  const std::string text = dump({{"version", kJournalVersion}, {"settings", *settings_}, {"state", std::move(state)}});
  write_file(file_, sha256_hex(text) + "\n" + text);
  last_ = Clock::now();
  cost_ = std::chrono::duration<double>(last_ - begin).count();
}

Json to_json(const InputPosition& position) { return {{"file", position.file}, {"entry", position.entry}, {"documents", position.documents}}; }
InputPosition position_from(const Json& json) { return {json.at("file"), json.at("entry"), json.at("documents")}; }

}  // namespace tessera
