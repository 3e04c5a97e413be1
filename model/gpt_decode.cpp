// Generation: next-token logits of a sequence, computed whole or with the keys and values of its earlier tokens.

#include <fmt/format.h>

#include <numeric>
#include <stdexcept>

#include "kernels/bf16.h"
#include "model/gpt_impl.h"

namespace tessera {

void Gpt::Impl::check_tokens(std::span<const std::int32_t> tokens) const {
  for (const std::int32_t t : tokens) {
    if (t < 0 || t >= config.vocabulary)
      throw std::invalid_argument(fmt::format("token {} for a model with a vocabulary of {}", t, config.vocabulary));
  }
}

Tensor Gpt::Impl::upload(MemoryPlan::Slot slot, std::span<const std::int32_t> host, Shape shape) const {
  const Tensor t = plan[slot].view(shape);
  ops.upload(t, host.data());
  return t;
}

/// The trunk over one sequence, a document of its own from position 0.
void Gpt::Impl::run_sequence(std::span<const std::int32_t> tokens, const CachePass* cache) {
  if (shared) throw std::logic_error("Gpt: generation where ranks share sequences");
  std::vector<std::int32_t> positions(tokens.size());
  std::iota(positions.begin(), positions.end(), 0);
  const std::vector<std::int32_t> one_document(tokens.size(), 0);
  const Shape shape{1, static_cast<std::int64_t>(tokens.size())};
  Batch batch;
  batch.tokens = upload(memory.prompt_tokens, tokens, shape);
  batch.positions = upload(memory.prompt_positions, positions, shape);
  batch.document_start = upload(memory.prompt_document, one_document, shape);
  begin(batch);
  trunk(batch, false, cache);
}

/// [count, vocabulary] on the host, of rows of the last norm's output.
std::vector<float> Gpt::Impl::logits_of(std::int64_t row, std::int64_t count) const {
  const Tensor x = normed(2 * config.layers).slice(row * C, count * C).view({count, C});
  const Tensor logits = plan[memory.logits].view({count, config.vocabulary_padded});
  ops.linear_forward({.x = x, .w = w.wte, .bias = {}, .y = logits, .pre_activation = {}});
  std::vector<float> host(static_cast<std::size_t>(count * config.vocabulary));
  std::vector<std::uint16_t> narrow(logits.dtype == DType::f32 ? 0 : static_cast<std::size_t>(config.vocabulary));
  for (std::int64_t r = 0; r < count; ++r) {
    const Tensor known = logits.slice(r * config.vocabulary_padded, config.vocabulary);  // the rest is padding
    float* to = host.data() + r * config.vocabulary;
    if (narrow.empty()) {
      ops.download(to, known);
    } else {
      ops.download(narrow.data(), known);
      std::transform(narrow.begin(), narrow.end(), to, from_bf16);
    }
  }
  return host;
}

KeyValueCache Gpt::Impl::cache_of(int layer) const {
  const std::int64_t elements = options.cache * 2 * H * options.tokens * D;
  return {plan[memory.cache].slice(layer * elements, elements), options.cache, H, options.tokens, D};
}

void Gpt::Impl::append_to_cache(int layer, const CachePass& pass) const {
  CacheAppend a;
  a.cache = cache_of(layer);
  a.qkv = rows(memory.blocks[layer].qkv, 3 * C);
  a.sequences = pass.sequences;
  a.positions = pass.positions;
  ops.cache_append(a);
}

void Gpt::Impl::attend_to_cache(int layer, const CachePass& pass) const {
  AttentionDecode a;
  a.cache = cache_of(layer);
  a.math = math;
  a.tiles = device_tiles[layer].get();
  a.qkv = rows(memory.blocks[layer].qkv, 3 * C);
  a.sequences = pass.sequences;
  a.positions = pass.positions;
  a.scale = scale(layer);
  a.threshold = threshold(layer);
  a.o = rows(memory.blocks[layer].attention, C);
  ops.attention_decode(a);
}

// -- Public -----------------------------------------------------------------------------------------------------------

std::vector<float> Gpt::next_logits(std::span<const std::int32_t> tokens) {
  if (tokens.empty()) throw std::invalid_argument("there is no next token of an empty sequence; give at least one token");
  impl_->check_tokens(tokens);
  const auto T = std::min({static_cast<std::int64_t>(tokens.size()), impl_->config.context, impl_->options.tokens});
  impl_->run_sequence(tokens.last(static_cast<std::size_t>(T)), nullptr);
  return impl_->logits_of(T - 1, 1);
}

std::vector<float> Gpt::prefill(std::int64_t sequence, std::span<const std::int32_t> tokens) {
  const auto T = static_cast<std::int64_t>(tokens.size());
  if (sequence < 0 || sequence >= impl_->options.cache || T < 1 || T > impl_->options.tokens)
    throw std::logic_error(fmt::format("Gpt: {} tokens for cached sequence {}; the cache holds {} sequences of at most {} tokens", T, sequence,
                                       impl_->options.cache, impl_->options.tokens));
  impl_->check_tokens(tokens);
  const std::int32_t name = static_cast<std::int32_t>(sequence), first = 0;
  const Impl::CachePass pass{impl_->upload(impl_->memory.cache_sequences, {&name, 1}, {1}),
                             impl_->upload(impl_->memory.cache_positions, {&first, 1}, {1}), false};
  impl_->cached[static_cast<std::size_t>(sequence)] = 0;  // until the pass is done
  impl_->run_sequence(tokens, &pass);
  impl_->cached[static_cast<std::size_t>(sequence)] = T;
  return impl_->logits_of(T - 1, 1);
}

std::vector<float> Gpt::decode(std::span<const NextToken> next) {
  const auto rows = static_cast<std::int64_t>(next.size());
  std::vector<std::int32_t> tokens, sequences, positions;
  std::vector<bool> named(impl_->cached.size());
  for (const NextToken& n : next) {
    const std::int64_t length = cached_tokens(n.sequence);
    if (length == 0 || length >= impl_->options.tokens || named[static_cast<std::size_t>(n.sequence)])
      throw std::logic_error(fmt::format("Gpt: decode of sequence {}, which holds {} of at most {} tokens{}", n.sequence, length,
                                         impl_->options.tokens, named[static_cast<std::size_t>(n.sequence)] ? " and is named twice" : ""));
    named[static_cast<std::size_t>(n.sequence)] = true;
    tokens.push_back(n.token);
    sequences.push_back(static_cast<std::int32_t>(n.sequence));
    positions.push_back(static_cast<std::int32_t>(length));
  }
  if (next.empty()) return {};
  impl_->check_tokens(tokens);
  Batch batch;
  batch.tokens = impl_->upload(impl_->memory.prompt_tokens, tokens, {rows, 1});
  batch.positions = impl_->upload(impl_->memory.cache_positions, positions, {rows, 1});
  const Impl::CachePass pass{impl_->upload(impl_->memory.cache_sequences, sequences, {rows}), batch.positions.view({rows}), true};
  impl_->B = impl_->N = rows;
  impl_->T = 1;
  impl_->trunk(batch, false, &pass);
  for (const NextToken& n : next) ++impl_->cached[static_cast<std::size_t>(n.sequence)];
  return impl_->logits_of(0, rows);
}

std::int64_t Gpt::cached_tokens(std::int64_t sequence) const {
  if (sequence < 0 || sequence >= static_cast<std::int64_t>(impl_->cached.size()))
    throw std::logic_error(fmt::format("Gpt: sequence {} of a cache of {}", sequence, impl_->cached.size()));
  return impl_->cached[static_cast<std::size_t>(sequence)];
}

}  // namespace tessera
