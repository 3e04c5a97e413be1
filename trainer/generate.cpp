#include "trainer/generate.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <numeric>
#include <stdexcept>

namespace tessera {
namespace {

/// SplitMix64 (Steele, Lea & Flood, 2014) of the n-th counter of a sample: uniform in [0, 1).
double uniform(std::uint64_t seed, int sample, std::uint64_t n) {
  std::uint64_t z = seed * 0xd1342543de82ef95ull + static_cast<std::uint64_t>(sample) * 0xaef17502108ef2d9ull + (n + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1.0p-53;
}

/// Calls work() and returns the seconds that it took.
template <class F>
double timed(F&& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// A text and the logits of its next token.
struct Text {
  Generation made;
  std::vector<std::int32_t> seen;  // end of text, prompt, new tokens; of the last document only, with attention.document_mask
  std::int64_t place = 0;          // in the cache
  std::vector<float> logits;
};

class Generator {
 public:
  Generator(Gpt& model, const Tokenizer& tokenizer, std::span<const std::string> prompts, const GenerateOptions& o, const GenerateEvents& events)
      : model_(model), tokenizer_(tokenizer), prompts_(prompts), o_(o), events_(events) {
    cache_ = o.recompute ? 0 : model.options().cache;
    for (std::int64_t place = cache_ - 1; place >= 0; --place) free_.push_back(place);
    if (cache_ == 0) free_.push_back(0);  // one text at a time
  }

  GenerateTotals run() {
    while (next_ < prompts_.size() * static_cast<std::size_t>(o_.samples) || !active_.empty()) {
      while (!free_.empty() && next_ < prompts_.size() * static_cast<std::size_t>(o_.samples)) start();
      std::erase_if(active_, [&](Text& text) { return !draw(text); });
      advance();
    }
    return totals_;
  }

 private:
  void start() {
    Text& text = active_.emplace_back();
    text.made.prompt = next_ / static_cast<std::size_t>(o_.samples);
    text.made.sample = static_cast<int>(next_ % static_cast<std::size_t>(o_.samples));
    ++next_;
    text.place = free_.back();
    free_.pop_back();
    text.seen.push_back(static_cast<std::int32_t>(tokenizer_.end_of_text()));
    for (const std::uint32_t t : tokenizer_.encode(prompts_[text.made.prompt])) text.seen.push_back(static_cast<std::int32_t>(t));
    const auto length = static_cast<std::int64_t>(text.seen.size());
    if (length > context() && text.made.sample == 0)
      notice(
          fmt::format("prompt {} has {} tokens with the end of text before it; the model sees the last {}", text.made.prompt + 1, length, context()));
    const double seconds = timed([&] { compute(text); });
    text.made.prefill.add(std::min(length, context()), seconds);
    totals_.prefill.add(std::min(length, context()), seconds);
  }

  /// The logits of a text that has no token of the cache to go on from.
  void compute(Text& text) {
    const auto length = static_cast<std::int64_t>(text.seen.size());
    if (length > model_.options().tokens && model_.options().tokens < context())
      throw std::logic_error(fmt::format("a text of {} tokens in a model for {}", length, model_.options().tokens));
    if (cache_ > 0 && length <= context()) {
      text.logits = model_.prefill(text.place, text.seen);
      return;
    }
    if (length > context() && !said_slow_) {
      said_slow_ = true;
      notice(fmt::format("beyond the context of {0} tokens each token is computed from the last {0} anew: slow from there on", context()));
    }
    text.logits = model_.next_logits(text.seen);
  }

  /// Draws the next token; false when the text is whole.
  bool draw(Text& text) {
    const auto n = text.made.tokens.size();
    const std::uint32_t token = choose_token(text.logits, o_, uniform(o_.seed, text.made.sample, n)), end = tokenizer_.end_of_text();
    if (o_.stop_at_end && token == end) {
      text.made.ended = true;
      finish(text);
      return false;
    }
    text.made.tokens.push_back(token);
    // With a mask, the document that begins here sees nothing of those before it, in training as here.
    if (token == end && model_.config().attention.document_mask) text.seen.clear();
    text.seen.push_back(static_cast<std::int32_t>(token));
    if (events_.on_token) events_.on_token(text.made, token);
    if (static_cast<std::int64_t>(text.made.tokens.size()) < o_.tokens) return true;
    finish(text);
    return false;
  }

  /// The next logits of every text: those whose other tokens are all in the cache together, the rest one by one.
  void advance() {
    std::vector<Gpt::NextToken> next;
    std::vector<Text*> together;
    for (Text& text : active_) {
      const auto length = static_cast<std::int64_t>(text.seen.size());
      if (cache_ > 0 && length > 1 && length <= model_.options().tokens && length <= context()) {
        next.push_back({text.place, text.seen.back()});
        together.push_back(&text);
        continue;
      }
      const double seconds = timed([&] { compute(text); });
      text.made.decode.add(1, seconds);
      totals_.decode.add(1, seconds);
      totals_.recomputed += length > 1;
    }
    if (next.empty()) return;
    std::vector<float> logits;
    const double seconds = timed([&] { logits = model_.decode(next); });
    for (std::size_t i = 0; i < together.size(); ++i) {
      const auto first = logits.begin() + static_cast<std::ptrdiff_t>(i) * model_.config().vocabulary;
      together[i]->logits.assign(first, first + model_.config().vocabulary);
      together[i]->made.decode.add(1, seconds);
    }
    totals_.decode.add(static_cast<std::int64_t>(next.size()), seconds);
  }

  void finish(Text& text) {
    free_.push_back(text.place);
    const auto number = text.made.prompt * static_cast<std::size_t>(o_.samples) + static_cast<std::size_t>(text.made.sample);
    whole_.emplace(number, std::move(text.made));
    for (auto first = whole_.begin(); first != whole_.end() && first->first == told_; first = whole_.erase(first), ++told_)
      if (events_.on_text) events_.on_text(first->second);
  }

  std::int64_t context() const { return model_.config().context; }
  void notice(const std::string& text) const {
    if (events_.on_notice) events_.on_notice(text);
  }

  Gpt& model_;
  const Tokenizer& tokenizer_;
  const std::span<const std::string> prompts_;
  const GenerateOptions& o_;
  const GenerateEvents& events_;
  std::int64_t cache_;              // sequences; 0: none
  std::vector<std::int64_t> free_;  // places in it
  std::vector<Text> active_;
  std::size_t next_ = 0, told_ = 0;          // texts started, and told of
  std::map<std::size_t, Generation> whole_;  // done, and waiting for those before them
  bool said_slow_ = false;
  GenerateTotals totals_;
};

}  // namespace

std::uint32_t choose_token(const std::vector<float>& logits, const GenerateOptions& o, double random) {
  if (o.temperature <= 0) return static_cast<std::uint32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  std::vector<std::uint32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0u);
  const auto likelier = [&](std::uint32_t a, std::uint32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; };
  if (o.top_k > 0 && static_cast<std::size_t>(o.top_k) < order.size()) {
    std::partial_sort(order.begin(), order.begin() + o.top_k, order.end(), likelier);
    order.resize(static_cast<std::size_t>(o.top_k));
  }
  const double top = logits[*std::min_element(order.begin(), order.end(), likelier)];
  const auto weight = [&](std::uint32_t t) { return std::exp((logits[t] - top) / o.temperature); };
  if (o.top_p < 1) {
    double all = 0, reached = 0;
    for (const std::uint32_t t : order) all += weight(t);
    // A heap: the nucleus is small beside the vocabulary, and nothing else needs an order.
    const auto less_likely = [&](std::uint32_t a, std::uint32_t b) { return likelier(b, a); };
    std::make_heap(order.begin(), order.end(), less_likely);
    std::vector<std::uint32_t> nucleus;
    do {
      std::pop_heap(order.begin(), order.end(), less_likely);
      nucleus.push_back(order.back());
      order.pop_back();
      reached += weight(nucleus.back());
    } while (reached < o.top_p * all && !order.empty());
    order = std::move(nucleus);
  }
  std::vector<double> cumulative;
  cumulative.reserve(order.size());
  double sum = 0;
  for (const std::uint32_t t : order) cumulative.push_back(sum += weight(t));
  const auto drawn = std::upper_bound(cumulative.begin(), cumulative.end(), random * sum) - cumulative.begin();
  return order[std::min<std::size_t>(static_cast<std::size_t>(drawn), order.size() - 1)];
}

GenerateTotals generate(Gpt& model, const Tokenizer& tokenizer, std::span<const std::string> prompts, const GenerateOptions& options,
                        const GenerateEvents& events) {
  return Generator(model, tokenizer, prompts, options, events).run();
}

std::vector<std::uint32_t> generate(Gpt& model, const Tokenizer& tokenizer, const std::string& prompt, const GenerateOptions& options) {
  GenerateOptions one = options;
  one.samples = 1;
  std::vector<std::uint32_t> tokens;
  generate(model, tokenizer, std::span(&prompt, 1), one,
           {.on_token = {}, .on_text = [&](const Generation& g) { tokens = g.tokens; }, .on_notice = {}});
  return tokens;
}

}  // namespace tessera
