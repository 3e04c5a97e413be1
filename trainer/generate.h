#pragma once
// Text from a model, one token at a time, for one prompt or many.

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "data/tokenizer.h"
#include "model/gpt.h"

namespace tessera {

/// How a token is chosen, in this order (that of Hugging Face's generate): logits / temperature, the top_k likeliest, of what they then have together
/// the fewest that reach top_p (nucleus sampling: Holtzman et al., arXiv 1904.09751), a draw in proportion.
struct GenerateOptions {
  std::int64_t tokens = 100;
  double temperature = 1.0;  // 0: always the likeliest token (the lowest id of equals)
  int top_k = 0;             // > 0: only the k likeliest
  double top_p = 1.0;        // < 1: only the fewest likeliest tokens whose probabilities sum to at least this; always one
  std::uint64_t seed = 0;
  int samples = 1;          // texts of each prompt
  bool stop_at_end = true;  // at end of text
  bool recompute = false;   // without the model's cache
};

/// The token drawn from logits by `random` in [0, 1). Ties at the edge of top_k and top_p go to the lower ids.
std::uint32_t choose_token(const std::vector<float>& logits, const GenerateOptions& options, double random);

/// Tokens computed, and how long that took.
struct Work {
  std::int64_t tokens = 0;
  double seconds = 0;
  double rate() const { return seconds > 0 ? static_cast<double>(tokens) / seconds : 0; }
  void add(std::int64_t more, double time) { tokens += more, seconds += time; }
};

/// A text in the making.
struct Generation {
  std::size_t prompt = 0;             // which of the prompts
  int sample = 0;                     // which text of it
  std::vector<std::uint32_t> tokens;  // the new ones, without an end of text that ended it
  bool ended = false;                 // by end of text
  Work prefill;                       // the prompt, end of text before it included, as far as the model saw it
  Work decode;                        // a token at a time; the time is that of all the texts that were computed together
};

struct GenerateEvents {
  std::function<void(const Generation&, std::uint32_t token)> on_token;  // each new one as it comes
  std::function<void(const Generation&)> on_text;                        // each text when it is whole, in the order of prompts and samples
  std::function<void(const std::string&)> on_notice;                     // what the user should know
};

struct GenerateTotals {
  Work prefill, decode;
  std::int64_t recomputed = 0;  // tokens of `decode` for which the whole text was computed again
};

/// Continues every prompt, `samples` times. The model sees end of text, the prompt and what was generated, as in training documents begin. With the
/// model's cache (Gpt::Options::cache) as many texts as it holds are made at once, and a token costs one position; without, or with `recompute`, one
/// text after another, and a token costs the whole text. Beyond the context the model sees the last `context` tokens, their positions counted anew:
/// nothing of the cache fits those, every token is computed from all of them, and a notice says so. A text that outgrows the cache below the context
/// is a std::logic_error: Gpt::Options::tokens is the context or holds every prompt with its tokens.
///
/// Draw n of sample s uses a hash of (seed, s, n): on the CPU (a batch of at most kFewRows) and with a GPU's batch-invariant operations, a prompt's
/// texts are a function of it, the options and the model, whatever else is in the batch and however many threads compute.
GenerateTotals generate(Gpt& model, const Tokenizer& tokenizer, std::span<const std::string> prompts, const GenerateOptions& options,
                        const GenerateEvents& events);

/// The same for one prompt and one sample: the new tokens.
std::vector<std::uint32_t> generate(Gpt& model, const Tokenizer& tokenizer, const std::string& prompt, const GenerateOptions& options);

}  // namespace tessera
