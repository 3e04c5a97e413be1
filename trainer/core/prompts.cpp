#include "trainer/core/prompts.h"

#include <algorithm>

#include "trainer/core/python_random.h"

namespace tessera {
namespace {

using Tokens = std::vector<std::int32_t>;

/// The white space of str.isspace(), in UTF-8, that is no single byte.
constexpr std::string_view kWideSpaces[] = {
    "\u0085", "\u00a0", "\u1680", "\u2000", "\u2001", "\u2002", "\u2003", "\u2004", "\u2005", "\u2006",
    "\u2007", "\u2008", "\u2009", "\u200a", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000",
};

bool is_byte_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r') || (c >= '\x1c' && c <= '\x1f'); }

/// Bytes of the white space character at the beginning (the end) of `text`, 0 when there is none.
std::size_t space_in_front(std::string_view text) {
  if (!text.empty() && is_byte_space(text.front())) return 1;
  for (const std::string_view space : kWideSpaces)
    if (text.starts_with(space)) return space.size();
  return 0;
}
std::size_t space_behind(std::string_view text) {
  if (!text.empty() && is_byte_space(text.back())) return 1;
  for (const std::string_view space : kWideSpaces)
    if (text.ends_with(space)) return space.size();
  return 0;
}

std::string text_of(const CoreTask& task, const CoreItem& item, std::size_t candidate) {
  return item.context(candidate) + task.delimiter + item.continuation(candidate);
}

/// Length of the longest beginning that all have.
std::size_t common_prefix(const std::vector<Tokens>& sequences) {
  const Tokens& first = sequences[0];
  std::size_t length = first.size();
  for (const Tokens& s : sequences)
    length = std::min(length, static_cast<std::size_t>(std::mismatch(first.begin(), first.end(), s.begin(), s.end()).first - first.begin()));
  return length;
}

std::size_t common_suffix(std::vector<Tokens> sequences) {
  for (Tokens& s : sequences) std::reverse(s.begin(), s.end());
  return common_prefix(sequences);
}

/// The last `context` tokens at most, with the answer that began at `start`.
CorePrompt fit(Tokens tokens, std::size_t start, std::size_t context) {
  CorePrompt prompt;
  const std::size_t gone = tokens.size() > context ? tokens.size() - context : 0;
  tokens.erase(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(gone));
  prompt.tokens = std::move(tokens);
  prompt.first = start > gone ? start - gone : 1;
  prompt.last = prompt.tokens.size();
  prompt.cut = gone > 0;
  prompt.whole = gone == 0 || start > gone;
  return prompt;
}

}  // namespace

std::string_view python_strip(std::string_view text) {
  while (const std::size_t n = space_in_front(text)) text.remove_prefix(n);
  while (const std::size_t n = space_behind(text)) text.remove_suffix(n);
  return text;
}

std::vector<CoreItem> select_items(std::vector<CoreItem> items, std::size_t limit) {
  PythonRandom(1337).shuffle(items);
  if (limit > 0 && limit < items.size()) items.resize(limit);
  return items;
}

std::vector<std::size_t> few_shot_indices(std::size_t items, std::size_t index, std::size_t shots) {
  if (shots == 0) return {};
  std::vector<std::size_t> indices = PythonRandom(1234 + index).sample(items - 1, shots);
  for (std::size_t& i : indices) i += i >= index ? 1 : 0;  // the others, without a gap where the item itself stands
  return indices;
}

std::vector<std::string> render_prompts(const CoreTask& task, std::span<const CoreItem> items, std::size_t index) {
  std::string shown;
  for (const std::size_t i : few_shot_indices(items.size(), index, task.shots)) shown += text_of(task, items[i], items[i].gold) + "\n\n";
  const CoreItem& item = items[index];
  std::vector<std::string> texts;
  if (task.type == CoreType::language_modeling) texts.emplace_back(python_strip(shown + item.context(0) + task.delimiter));
  for (std::size_t c = 0; c < item.candidates(); ++c) texts.push_back(shown + text_of(task, item, c));
  return texts;
}

std::vector<CorePrompt> make_prompts(const CoreTask& task, std::span<const CoreItem> items, std::size_t index, const Tokenizer& tokenizer,
                                     std::size_t context) {
  std::vector<Tokens> sequences;
  for (const std::string& text : render_prompts(task, items, index)) {
    Tokens& tokens = sequences.emplace_back(1, static_cast<std::int32_t>(tokenizer.end_of_text()));
    for (const std::uint32_t t : tokenizer.encode(text)) tokens.push_back(static_cast<std::int32_t>(t));
  }
  const std::size_t common = task.type == CoreType::schema ? common_suffix(sequences) : common_prefix(sequences);
  if (task.type == CoreType::language_modeling) sequences.erase(sequences.begin());  // the prompt without has told where the continuation begins
  std::vector<CorePrompt> prompts;
  for (Tokens& tokens : sequences) {
    const std::size_t start = task.type == CoreType::schema ? tokens.size() - common : common;
    prompts.push_back(fit(std::move(tokens), start, context));
  }
  return prompts;
}

}  // namespace tessera
