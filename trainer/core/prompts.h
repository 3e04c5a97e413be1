#pragma once
// From an item to what the model sees, by the rules of nanochat's core_eval (which follows mosaicml/llm-foundry's in-context learning tasks): some
// other items with their answers, a blank line after each, then the item itself; the end of text once in front. Pure functions.

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "data/tokenizer.h"
#include "trainer/core/bundle.h"

namespace tessera {

/// str.strip(): without the white space (Unicode's) at both ends.
std::string_view python_strip(std::string_view text);

/// The items of an evaluation: shuffled as random.Random(1337).shuffle does, then the first `limit` of them (0: all).
std::vector<CoreItem> select_items(std::vector<CoreItem> items, std::size_t limit);

/// Which items are shown before item `index` of `items`, in order: random.Random(1234 + index).sample of all the others.
std::vector<std::size_t> few_shot_indices(std::size_t items, std::size_t index, std::size_t shots);

/// The texts for item `index`, one a candidate. Language modelling has two: the prompt without the continuation, stripped, and the prompt with it. A
/// space before the continuation belongs to its first token, so it must not end the prompt without.
std::vector<std::string> render_prompts(const CoreTask& task, std::span<const CoreItem> items, std::size_t index);

/// A candidate as the model sees it: tokens[first, last) are the answer, on whose loss (or prediction) it is judged.
struct CorePrompt {
  std::vector<std::int32_t> tokens;
  std::size_t first = 0, last = 0;
  bool cut = false;   // longer than the context: the first tokens are gone
  bool whole = true;  // no token of the answer is among those, nor the one before it
  bool empty() const { return first >= last; }
};

/// The prompts of item `index`: one a candidate, one alone for language modelling. Each text is encoded as a whole, after end of text. The answer is
///   multiple choice      what follows the longest common prefix of the candidates
///   schema               the longest common suffix of the candidates
///   language modelling   what the prompt with the continuation has after its common prefix with the one without
/// Of a prompt longer than `context` the last tokens are kept, and the answer moves with them. Token 0 is never part of an answer: nothing stands
/// before it. An answer is empty when a candidate is the beginning of all the others, or nothing is left of it.
std::vector<CorePrompt> make_prompts(const CoreTask& task, std::span<const CoreItem> items, std::size_t index, const Tokenizer& tokenizer,
                                     std::size_t context);

}  // namespace tessera
