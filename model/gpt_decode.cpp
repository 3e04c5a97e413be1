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

/// Logits [count, vocabulary_padded] of rows of the last norm's output.
Tensor Gpt::Impl::classify(std::int64_t row, std::int64_t count) const {
  const Tensor x = normed(2 * config.layers).slice(row * C, count * C).view({count, C});
  const Tensor logits = plan[memory.logits].view({count, config.vocabulary_padded});
  ops.linear_forward({.x = x, .w = w.wte, .bias = {}, .y = logits, .pre_activation = {}});
  return logits;
}

/// [rows, vocabulary] of such logits.
std::vector<float> Gpt::Impl::host_logits(const Tensor& logits) const {
  const std::int64_t count = logits.shape[0], V = config.vocabulary, padded = config.vocabulary_padded;  // the rest of a row is padding
  std::vector<float> host(static_cast<std::size_t>(count * V));
  const auto download = [&]<class T>(T, auto&& to_float) {
    std::vector<T> all(static_cast<std::size_t>(count * padded));  // at once: a GPU takes long to answer, not to send
    ops.download(all.data(), logits);
    for (std::int64_t r = 0; r < count; ++r) std::transform(all.begin() + r * padded, all.begin() + r * padded + V, host.begin() + r * V, to_float);
  };
  if (logits.dtype == DType::f32) {
    download(float{}, [](float x) { return x; });
  } else {
    download(std::uint16_t{}, from_bf16);
  }
  return host;
}

/// One token of each sequence, to its logits. A pass of as many rows as the one before is the same work in the same memory: a device that records
/// work is asked for it in one call, but for the first, in which libraries choose their kernels.
void Gpt::Impl::decode_pass(const Batch& batch, const CachePass& pass) {
  const auto work = [&] {
    trunk(batch, false, &pass);
    classify(0, N);
  };
  if (decoding.rows != N) {
    decoding.rows = 0;  // until a pass of so many is done
    decoding.recorded.reset();
    work();
    decoding.rows = N;
    return;
  }
  if (!decoding.recorded && decoding.records && !hooks.before_forward) {
    decoding.rows = 0;  // should recording fail, the next pass is called again
    decoding.recorded = ops.record(work);
    decoding.records = decoding.recorded != nullptr;
    decoding.rows = N;
  }
  decoding.recorded ? decoding.recorded->replay() : work();
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
  if (config.attention.adds_edges()) a.z = plan[memory.blocks[layer].z].view({B, H});
  if (memory.decode_workspace >= 0) a.workspace = plan[memory.decode_workspace];
  ops.attention_decode(a);
}

// -- Public -----------------------------------------------------------------------------------------------------------

std::vector<float> Gpt::next_logits(std::span<const std::int32_t> tokens) {
  if (tokens.empty()) throw std::invalid_argument("there is no next token of an empty sequence; give at least one token");
  impl_->check_tokens(tokens);
  const auto T = std::min({static_cast<std::int64_t>(tokens.size()), impl_->config.context, impl_->options.tokens});
  impl_->run_sequence(tokens.last(static_cast<std::size_t>(T)), nullptr);
  return impl_->host_logits(impl_->classify(T - 1, 1));
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
  return impl_->host_logits(impl_->classify(T - 1, 1));
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
  impl_->decode_pass(batch, pass);
  for (const NextToken& n : next) ++impl_->cached[static_cast<std::size_t>(n.sequence)];
  return impl_->host_logits(impl_->plan[impl_->memory.logits].view({rows, impl_->config.vocabulary_padded}));
}

std::int64_t Gpt::cached_tokens(std::int64_t sequence) const {
  if (sequence < 0 || sequence >= static_cast<std::int64_t>(impl_->cached.size()))
    throw std::logic_error(fmt::format("Gpt: sequence {} of a cache of {}", sequence, impl_->cached.size()));
  return impl_->cached[static_cast<std::size_t>(sequence)];
}

}  // namespace tessera
