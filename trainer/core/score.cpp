#include "trainer/core/score.h"

#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <future>
#include <limits>
#include <numeric>

#include "trainer/collective.h"

namespace tessera {
namespace {

/// The prompts of a part, each different one of an item once: equal prompts have equal losses, whatever row of a batch they stand in.
struct PartPrompts {
  std::vector<CorePrompt> prompts;                  // of all its items
  std::vector<std::vector<std::size_t>> candidate;  // by item: the index in `prompts` of each candidate
};

PartPrompts make_part(const CoreWork& work, const CoreWork::Part& part, const Tokenizer& tokenizer, std::size_t context) {
  PartPrompts made;
  for (const std::size_t item : part.items) {
    std::vector<std::size_t>& candidates = made.candidate.emplace_back();
    const std::size_t first = made.prompts.size();
    for (CorePrompt& prompt : make_prompts(work.task, work.items, item, tokenizer, context)) {
      const auto same = [&](const CorePrompt& p) { return p.tokens == prompt.tokens && p.first == prompt.first; };
      const auto found = std::find_if(made.prompts.begin() + static_cast<std::ptrdiff_t>(first), made.prompts.end(), same);
      candidates.push_back(static_cast<std::size_t>(found - made.prompts.begin()));
      if (found == made.prompts.end()) made.prompts.push_back(std::move(prompt));
    }
  }
  return made;
}

/// Prompts as the rows of a batch, padded on the right. All of a row is one document, for models with attention.document_mask. Targets are those of
/// the answer.
HostBatch batch_of(std::span<const CorePrompt> prompts, std::int32_t padding) {
  std::size_t longest = 0;
  for (const CorePrompt& p : prompts) longest = std::max(longest, p.tokens.size());
  HostBatch batch;
  batch.batch = static_cast<std::int64_t>(prompts.size());
  batch.tokens = static_cast<std::int64_t>(longest);
  for (const CorePrompt& p : prompts) {
    const std::size_t row = batch.token.size();
    batch.token.insert(batch.token.end(), p.tokens.begin(), p.tokens.end());
    batch.token.resize(row + longest, padding);
    batch.target.resize(row + longest, -1);
    for (std::size_t t = p.first; t < p.last; ++t) batch.target[row + t - 1] = p.tokens[t];
    batch.position.resize(row + longest);
    std::iota(batch.position.begin() + static_cast<std::ptrdiff_t>(row), batch.position.end(), 0);
  }
  batch.document_start.assign(batch.token.size(), 0);
  return batch;
}

struct Judged {
  double mean_loss = std::numeric_limits<double>::infinity();  // over the answer; infinite when that is empty
  bool predicted = false;                                      // all of the answer
};

Judged judge(const CorePrompt& p, const HostBatch& batch, std::size_t row, const TokenScores& scores) {
  if (p.empty()) return {};
  Judged judged{0, p.whole && !scores.predictions.empty()};
  const std::size_t start = row * static_cast<std::size_t>(batch.tokens);
  for (std::size_t t = start + p.first - 1; t < start + p.last - 1; ++t) {
    judged.mean_loss += scores.losses[t];
    judged.predicted = judged.predicted && scores.predictions[t] == batch.target[t];
  }
  judged.mean_loss /= static_cast<double>(p.last - p.first);
  return judged;
}

/// The lowest mean loss; the first of equals.
std::size_t lowest(const std::vector<std::size_t>& candidates, const std::vector<Judged>& judged) {
  const auto lower = [&](std::size_t a, std::size_t b) { return judged[a].mean_loss < judged[b].mean_loss; };
  return static_cast<std::size_t>(std::min_element(candidates.begin(), candidates.end(), lower) - candidates.begin());
}

}  // namespace

ScoreBatch score_with(Gpt& model, Ops& ops, const BatchBuffer& buffer) {
  return [&](const HostBatch& batch, bool predictions, TokenScores& scores) {
    model.forward(buffer.upload(ops, batch), predictions);
    scores.losses.resize(batch.token.size());
    ops.download(scores.losses.data(), model.losses());
    if (!predictions) return;
    scores.predictions.resize(batch.token.size());
    ops.download(scores.predictions.data(), model.predictions());
  };
}

CoreWork::CoreWork(const CoreTask& t, std::size_t limit, const Tokenizer& tokenizer, const BatchLimits& limits) : task(t) {
  items = read_core_items(task);
  available = items.size();
  items = select_items(std::move(items), limit);
  struct Length {
    std::size_t item, prompts, bytes, longest;
  };
  std::vector<Length> lengths;
  double tokens_per_byte = 1;
  for (std::size_t i = 0; i < items.size(); ++i) {
    std::vector<std::string> texts = render_prompts(task, items, i);
    if (task.type == CoreType::language_modeling) texts.erase(texts.begin());
    Length& l = lengths.emplace_back(Length{i, texts.size(), 0, 0});
    for (const std::string& text : texts) l.bytes += text.size(), l.longest = std::max(l.longest, text.size());
    if (i == 0) tokens_per_byte = static_cast<double>(1 + tokenizer.encode(texts[0]).size()) / static_cast<double>(1 + texts[0].size());
  }
  std::stable_sort(lengths.begin(), lengths.end(), [](const Length& a, const Length& b) { return a.longest > b.longest; });
  std::size_t prompts = limits.sequences;
  for (const Length& l : lengths) {
    if (prompts + l.prompts > limits.sequences) {  // the item does not fit beside the others; one alone may take several batches
      parts.emplace_back();
      prompts = 0;
    }
    parts.back().items.push_back(l.item);
    parts.back().tokens += std::min(tokens_per_byte * static_cast<double>(l.bytes), static_cast<double>(l.prompts * limits.context));
    prompts += l.prompts;
  }
}

double CoreWork::tokens(int rank, int ranks) const {
  double sum = 0;
  for (std::size_t i = static_cast<std::size_t>(rank); i < parts.size(); i += static_cast<std::size_t>(ranks)) sum += parts[i].tokens;
  return sum;
}

CoreResult score_task(const CoreWork& work, const Tokenizer& tokenizer, const BatchLimits& limits, const ScoreBatch& score, Communicator& host,
                      const std::function<void(double)>& done) {
  const auto start = std::chrono::steady_clock::now();
  const bool predict = work.task.type == CoreType::language_modeling;
  CoreResult result;
  result.chosen.resize(work.items.size());
  const auto step = static_cast<std::size_t>(host.size());
  // The next part's text is rendered and encoded while the model computes this one's.
  const auto prepare = [&](std::size_t i) {
    return std::async(std::launch::async,
                      [&, i] { return i < work.parts.size() ? make_part(work, work.parts[i], tokenizer, limits.context) : PartPrompts{}; });
  };
  auto next = prepare(static_cast<std::size_t>(host.rank()));
  TokenScores scores;
  for (auto i = static_cast<std::size_t>(host.rank()); i < work.parts.size(); i += step) {
    const CoreWork::Part& part = work.parts[i];
    const PartPrompts made = next.get();
    next = prepare(i + step);
    std::vector<Judged> judged;
    for (std::size_t first = 0; first < made.prompts.size(); first += limits.sequences) {
      const auto rows = std::span(made.prompts).subspan(first, std::min(limits.sequences, made.prompts.size() - first));
      const HostBatch batch = batch_of(rows, static_cast<std::int32_t>(tokenizer.end_of_text()));
      scores.predictions.clear();
      score(batch, predict, scores);
      for (std::size_t r = 0; r < rows.size(); ++r) judged.push_back(judge(rows[r], batch, r, scores));
    }
    for (std::size_t k = 0; k < part.items.size(); ++k) {
      const std::size_t item = part.items[k];
      for (const std::size_t p : made.candidate[k]) {
        if (std::isnan(judged[p].mean_loss))
          throw std::runtime_error(fmt::format("{}:{}: the model's loss on this item is not a number", work.task.file, work.items[item].line));
        ++result.prompts;
        result.tokens += made.prompts[p].tokens.size();
        result.cut += made.prompts[p].cut;
        result.empty += made.prompts[p].empty();
      }
      result.chosen[item] = predict ? judged[made.candidate[k][0]].predicted : lowest(made.candidate[k], judged);
      result.right += predict ? result.chosen[item] : result.chosen[item] == work.items[item].gold;
    }
    done(part.tokens);
  }
  all_reduce_sum(host, result.chosen);  // each item is one rank's, and the others add zeros
  std::uint64_t sums[] = {result.right, result.prompts, result.cut, result.empty, result.tokens};
  all_reduce_sum(host, sums);
  result.right = sums[0], result.prompts = sums[1], result.cut = sums[2], result.empty = sums[3], result.tokens = sums[4];
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

}  // namespace tessera
