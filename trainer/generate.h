#pragma once
// Text from a model, one token at a time.

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "data/tokenizer.h"
#include "model/gpt.h"

namespace tessera {

struct GenerateOptions {
  std::int64_t tokens = 100;
  double temperature = 1.0;  // 0: always the likeliest token (the lowest id of equals)
  int top_k = 0;             // > 0: only the k likeliest
  std::uint64_t seed = 0;
  bool stop_at_end = true;  // at end of text
};

/// The token drawn from logits / temperature by `random` in [0, 1). Ties at the edge of top_k go to the lower ids.
std::uint32_t choose_token(const std::vector<float>& logits, const GenerateOptions& options, double random);

/// Continues the prompt; `on_token` gets each new token as it comes. The model sees end of text, the prompt and what was generated, as in training
/// documents begin; beyond the context it sees the last `context` tokens. Draw n uses a hash of (seed, n): same seed, same text. Returns the new
/// tokens, without an end of text that ended it.
std::vector<std::uint32_t> generate(
    Gpt& model, const Tokenizer& tokenizer, const std::string& prompt, const GenerateOptions& options,
    const std::function<void(std::uint32_t)>& on_token = [](std::uint32_t) {});

}  // namespace tessera
