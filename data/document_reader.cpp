#include "data/document_reader.h"

#include <fmt/core.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <utility>

#include "data/bpe_split.h"
#include "data/byte_source.h"
#include "data/parquet_source.h"
#include "data/token_files.h"

namespace tessera {
namespace fs = std::filesystem;
namespace {

constexpr std::size_t kReadBytes = 256 << 10;
constexpr std::size_t kLongLine = 1 << 20;  // from here on the reader parses the line itself, so that only its pieces travel

bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

/// Whether `text` begins with a valid character that is surely no Unicode whitespace (beyond ASCII those start with C2, E1, E2 or E3).
bool is_surely_solid(std::string_view text) {
  const auto byte = static_cast<unsigned char>(text.front());
  if (byte < 0x7f) return byte > 0x20;
  return ((byte >= 0xc3 && byte <= 0xdf) || byte >= 0xe4) && valid_utf8_prefix(text) > 0;
}

/// Takes the string under one key of the outermost object; everything else is only checked for being JSON.
class TextOfLine : public nlohmann::json_sax<nlohmann::json> {
 public:
  TextOfLine(const std::string& key, std::string& text) : key_(key), text_(text) {}
  bool found() const { return found_; }
  bool object() const { return object_; }
  std::size_t position() const { return position_; }
  const std::string& problem() const { return problem_; }
  const std::string& keys() const { return keys_; }

  bool null() override { return value("null"); }
  bool boolean(bool) override { return value("a boolean"); }
  bool number_integer(number_integer_t) override { return value("a number"); }
  bool number_unsigned(number_unsigned_t) override { return value("a number"); }
  bool number_float(number_float_t, const string_t&) override { return value("a number"); }
  bool binary(binary_t&) override { return value("binary"); }
  bool string(string_t& text) override {
    if (wanted()) {
      text_ = std::move(text);
      found_ = true;
      problem_.clear();
    }
    here_ = false;
    return true;
  }
  bool start_object(std::size_t) override {
    value("an object");
    if (depth_++ == 0) object_ = true;
    return true;
  }
  bool start_array(std::size_t) override {
    value("a list");
    ++depth_;
    return true;
  }
  bool end_object() override {
    --depth_;
    return true;
  }
  bool end_array() override {
    --depth_;
    return true;
  }
  bool key(string_t& name) override {
    here_ = depth_ == 1 && name == key_;
    if (depth_ == 1 && keys_.size() < 100) keys_ += fmt::format("{}\"{}\"", keys_.empty() ? "" : ", ", name.substr(0, 40));
    return true;
  }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& error) override {
    position_ = position;
    problem_ = error.what();
    if (const auto colon = problem_.find(": "); colon != std::string::npos) problem_.erase(0, colon + 2);  // the library's own line and column
    if (const auto last = problem_.find("; last read"); last != std::string::npos) problem_.erase(last);   // may be as long as the line
    return false;
  }

 private:
  bool wanted() const { return here_ && depth_ == 1; }
  bool value(const char* what) {
    if (wanted()) {
      problem_ = fmt::format("\"{}\" is {}, expected text", key_, what);
      found_ = false;
    }
    here_ = false;
    return true;
  }

  const std::string& key_;
  std::string& text_;
  std::string problem_, keys_;
  std::size_t position_ = 0;
  int depth_ = 0;
  bool here_ = false, found_ = false, object_ = false;
};

/// Empty: `text` is the line's document. Else what is wrong, with the column where that is known.
std::string parse_line(std::string_view line, const std::string& key, std::string& text) {
  TextOfLine taker(key, text);
  const bool parsed = nlohmann::json::sax_parse(line.begin(), line.end(), &taker);
  if (!parsed) return fmt::format("{}: broken JSON: {}", taker.position(), taker.problem());
  if (!taker.object()) return " expected a JSON object on each line";
  if (!taker.problem().empty()) return " " + taker.problem();
  if (!taker.found())
    return fmt::format(" no key \"{}\" in this object; it has {} (choose one with --text-key)", key, taker.keys().empty() ? "none" : taker.keys());
  return "";
}

bool is_blank(std::string_view line) { return std::all_of(line.begin(), line.end(), is_space); }

/// What reads a file that is neither text nor .jsonl; nothing for those.
std::unique_ptr<EntrySource> open_entries(const std::string& path, InputFormat format, const ReaderOptions& options) {
  if (format == InputFormat::parquet) return open_parquet(path, options.text_key, options.where);
  if (is_tokenized(format)) return open_token_file(path, format, {options.vocabulary, options.end_of_text});
  return nullptr;
}

}  // namespace

