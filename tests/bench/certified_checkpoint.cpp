// An experiment: which inactive tiles of a trained model could be certified before q k^T is computed, and how many tiles are active at other sizes?
//
//   certified_checkpoint --checkpoint RUN --data FOLDER [--sequences 8] [--device cpu|cuda] [--threads N]
//
// Runs the first sequences of the validation split through the model, takes q and k of every layer as its attention reads them (unit length,
// rotated), thresholds and scales, and prints for each layer and for tiles of 16, 32, 64 and 128: the share of causal edges and tiles that are active
// (by all scores: the oracle), and the share of the inactive tiles that each bound of certified_tiles.h certifies.
//
// For cosine scores under a threshold of mode fixed, controlled or learned, in causal layers without a document mask: there an edge is active where
// <q, k> > tau / scale.

#include <fmt/format.h>

#include <cstdio>
#include <string>
#include <vector>

#include "certified_tiles.h"
#include "data/loader.h"
#include "kernels/bf16.h"
#include "kernels/comm/communicator.h"
#include "trainer/checkpoint.h"
#include "trainer/device.h"
#include "trainer/open_data.h"
#include "trainer/train_state.h"

namespace {

using namespace tessera;
using certified::Counts, certified::Floats, certified::Head;

struct Options {
  std::string checkpoint, data, device = "cpu";
  std::int64_t sequences = 8;
  int threads = 0;
};

Options parse(int argc, char** argv) {
  Options o;
  for (int n = 1; n < argc; n += 2) {
    const std::string arg = argv[n];
    if (n + 1 == argc) throw std::invalid_argument("unknown option or missing value: " + arg);
    const std::string value = argv[n + 1];
    if (arg == "--checkpoint")
      o.checkpoint = value;
    else if (arg == "--data")
      o.data = value;
    else if (arg == "--device")
      o.device = value;
    else if (arg == "--sequences")
      o.sequences = std::stoll(value);
    else if (arg == "--threads")
      o.threads = std::stoi(value);
    else
      throw std::invalid_argument("unknown option: " + arg);
  }
  if (o.checkpoint.empty() || o.data.empty()) throw std::invalid_argument("--checkpoint and --data must be given");
  if (o.sequences < 1) throw std::invalid_argument("--sequences must be at least 1");
  return o;
}

void check(const ModelConfig& m) {
  const AttentionConfig& a = m.attention;
  bool causal = true;
  for (int l = 0; l < m.layers; ++l)
    for (int h = 0; h < m.heads; ++h) causal = causal && a.pattern.at(l, h).kind == PatternSpec::Kind::causal;
  if (a.score != Score::cosine || a.gate == Gate::softmax || a.threshold.mode == ThresholdMode::length || !causal || a.document_mask)
    throw std::invalid_argument(
        "the experiment is for attention.score cosine, a relu gate, threshold.mode fixed, controlled or learned, causal patterns and no "
        "document_mask");
}

Floats download(Ops& ops, const Tensor& t) {
  Floats values(static_cast<std::size_t>(t.numel()));
  if (t.dtype == DType::f32) {
    ops.download(values.data(), t);
  } else {
    std::vector<std::uint16_t> narrow(values.size());
    ops.download(narrow.data(), t);
    std::transform(narrow.begin(), narrow.end(), values.begin(), from_bf16);
  }
  return values;
}

/// The activations of that name.
Tensor find(const MemoryPlan& plan, const std::string& name) {
  for (std::size_t slot = 0; slot < plan.blocks().size(); ++slot)
    if (plan.blocks()[slot].name == name) return plan[static_cast<MemoryPlan::Slot>(slot)];
  throw std::logic_error("the model keeps no " + name);
}

/// Counts of the tile sizes.
struct Sizes {
  Counts of16, of32, of64, of128;
  void operator+=(const Sizes& o) { of16 += o.of16, of32 += o.of32, of64 += o.of64, of128 += o.of128; }
};

Sizes measure(const Head& head, float threshold) {
  using certified::measure;
  return {measure<16>(head, threshold), measure<32>(head, threshold), measure<64>(head, threshold), measure<128>(head, threshold)};
}

void print(const std::string& name, const Sizes& s) {
  const auto percent = [](std::int64_t x, std::int64_t of) { return of > 0 ? 100.0 * static_cast<double>(x) / static_cast<double>(of) : 0.0; };
  const auto line = [&](int tile, const Counts& c) {
    const std::int64_t inactive = c.tiles - c.active_tiles;
    fmt::print("{:<10} {:>5} {:>10.4f} {:>10.2f} {:>10.2f} {:>10.2f} {:>10.2f}\n", name, tile, percent(c.active_edges, c.edges),
               percent(c.active_tiles, c.tiles), percent(c.by_tile, inactive), percent(c.by_rows, inactive), percent(c.by_parts, inactive));
  };
  line(16, s.of16), line(32, s.of32), line(64, s.of64), line(128, s.of128);
  std::fflush(stdout);
}

void run(int argc, char** argv) {
  const Options o = parse(argc, argv);
  const DatasetInfo data = open_data(o.data);
  const CheckpointInfo info = read_checkpoint_info(resolve_checkpoint(o.checkpoint));
  Config config = parse_config(info.config, info.directory + "/model.h5", {});
  resolve_vocabulary(config, info.dataset.vocabulary, info.directory);
  const ModelConfig& m = config.model;
  check(m);
  if (data.tokenizer_hash != info.dataset.tokenizer_hash) throw std::invalid_argument(o.data + " was made with another tokenizer than the model's");

  const std::unique_ptr<Ops> ops = make_ops(o.device, o.threads);
  MemoryPlan plan;
  // For training, as only such a model keeps every layer's activations.
  Gpt model(m, *ops, plan, {.micro_batch = o.sequences, .training = true});
  const BatchBuffer buffer(plan, o.sequences, m.context);
  plan.allocate(*ops);
  model.bind();
  load_model(info.directory, model, *ops);
  TokenReader reader(data, data.validation);
  const HostBatch batch = read_sequences(reader, 0, o.sequences, m.context);
  model.forward(buffer.upload(*ops, batch));
  double nats = 0;
  for (const float loss : download(*ops, model.losses())) nats += loss;
  fmt::print("{}, {} sequences of {} tokens, {} tokens with targets, loss {:.4f}, {}\n", info.directory, batch.batch, batch.tokens,
             batch.target_tokens, nats / static_cast<double>(batch.target_tokens), ops->device_name());
  fmt::print("{:<10} {:>5} {:>10} {:>10} {:>32}\n", "", "", "active %", "active %", "inactive tiles certified, %");
  fmt::print("{:<10} {:>5} {:>10} {:>10} {:>10} {:>10} {:>10}\n", "", "tile", "edges", "tiles", "tile", "rows", "parts");

  const std::int64_t T = batch.tokens, H = m.heads, D = m.head_size(), row = 3 * H * D;
  const Floats thresholds = download(*ops, model.thresholds());
  Sizes all;
  for (int l = 0; l < m.layers; ++l) {
    const std::string name = fmt::format("h.{}.attn.", l);
    const Floats qkv = download(*ops, find(plan, name + "qkv"));
    const Floats scale = m.attention.learns_scale() ? download(*ops, model.parameter(name + "scale")) : Floats(H, m.attention.scale_init);
    const Floats tau = m.attention.learns_threshold() ? download(*ops, model.parameter(name + "threshold"))
                                                      : Floats(thresholds.begin() + l * H, thresholds.begin() + (l + 1) * H);
    Sizes layer;
    for (std::int64_t h = 0; h < H; ++h) {
      if (!(scale[h] > 0)) throw std::runtime_error(fmt::format("{}scale of head {} is {}: the bounds need a positive one", name, h, scale[h]));
      for (std::int64_t b = 0; b < batch.batch; ++b) {
        Head head{T, D, Floats(T * D), Floats(T * D)};
        for (std::int64_t t = 0; t < T; ++t) {
          const float* q = &qkv[(b * T + t) * row + h * D];
          std::copy_n(q, D, &head.q[t * D]);
          std::copy_n(q + H * D, D, &head.k[t * D]);
        }
        layer += measure(head, tau[h] / scale[h]);
      }
    }
    print(fmt::format("layer {}", l), layer);
    all += layer;
  }
  print("all", all);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(argc, argv);
  } catch (const std::invalid_argument& e) {
    return fmt::print(stderr, "certified_checkpoint: {}\n", e.what()), 2;
  } catch (const std::exception& e) {
    return fmt::print(stderr, "certified_checkpoint: {}\n", e.what()), 1;
  }
}
