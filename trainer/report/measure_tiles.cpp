#include "trainer/report/measure_tiles.h"

#include <fmt/core.h>

#include <algorithm>
#include <functional>
#include <memory>

#include "data/loader.h"
#include "trainer/metrics.h"
#include "trainer/open_checkpoint.h"
#include "trainer/open_data.h"
#include "trainer/tile_bitmap.h"

namespace tessera {

namespace {

constexpr int kSmall = kTileSizes.front();

/// Sequences to measure on, `tokens` each.
struct ValidationSequences {
  std::string name;  // of the data
  std::int64_t count = 0, tokens = 0;
  std::function<HostBatch(std::int64_t)> read;
};

/// Of the first dataset of the run that has validation text, or of its synthetic task.
ValidationSequences validation_sequences(const OpenCheckpoint& open) {
  const TrainingData data = open_training_data(open.config.data);
  if (data.synthetic) {
    const SyntheticSource source(*data.synthetic, open.context, SyntheticSource::Split::validation, open.config.run.seed);
    return {data.names(), kSyntheticValidation, open.context,
            [source](std::int64_t s) { return read_sequences(source, static_cast<std::uint64_t>(s), 1); }};
  }
  if (data.first().tokenizer_hash != open.info.dataset.tokenizer_hash)
    throw ConfigError(fmt::format("{}: made with another tokenizer than {} was trained with", data.names(), open.info.directory));
  for (const MixPart& part : data.parts) {
    const SplitInfo& split = part.data.validation;
    if (split.tokens < 2) continue;
    const auto last = static_cast<std::int64_t>(split.tokens) - 1, tokens = std::min(open.context, last);
    return {part.data.directory, last / tokens, tokens, [reader = std::make_shared<TokenReader>(part.data, split), tokens](std::int64_t s) {
              return read_sequences(*reader, static_cast<std::uint64_t>(s), 1, tokens);
            }};
  }
  throw ConfigError(fmt::format("{}: no validation split", data.names()));
}

/// The states of tiles that the pattern alone decides: future, structural, or skipped until one is seen to be active.
std::vector<TileState> pattern_states(const TileMap& map, int head, std::int64_t tiles) {
  std::vector<TileState> state(static_cast<std::size_t>(tiles * tiles), TileState::structural);
  const TileGroup& group = map.groups[static_cast<std::size_t>(map.group_of_head[static_cast<std::size_t>(head)])];
  for (std::int64_t q = 0; q < tiles; ++q) {
    std::fill(state.begin() + q * tiles + q + 1, state.begin() + (q + 1) * tiles, TileState::future);
    for (std::int64_t e = group.query_offsets[q]; e < group.query_offsets[q + 1]; ++e)
      if (const std::int64_t k = group.query_entries[e].tile; k <= q) state[q * tiles + k] = TileState::skipped;
  }
  return state;
}

/// Where the model's forward pass leaves the active tiles of the block that it was in last.
Tensor active_tiles(const OpenCheckpoint& open) {
  const auto& blocks = open.plan.blocks();
  const auto found = std::ranges::find_if(blocks, [](const MemoryPlan::Block& b) { return b.name.ends_with("attn.active_tiles"); });
  if (found == blocks.end()) throw std::logic_error("the model's plan has no active tiles");
  return open.plan[static_cast<MemoryPlan::Slot>(found - blocks.begin())];
}

}  // namespace

HeadTiles coarser(const HeadTiles& map, int times) {
  HeadTiles out{map.layer, map.head, (map.tiles + times - 1) / times, {}};
  out.state.assign(static_cast<std::size_t>(out.tiles * out.tiles), TileState::future);
  for (std::int64_t q = 0; q < map.tiles; ++q)
    for (std::int64_t k = 0; k < map.tiles; ++k) {
      TileState& state = out.state[q / times * out.tiles + k / times];
      state = std::max(state, map.state[q * map.tiles + k]);
    }
  return out;
}

TileTally tally(const HeadTiles& map) {
  TileTally t;
  for (const TileState state : map.state) {
    t.causal += state != TileState::future;
    t.idle += state == TileState::structural || state == TileState::skipped;
  }
  return t;
}

TileMeasurement measure_tiles(const std::string& run, const MeasureOptions& o) {
  const auto alone = make_single_communicator();
  OpenCheckpoint::Options options;
  options.threads = o.threads;
  options.visit = "active";
  options.device = "cpu";
  options.micro_batch = 1;
  options.tile = kSmall;
  const Config config = read_checkpoint(run).config;
  options.context = config.data.synthetic ? config.model.context : std::min(o.tokens, config.model.context);  // a task is made for its context
  const OpenCheckpoint open(run, OpenCheckpoint::Use::evaluate, options, *alone);
  const ValidationSequences data = validation_sequences(open);
  const ModelConfig& model = open.config.model;
  const std::int64_t tokens = data.tokens;

  TileMeasurement m;
  m.checkpoint = open.info.directory;
  m.data = data.name;
  m.step = open.info.position.step;
  m.tokens = tokens;
  m.sequences = std::min(o.sequences, data.count);
  const std::int64_t tiles = (tokens + kSmall - 1) / kSmall;
  const Tensor bitmap = active_tiles(open);
  const std::int64_t rows = model.heads * tiles;
  std::vector<std::uint32_t> bits(static_cast<std::size_t>(bitmap.numel()));
  std::vector<std::vector<std::array<TileTally, kTileSizes.size()>>> sums(static_cast<std::size_t>(model.layers));
  for (auto& layer : sums) layer.resize(static_cast<std::size_t>(model.heads));

  const auto take = [&](int layer, bool first) {
    open.ops->download(bits.data(), bitmap);
    const auto active = unpack_tiles(bits, rows, tiles);
    const auto map = make_tile_map(model.attention.pattern, layer, model.heads, tokens, kSmall, kSmall);
    for (int h = 0; h < model.heads; ++h) {
      HeadTiles head{layer, h, tiles, pattern_states(*map, h, tiles)};
      for (std::int64_t t = 0; t < tiles * tiles; ++t)
        if (active[h * tiles * tiles + t]) head.state[t] = TileState::active;
      for (std::size_t size = 0; size < kTileSizes.size(); ++size) {
        const TileTally t = tally(coarser(head, kTileSizes[size] / kSmall));
        sums[layer][h][size].idle += t.idle;
        sums[layer][h][size].causal += t.causal;
      }
      if (first) m.first_sequence.push_back(std::move(head));
    }
  };
  open.model->zero_counters();
  for (std::int64_t s = 0; s < m.sequences; ++s) {
    Gpt::Hooks hooks;
    hooks.before_forward = [&](int block) {
      if (block > 0) take(block - 1, s == 0);
    };
    open.model->set_hooks(hooks);
    open.model->forward(open.batch->upload(*open.ops, data.read(s)));
    take(model.layers - 1, s == 0);
  }
  open.model->set_hooks({});

  std::vector<std::uint64_t> counters(static_cast<std::size_t>(open.model->counters().numel()));
  open.ops->download(counters.data(), open.model->counters());
  m.edge_sparsity = AttentionCounts(model, std::move(counters), m.sequences, tokens).all().edge_sparsity;
  std::array<TileTally, kTileSizes.size()> all{};
  const auto rate = [](const TileTally& t) { return static_cast<double>(t.idle) / static_cast<double>(t.causal); };
  for (const auto& layer : sums) {
    m.head_skip_rate.emplace_back();
    for (const auto& head : layer) {
      auto& rates = m.head_skip_rate.back().emplace_back();
      for (std::size_t size = 0; size < kTileSizes.size(); ++size) {
        rates[size] = rate(head[size]);
        all[size].idle += head[size].idle;
        all[size].causal += head[size].causal;
      }
    }
  }
  for (std::size_t size = 0; size < kTileSizes.size(); ++size) m.skip_rate[size] = rate(all[size]);
  return m;
}

}  // namespace tessera