std::size_t piece_length(std::string_view rest, bool complete) {
  constexpr std::size_t kAhead = 8;  // where a word ends, the next two characters decide
  if (rest.size() <= kPieceBytes) return complete ? rest.size() : 0;
  std::size_t line = 0, word = 0;
  for (std::size_t cut = kPieceBytes - kAhead; cut >= kPieceBytes / 2; --cut) {
    if (!is_space(rest[cut]) || !is_surely_solid(rest.substr(cut + 1, 4))) continue;
    if (rest[cut] != '\n') {
      if (!word) word = cut;
      continue;
    }
    if (rest[cut - 1] == '\n' || (rest[cut - 1] == '\r' && rest[cut - 2] == '\n')) return cut;
    if (!line) line = cut;
  }
  if (line) return line;
  if (word) return word;

  // The words themselves, in ever more text, until one ends in something else than whitespace (a cut behind that might divide a run of it).
  for (std::size_t window = kPieceBytes; window <= kLongestWord; window *= 2) {
    const bool all = window >= rest.size();
    if (all && !complete) return 0;
    PieceSplitter words(rest.substr(0, window));
    std::size_t end = 0, last = 0;
    for (std::string_view piece; words.next(piece);) {
      end += piece.size();
      if (!all && end + kAhead > window) break;
      if (!ends_in_whitespace(piece) || end == rest.size()) last = end;
    }
    if (last) return last;
  }
  std::size_t cut = kLongestWord;
  while (cut > kLongestWord - 4 && (rest[cut] & 0xc0) == 0x80) --cut;
  return (rest[cut] & 0xc0) == 0x80 ? kLongestWord : cut;  // not UTF-8 anyway
}

struct DocumentReader::Impl {
  std::vector<std::string> files;
  ReaderOptions options;
  std::uint64_t total = 0, skipped = 0;
  std::atomic<std::uint64_t> consumed{0};

  // The open file.
  std::size_t file = 0;
  std::unique_ptr<ByteSource> source;    // of text and .jsonl
  std::unique_ptr<EntrySource> entries;  // of everything else
  InputFormat format = InputFormat::text;
  std::uint64_t consumed_before = 0, line = 0;
  std::string window;      // bytes read; those before `begin` are done with
  std::size_t begin = 0;   // of what remains of the document or line
  std::size_t looked = 0;  // bytes after `begin` in which there is no marker, or newline
  bool ended = false;      // the file has no more bytes
  bool first = true;       // the next piece begins a document
  bool line_start = true;  // `begin` is at the start of a line
  bool dropping = false;   // the line is too long and being skipped
  std::string long_text;   // the document of a long line, given out piece by piece
  std::size_t long_used = 0;

  std::string_view rest() const { return std::string_view(window).substr(begin); }
  void advance(std::size_t count) {
    begin += count;
    looked -= std::min(looked, count);
  }

