#include "model/pattern.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <fstream>
#include <stdexcept>

namespace tessera {
namespace {

/// SplitMix64's finaliser (Steele, Lea & Flood 2014): a bijection that mixes every bit into every other.
std::uint64_t mix(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

/// `random` different blocks of 0..row by Floyd's algorithm (Bentley & Floyd 1987); the draws depend on (seed, row) alone, never on
/// the length of the sequence. The multiply-high maps 64 random bits to 0..t.
std::vector<std::int64_t> bigbird_draw(const PatternSpec& p, std::int64_t row) {
  std::vector<std::int64_t> drawn;
  const std::int64_t n = row + 1;
  for (std::int64_t t = n - std::min(p.random, n); t < n; ++t) {
    const std::uint64_t bits = mix(mix(mix(p.seed) ^ static_cast<std::uint64_t>(row)) ^ static_cast<std::uint64_t>(t));
    const auto r = static_cast<std::int64_t>((static_cast<unsigned __int128>(bits) * static_cast<std::uint64_t>(t + 1)) >> 64);
    drawn.push_back(std::find(drawn.begin(), drawn.end(), r) == drawn.end() ? r : t);
  }
  return drawn;
}

bool bigbird_near(const PatternSpec& p, std::int64_t row, std::int64_t column) { return row - column < p.size || column < p.width; }

bool mask_visible(const BlockMask& m, std::int64_t row, std::int64_t column) {
  return column < m.rows && m.visible[static_cast<std::size_t>(std::min(row, m.rows - 1) * m.rows + column)] != 0;
}

std::uint64_t content_hash(const BlockMask& m) {
  std::uint64_t h = mix(static_cast<std::uint64_t>(m.block) ^ mix(static_cast<std::uint64_t>(m.rows)));
  for (auto v : m.visible) h = (h ^ (v != 0)) * 0x100000001b3u;  // FNV-1a's step
  return mix(h);
}

/// Texts of the children of an any or all, nested ones of the same kind merged.
void child_texts(const PatternSpec& p, std::vector<std::string>& texts) {
  for (const auto& child : p.children) {
    if (child.kind == p.kind)
      child_texts(child, texts);
    else
      texts.push_back(describe(child));
  }
}

void require(bool ok, const char* pattern, const char* key, std::int64_t found, const char* expected) {
  if (!ok) throw std::invalid_argument(fmt::format("pattern {}: {} is {}; it must be {}", pattern, key, found, expected));
}

}  // namespace

bool PatternSpec::visible(std::int64_t query, std::int64_t key) const {
  if (key < 0 || key > query) return false;
  const std::int64_t distance = query - key;
  switch (kind) {
    case Kind::causal: return true;
    case Kind::window: return distance < size;
    case Kind::strided: return distance % size < width;
    case Kind::dilated: return distance / width < size && distance % width == 0;  // distance < size * width, which could overflow
    case Kind::global: return key < size;
    case Kind::bigbird: {
      const std::int64_t row = query / block, column = key / block;
      if (bigbird_near(*this, row, column)) return true;
      const auto drawn = bigbird_draw(*this, row);
      return std::find(drawn.begin(), drawn.end(), column) != drawn.end();
    }
    case Kind::blocks: return mask_visible(*mask, query / mask->block, key / mask->block);
    case Kind::any: return std::any_of(children.begin(), children.end(), [&](const PatternSpec& c) { return c.visible(query, key); });
    case Kind::all: return std::all_of(children.begin(), children.end(), [&](const PatternSpec& c) { return c.visible(query, key); });
  }
  return false;
}

void check_pattern(const PatternSpec& p) {
  switch (p.kind) {
    case PatternSpec::Kind::causal: return;
    case PatternSpec::Kind::window: return require(p.size >= 1, "window", "size", p.size, "at least 1");
    case PatternSpec::Kind::strided:
      require(p.size >= 1, "strided", "stride", p.size, "at least 1");
      return require(p.width >= 1, "strided", "width", p.width, "at least 1");
    case PatternSpec::Kind::dilated:
      require(p.size >= 1, "dilated", "window", p.size, "at least 1");
      return require(p.width >= 1, "dilated", "dilation", p.width, "at least 1");
    case PatternSpec::Kind::global: return require(p.size >= 1, "global", "tokens", p.size, "at least 1");
    case PatternSpec::Kind::bigbird:
      require(p.block >= 1, "bigbird", "block", p.block, "at least 1");
      require(p.size >= 0, "bigbird", "window", p.size, "at least 0");
      require(p.width >= 0, "bigbird", "global", p.width, "at least 0");
      require(p.random >= 0, "bigbird", "random", p.random, "at least 0");
      if (p.size == 0 && p.width == 0 && p.random == 0)
        throw std::invalid_argument("pattern bigbird: window, global and random are all 0; one must be more");
      return;
    case PatternSpec::Kind::blocks:
      if (!p.mask) throw std::invalid_argument(fmt::format("pattern blocks: the mask file '{}' has not been read", p.file));
      require(p.mask->block >= 1, "blocks", "block", p.mask->block, "at least 1");
      require(p.mask->rows >= 1, "blocks", "rows", p.mask->rows, "at least 1");
      if (static_cast<std::int64_t>(p.mask->visible.size()) != p.mask->rows * p.mask->rows)
        throw std::invalid_argument(fmt::format("pattern blocks: {} values for {} x {} blocks", p.mask->visible.size(), p.mask->rows, p.mask->rows));
      return;
    case PatternSpec::Kind::any:
    case PatternSpec::Kind::all:
      if (p.children.empty())
        throw std::invalid_argument(
            fmt::format("pattern {}: the list is empty; name at least one pattern", p.kind == PatternSpec::Kind::any ? "any" : "all"));
      for (const auto& child : p.children) check_pattern(child);
      return;
  }
}

std::vector<std::uint8_t> visible_blocks(const PatternSpec& p, std::int64_t row) {
  std::vector<std::uint8_t> seen(static_cast<std::size_t>(row + 1));
  if (p.kind == PatternSpec::Kind::bigbird) {
    for (std::int64_t b = 0; b <= row; ++b) seen[static_cast<std::size_t>(b)] = bigbird_near(p, row, b);
    for (auto b : bigbird_draw(p, row)) seen[static_cast<std::size_t>(b)] = 1;
  } else if (p.kind == PatternSpec::Kind::blocks) {
    for (std::int64_t b = 0; b <= row; ++b) seen[static_cast<std::size_t>(b)] = mask_visible(*p.mask, row, b);
  } else {
    throw std::logic_error("visible_blocks: " + describe(p) + " is not a pattern by blocks");
  }
  return seen;
}

const PatternSpec& PatternConfig::at(int layer, int head) const {
  for (auto o = overrides.rbegin(); o != overrides.rend(); ++o) {
    if (o->layer_first <= layer && layer <= o->layer_last && o->head_first <= head && head <= o->head_last) return o->pattern;
  }
  return base;
}

std::string describe(const PatternSpec& p) {
  switch (p.kind) {
    case PatternSpec::Kind::causal: return "causal";
    case PatternSpec::Kind::window: return fmt::format("window{{{}}}", p.size);
    case PatternSpec::Kind::strided: return fmt::format("strided{{{},{}}}", p.size, p.width);
    case PatternSpec::Kind::dilated: return fmt::format("dilated{{{},{}}}", p.size, p.width);
    case PatternSpec::Kind::global: return fmt::format("global{{{}}}", p.size);
    case PatternSpec::Kind::bigbird:
      return fmt::format("bigbird{{window={},global={},random={},seed={},block={}}}", p.size, p.width, p.random, p.seed, p.block);
    case PatternSpec::Kind::blocks: return fmt::format("blocks{{{}:{:016x}}}", p.file, p.mask ? content_hash(*p.mask) : 0);
    case PatternSpec::Kind::any:
    case PatternSpec::Kind::all: {
      std::vector<std::string> texts;
      child_texts(p, texts);
      std::sort(texts.begin(), texts.end());
      texts.erase(std::unique(texts.begin(), texts.end()), texts.end());
      if (texts.size() == 1) return texts.front();
      return fmt::format("{}[{}]", p.kind == PatternSpec::Kind::any ? "any" : "all", fmt::join(texts, ","));
    }
  }
  return "?";
}

/// The beginning of a line that may hold anything, fit for a message.
static std::string shown(const std::string& line) {
  std::string text = line.substr(0, 60);
  for (char& c : text)
    if (c < 0x20 || c > 0x7E) c = '?';
  return text;
}

std::shared_ptr<const BlockMask> read_block_mask(const std::string& file) {
  std::ifstream in(file);
  if (!in) throw std::invalid_argument(fmt::format("block mask '{}': cannot be opened; check attention.pattern's file", file));
  auto mask = std::make_shared<BlockMask>();
  std::string line;
  std::int64_t number = 0, last_row_line = 0, rows = 0;
  const auto fail = [&](std::int64_t at, const std::string& why) {
    throw std::invalid_argument(fmt::format("block mask '{}', line {}: {}", file, at, why));
  };
  while (std::getline(in, line)) {
    ++number;
    if (!line.empty() && line.back() == '\r') line.pop_back();
    if (number == 1) {
      // "block N": N by hand, since stream extraction would take "block 64x" too.
      const std::string digits = line.rfind("block ", 0) == 0 ? line.substr(6) : "";
      if (digits.empty() || digits.size() > 9 || digits.find_first_not_of("0123456789") != std::string::npos || std::stoll(digits) < 1)
        fail(1, fmt::format("expected \"block N\" with N tokens a side, found \"{}\"", shown(line)));
      mask->block = std::stoll(digits);
      continue;
    }
    if (line.empty()) continue;
    const auto length = static_cast<std::int64_t>(line.size());
    if (const auto bad = line.find_first_not_of("01"); bad != std::string::npos)
      fail(number, fmt::format("column {}: expected '0' or '1', found '{}'", bad + 1, shown(line.substr(bad, 1))));
    if (mask->rows == 0) mask->rows = length;
    if (length != mask->rows) fail(number, fmt::format("expected {} values as in the first row, found {}", mask->rows, length));
    if (++rows > mask->rows) fail(number, fmt::format("more than {} rows; the mask must be square", mask->rows));
    for (char c : line) mask->visible.push_back(c == '1');
    last_row_line = number;
  }
  if (in.bad()) throw std::runtime_error(fmt::format("block mask '{}': reading failed after line {}", file, number));
  if (number == 0) fail(1, "the file is empty; expected \"block N\", then rows of '0' and '1'");
  if (rows != mask->rows || rows == 0)
    fail(std::max<std::int64_t>(last_row_line, 1),
         fmt::format("expected {} rows of '0' and '1', found {}", std::max<std::int64_t>(mask->rows, 1), rows));
  return mask;
}

}  // namespace tessera