  /// Opens the next file when none is open; false when there is none.
  bool ready() {
    if (source || entries) return true;
    if (file == files.size()) return false;
    format = format_of(files[file], options.format);
    entries = open_entries(files[file], format, options);
    if (entries) return true;
    source = open_source(files[file]);
    window.clear();
    begin = looked = 0;
    line = 0;
    ended = dropping = false;
    first = line_start = true;
    if (files[file] == "-" && options.format == InputFormat::automatic && begins_with_object()) format = InputFormat::jsonl;
    return true;
  }
  /// Whether the stream begins like a line of JSON: an object with a key.
  bool begins_with_object() {
    std::size_t at = 0;
    const auto skip_blanks = [&] {
      while ((at = window.find_first_not_of(" \t\r\n", at)) == std::string::npos && !ended) {
        at = window.size();
        read_more();
      }
      return at == std::string::npos ? '\0' : window[at++];
    };
    return skip_blanks() == '{' && skip_blanks() == '"';
  }
  void finish() {
    consumed_before += source ? source->consumed() : entries->consumed();
    consumed = consumed_before;
    source.reset();
    entries.reset();
    ++file;
  }
  void read_more() {
    if (window.size() < kLongLine && window.capacity() > 16 * kLongLine) window.shrink_to_fit();  // a long line is over
    if (begin >= kReadBytes) {                                                                    // moving what is left costs at most what was read
      window.erase(0, begin);
      begin = 0;
    }
    const std::size_t have = window.size();
    window.resize(have + kReadBytes);
    const std::size_t got = source->read(std::span(window).subspan(have));
    window.resize(have + got);
    ended = got == 0;
    consumed = consumed_before + source->consumed();
  }

  Entry entry(std::string_view bytes, bool json, bool starts) const {
    return {std::string(bytes), json, starts, static_cast<std::uint32_t>(file), line, {}};
  }

  bool next_entry(std::vector<Entry>& out) {
    if (!entries->next(out)) {
      finish();
      return false;
    }
    out.back().file = static_cast<std::uint32_t>(file);
    consumed = consumed_before + entries->consumed();
    return true;
  }

  struct Marker {
    std::size_t at, length;
    bool found;
  };
  /// A marker line in rest(). Not found: `at` bytes surely belong to the document.
  Marker find_marker() const {
    const std::string_view text = rest();
    for (std::size_t at = text.find(kDocumentMarker, looked); at != std::string_view::npos; at = text.find(kDocumentMarker, at + 1)) {
      if (at == 0 ? !line_start : text[at - 1] != '\n') continue;
      std::size_t end = at + kDocumentMarker.size();
      if (end < text.size() && text[end] == '\r') ++end;
      if (end < text.size() ? text[end] == '\n' : ended) return {at, std::min(end + 1, text.size()) - at, true};
      if (end >= text.size()) return {at, 0, false};  // what follows is not read yet
    }
    const std::size_t tail = ended ? 0 : std::min(text.size(), kDocumentMarker.size() - 1);
    return {text.size() - tail, 0, false};
  }

  /// The next piece of a text file, if there is one in the window; else reads on or finishes the file.
  bool next_text(std::vector<Entry>& out) {
    const Marker marker = find_marker();
    const std::string_view document = rest().substr(0, marker.at);
    if (const std::size_t length = piece_length(document, marker.found || ended); length > 0) {
      out.push_back(entry(document.substr(0, length), false, first));
      first = false;
      line_start = document[length - 1] == '\n';
      looked = marker.at;
      advance(length);
      return true;
    }
    looked = marker.at;
    if (marker.found) {
      advance(marker.length);
      first = line_start = true;
    } else if (ended) {
      finish();
    } else {
      read_more();
    }
    return false;
  }

  bool next_line(std::vector<Entry>& out) {
    if (long_used < long_text.size()) return next_of_long_line(out);
    const std::string_view text = rest();
    const std::size_t newline = text.find('\n', looked);
    if (newline == std::string_view::npos && !ended) {
      looked = text.size();
      if (text.size() > kLongestLine) drop_long_line();
      if (dropping) advance(rest().size());
      read_more();
      return false;
    }
    const std::string_view content = text.substr(0, newline);
    const std::size_t length = newline == std::string_view::npos ? text.size() : newline + 1;
    if (length == 0) {
      finish();
      return false;
    }
    if (!dropping) ++line;
    const bool keep = !dropping && !is_blank(content);
    const bool is_long = content.size() > kLongLine;
    if (keep && !is_long) out.push_back(entry(content, true, true));
    if (keep && is_long && !parse(content, files[file], line, long_text)) ++skipped, long_text.clear();
    dropping = false;
    advance(length);
    return keep && !is_long;
  }
  bool next_of_long_line(std::vector<Entry>& out) {
    const std::string_view left = std::string_view(long_text).substr(long_used);
    const std::size_t length = piece_length(left);
    out.push_back(entry(left.substr(0, length), false, long_used == 0));
    long_used += length;
    if (long_used == long_text.size()) {
      std::string().swap(long_text);
      long_used = 0;
    }
    return true;
  }
  void drop_long_line() {
    if (!dropping) ++line;
    if (!options.skip_bad)
      throw std::runtime_error(fmt::format("{}:{}: the line is longer than {} bytes; split its document, or pass --skip-bad to leave it out",
                                           files[file], line, kLongestLine));
    if (!dropping) ++skipped;
    dropping = true;
  }
  bool parse(std::string_view content, const std::string& name, std::uint64_t number, std::string& text) const {
    const std::string problem = parse_line(content, options.text_key, text);
    if (problem.empty()) return true;
    if (options.skip_bad) return false;
    throw std::runtime_error(fmt::format("{}:{}:{} (--skip-bad leaves such lines out)", name, number, problem));
  }
};

DocumentReader::DocumentReader(std::vector<std::string> files, const ReaderOptions& options) : impl_(std::make_unique<Impl>()) {
  for (const std::string& file : files) {
    std::error_code ignored;
    const InputFormat format = format_of(file, options.format);
    if (is_tokenized(format) && options.vocabulary == 0)
      throw std::invalid_argument(fmt::format("{}: a file of tokens ({}), expected text", file, to_string(format)));
    if (format == InputFormat::parquet) check_parquet_support(file);
    if (format != InputFormat::parquet && !options.where.empty())
      throw std::invalid_argument(fmt::format("{}: --where filters the rows of Parquet files, and this is {}", file, to_string(format)));
    if (options.check_first && fs::is_regular_file(file, ignored)) open_entries(file, format, options);
    std::error_code error;
    const auto size = file == "-" ? 0 : fs::file_size(file, error);
    if (!error) impl_->total += size;
  }
  impl_->files = std::move(files);
  impl_->options = options;
}
DocumentReader::~DocumentReader() = default;

bool DocumentReader::next(std::vector<Entry>& out, std::size_t bytes) {
  out.clear();
  std::size_t have = 0;
  while (have < bytes && impl_->ready()) {
    const bool added = impl_->entries ? impl_->next_entry(out) : impl_->format == InputFormat::jsonl ? impl_->next_line(out) : impl_->next_text(out);
    if (added) have += out.back().bytes.size() + 4 * out.back().tokens.size() + sizeof(Entry);
  }
  return !out.empty();
}

bool DocumentReader::pieces(const Entry& entry, const std::function<void(std::string_view, bool)>& take) const {
  if (!entry.json) {
    take(entry.bytes, entry.first);
    return true;
  }
  std::string text;
  if (!impl_->parse(entry.bytes, impl_->files[entry.file], entry.line, text)) return false;
  bool first = true;
  for (std::string_view left = text; !left.empty(); first = false) {
    const std::size_t length = piece_length(left);
    take(left.substr(0, length), first);
    left.remove_prefix(length);
  }
  return true;
}

const std::vector<std::string>& DocumentReader::files() const { return impl_->files; }
std::uint64_t DocumentReader::total_bytes() const { return impl_->total; }
std::uint64_t DocumentReader::consumed_bytes() const { return impl_->consumed; }
std::uint64_t DocumentReader::skipped_lines() const { return impl_->skipped; }

}  // namespace tessera
