// tessera attention: the operator of kernels/attention.h on tensors from a file, with what the model does around it: unit-length q and k for the
// scores that want them, and the norm of each head after the kernel for normalizer rms. Gradients pass through both.

#include <fmt/core.h>

#include <cmath>
#include <filesystem>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "data/files.h"
#include "data/hdf5_file.h"
#include "kernels/memory_plan.h"
#include "trainer/commands/commands.h"
#include "trainer/config.h"
#include "trainer/device.h"
#include "trainer/tile_bitmap.h"

namespace tessera {

namespace {

using Json = nlohmann::ordered_json;
using Floats = std::vector<float>;

struct AttentionOptions {
  std::string in, out;
  std::vector<std::string> sets;
  std::string visit;
  int layer = 0;
  bool document_mask = false, json = false;
};

std::string text_of(const Hdf5Shape& shape) {
  std::string text = "[";
  for (std::size_t n = 0; n < shape.size(); ++n) text += fmt::format("{}{}", n ? ", " : "", shape[n]);
  return text + "]";
}

/// The configuration of this command: attention.*, the device and the threads. Other keys would have no effect.
Config configure(const AttentionOptions& options) {
  std::vector<std::string> sets;
  for (const std::string& set : options.sets) {
    if (!set.starts_with("attention.") && !set.starts_with("attention=") && !set.starts_with("device=") && !set.starts_with("run.threads="))
      throw ConfigError(
          fmt::format("--set {}: tessera attention takes the keys attention.*, device and run.threads; sizes come from the datasets", set));
    sets.push_back(set);
  }
  if (!options.visit.empty()) sets.push_back("attention.visit=" + options.visit);  // the flag wins over --set, as the later of two --set would
  if (options.document_mask) sets.push_back("attention.document_mask=true");
  return load_config("", sets);
}

/// The datasets of IN, checked. Every problem is the user's: std::invalid_argument that names file, dataset, what was expected and found.
class Input {
 public:
  Input(const std::string& path, const AttentionConfig& config) : path_(path), file_(Hdf5File::open(path)) {
    q = tensor("q", {});
    shape = {.batch = extent(0), .heads = extent(1), .tokens = extent(2), .head_size = extent(3)};
    if (shape.head_size % 8 != 0 || shape.head_size > 256)
      fail("q", fmt::format("expected a head size D that is a multiple of 8, up to 256; found {}", shape.head_size));
    k = tensor("k", shape_);
    v = tensor("v", shape_);
    d_o = tensor("do", shape_);
    const std::uint64_t H = shape_[1];
    const bool softmax = config.gate == Gate::softmax;
    const bool uses_tau = !softmax && config.threshold.mode != ThresholdMode::length;
    const bool dot = config.score == Score::dot;
    const float default_scale = dot ? 1.0f / std::sqrt(static_cast<float>(shape.head_size)) : config.scale_init;
    tau = optional("tau", {H}, uses_tau).value_or(Floats(H, uses_tau ? config.threshold.init : 0.0f));
    scale = optional("scale", {H}, !dot).value_or(Floats(H, default_scale));
    gain = optional("gain", {H, shape_[3]}, config.head_norm()).value_or(Floats(H * shape_[3], 1.0f));
    if (config.document_mask) documents();
  }

  /// Datasets that were not read: a misspelt name, or one that these settings do not use.
  std::vector<std::string> unused() const {
    std::vector<std::string> names;
    for (const auto& name : file_.datasets())
      if (!read_.contains(name)) names.push_back(name);
    return names;
  }

  AttentionShape shape;
  Hdf5Shape dims() const { return shape_; }
  Floats q, k, v, d_o;                       // [B, H, T, D]
  Floats tau, scale, gain;                   // [H], [H], [H, D]
  std::vector<std::int32_t> document_start;  // [B, T], or empty

 private:
  [[noreturn]] void fail(const std::string& name, const std::string& what) const {
    throw std::invalid_argument(fmt::format("{}: dataset {}: {}", path_, name, what));
  }
  std::int64_t extent(int n) const { return static_cast<std::int64_t>(shape_[n]); }

  /// A float32 dataset of a shape; `expected` {}: any [B, H, T, D] without an empty extent, which becomes the shape of all.
  Floats tensor(const std::string& name, const Hdf5Shape& expected) {
    read_.insert(name);
    if (!file_.contains(name))
      throw std::invalid_argument(fmt::format("{}: there is no dataset {}; expected q, k, v and do, float32 [B, H, T, D]", path_, name));
    const Hdf5Info info = file_.info(name);
    if (info.type != Hdf5Type::f32) fail(name, fmt::format("expected float32, found {}", to_string(info.type)));
    if (expected.empty()) {
      if (info.shape.size() != 4 || info.elements() == 0)
        fail(name, fmt::format("expected a shape [B, H, T, D], all at least 1; found {}", text_of(info.shape)));
      if (info.shape[2] > std::uint64_t{1} << 30) fail(name, fmt::format("expected at most 2^30 tokens, found {}", info.shape[2]));
      shape_ = info.shape;
    } else if (info.shape != expected) {
      fail(name, fmt::format("expected the shape {}, found {}", text_of(expected), text_of(info.shape)));
    }
    Floats values = file_.read<float>(name);
    for (std::size_t n = 0; n < values.size(); ++n)
      if (!std::isfinite(values[n])) fail(name, fmt::format("element {} is {}; expected finite numbers", place(info.shape, n), values[n]));
    return values;
  }

  std::optional<Floats> optional(const std::string& name, const Hdf5Shape& expected, bool used) {
    if (!used || !file_.contains(name)) return {};
    return tensor(name, expected);
  }

  void documents() {
    const std::string name = "document_start";
    read_.insert(name);
    const Hdf5Shape expected = {shape_[0], shape_[2]};
    if (!file_.contains(name))
      throw std::invalid_argument(
          fmt::format("{}: attention.document_mask is on and there is no dataset {}; expected int32 {}, the first token of each token's document",
                      path_, name, text_of(expected)));
    const Hdf5Info info = file_.info(name);
    if (info.type == Hdf5Type::f32 || info.type == Hdf5Type::f64)
      fail(name, fmt::format("expected integers (int32), found {}", to_string(info.type)));
    if (info.shape != expected) fail(name, fmt::format("expected the shape {}, found {}", text_of(expected), text_of(info.shape)));
    document_start = file_.read<std::int32_t>(name);
    for (std::size_t n = 0; n < document_start.size(); ++n) {
      const auto t = static_cast<std::int64_t>(n) % shape.tokens, start = static_cast<std::int64_t>(document_start[n]);
      const bool starts_itself =
          start >= 0 && start <= t && document_start[n - static_cast<std::size_t>(t) + static_cast<std::size_t>(start)] == start;
      const bool continues = starts_itself && (start == t || document_start[n - 1] == start);
      if (!continues)
        fail(name, fmt::format("element {} is {}; expected {} (a document begins) or what the token before has", place(info.shape, n), start, t));
    }
  }

  /// [1, 0, 3] for the flat index n.
  static std::string place(const Hdf5Shape& shape, std::uint64_t n) {
    Hdf5Shape at(shape.size());
    for (std::size_t d = shape.size(); d-- > 0; n /= shape[d]) at[d] = n % shape[d];
    return text_of(at);
  }

  std::string path_;
  Hdf5File file_;
  Hdf5Shape shape_;
  std::set<std::string> read_;
};

struct Output {
  Floats o, dq, dk, dv;                 // [B, H, T, D]
  Floats z;                             // [B, H, T]
  Floats dtau, dscale, dgain;           // [H], [H], [H, D] with rms
  std::vector<std::uint64_t> counters;  // [H, kAttentionCounters]
  std::vector<std::uint8_t> tile_map;   // [B, H, query tiles, key tiles]: 1 where a tile is active
  std::int64_t query_tiles = 0, key_tiles = 0;
};

Output compute(const Input& in, const Config& config, Ops& ops, int layer) {
  const AttentionConfig& a = config.model.attention;
  const auto [B, H, T, D] = in.shape;
  const std::int64_t N = B * T, C = H * D;
  const auto map = make_tile_map(a.pattern, layer, static_cast<int>(H), T, a.tile_query, a.tile_key);
  const auto tiles = ops.upload_tiles(map);
  const bool unit = a.score != Score::dot, rms = a.head_norm(), documents = !in.document_start.empty();
  const DType type = compute_type(ops.kind());

  MemoryPlan plan;
  const auto reserve = [&](const char* name, DType element, Shape shape) { return plan.reserve(MemoryCategory::activations, name, element, shape); };
  const auto qkv = reserve("qkv", type, {N, 3 * C}), d_qkv = reserve("d_qkv", type, {N, 3 * C});
  const auto o = reserve("o", type, {N, H, D}), d_o = reserve("d_o", type, {N, H, D});
  const auto normed = reserve("o_normed", type, rms ? Shape{N, H, D} : Shape{1}), d_sum = reserve("d_sum", type, rms ? Shape{N, H, D} : Shape{1});
  const auto exact = reserve("exact", DType::f32, {type == DType::f32 ? 0 : N, 3 * C});  // float32 on its way to and from bf16
  const auto gain = reserve("gain", DType::f32, {H, D}), d_gain = reserve("dgain", DType::f32, {H, D}), rstd = reserve("rstd", DType::f32, {N, H});
  const auto inverse_norm = reserve("inverse_norm", DType::f32, {N, 2, H});
  const auto scale = reserve("scale", DType::f32, {H}), tau = reserve("tau", DType::f32, {H});
  const auto d_scale = reserve("dscale", DType::f32, {H}), d_tau = reserve("dtau", DType::f32, {H});
  const auto start = reserve("document_start", DType::i32, documents ? Shape{B, T} : Shape{1});
  const auto z = reserve("z", DType::f32, {B, H, T});
  const auto bitmap = reserve("active_tiles", DType::u32, {B, H, map->query_tiles, bitmap_words(map->key_tiles)});
  const auto counters = reserve("counters", DType::u64, {H, kAttentionCounters});
  const auto workspace = reserve("workspace", DType::f32, {attention_backward_workspace(in.shape, a.tile_query)});
  plan.allocate(ops);
  ops.prepare(N, C);

  // [B, H, T, D] in the file, [B, T, H, D] (packed: [B, T, 3, H, D]) in the model. f gets the offsets of a head's vector in both.
  const auto each_vector = [&](std::int64_t parts, std::int64_t part, auto f) {
    for (std::int64_t b = 0; b < B; ++b)
      for (std::int64_t h = 0; h < H; ++h)
        for (std::int64_t t = 0; t < T; ++t) f(((b * H + h) * T + t) * D, (((b * T + t) * parts + part) * H + h) * D);
  };
  Floats packed(static_cast<std::size_t>(N * 3 * C)), single(static_cast<std::size_t>(N * C));
  const auto gather = [&](const Floats& from, Floats& to, std::int64_t parts, std::int64_t part) {
    each_vector(parts, part, [&](std::int64_t file, std::int64_t model) { std::copy_n(&from[file], D, &to[model]); });
  };
  const auto scatter = [&](const Floats& from, std::int64_t parts, std::int64_t part) {
    Floats to(single.size());
    each_vector(parts, part, [&](std::int64_t file, std::int64_t model) { std::copy_n(&from[model], D, &to[file]); });
    return to;
  };
  gather(in.q, packed, 3, 0);
  gather(in.k, packed, 3, 1);
  gather(in.v, packed, 3, 2);
  gather(in.d_o, single, 1, 0);
  const auto upload = [&](const Tensor& to, const Floats& from) {
    if (to.dtype == DType::f32) return ops.upload(to, from.data());
    const Tensor staging = plan[exact].view(to.shape);
    ops.upload(staging, from.data());
    ops.copy(to, staging);
  };
  upload(plan[qkv], packed);
  upload(plan[d_o], single);
  ops.upload(plan[scale], in.scale.data());
  ops.upload(plan[tau], in.tau.data());
  ops.upload(plan[gain], in.gain.data());
  if (documents) ops.upload(plan[start], in.document_start.data());

  QkTransform transform;
  transform.qkv = plan[qkv];
  transform.heads = H;
  transform.unit = unit;
  transform.inverse_norm = plan[inverse_norm];
  if (unit) ops.qk_transform_forward(transform);

  const auto part = [&](const Tensor& t, std::int64_t n) { return HeadsView{t.slice(n * C, 1).data, t.dtype, T * 3 * C, D, 3 * C}; };
  const auto heads = [&](const Tensor& t) { return HeadsView{t.data, t.dtype, T * C, D, C}; };
  AttentionForward forward;
  forward.shape = in.shape;
  forward.math = {.score = a.score,
                  .gate = a.gate,
                  .normalizer = a.normalizer,
                  .length_alpha = a.length_alpha,
                  .epsilon = a.epsilon,
                  .length_beta = a.threshold.mode == ThresholdMode::length && a.gate != Gate::softmax ? a.threshold.beta : 0.0f};
  forward.visit = a.visit;
  forward.tiles = tiles.get();
  forward.q = part(plan[qkv], 0);
  forward.k = part(plan[qkv], 1);
  forward.v = part(plan[qkv], 2);
  forward.o = heads(plan[o]);
  forward.scale = plan[scale];
  forward.threshold = plan[tau];
  if (documents) forward.document_start = plan[start];
  forward.z = plan[z];
  forward.active_tiles = plan[bitmap];
  forward.counters = plan[counters];
  ops.attention_forward(forward);

  AttentionBackward backward;
  backward.forward = forward;
  backward.d_o = heads(plan[d_o]);
  if (rms) {
    ops.head_norm_forward({.x = plan[o], .gain = plan[gain], .y = plan[normed], .rstd = plan[rstd]});
    ops.head_norm_backward({.dy = plan[d_o], .x = plan[o], .gain = plan[gain], .rstd = plan[rstd], .dx = plan[d_sum], .dgain = plan[d_gain]});
    backward.d_o = heads(plan[d_sum]);
  }
  backward.dq = part(plan[d_qkv], 0);
  backward.dk = part(plan[d_qkv], 1);
  backward.dv = part(plan[d_qkv], 2);
  backward.dscale = plan[d_scale];
  backward.dthreshold = plan[d_tau];
  backward.workspace = plan[workspace];
  ops.attention_backward(backward);
  if (unit) ops.qk_transform_backward(transform, plan[d_qkv]);

  const auto download = [&]<class T>(std::vector<T>& to, MemoryPlan::Slot slot) {
    Tensor from = plan[slot];
    if (from.dtype == DType::bf16) {
      from = plan[exact].view(from.shape);
      ops.copy(from, plan[slot]);
    }
    to.resize(static_cast<std::size_t>(from.numel()));
    ops.download(to.data(), from);
  };
  Output out;
  download(single, rms ? normed : o);
  out.o = scatter(single, 1, 0);
  download(packed, d_qkv);
  out.dq = scatter(packed, 3, 0);
  out.dk = scatter(packed, 3, 1);
  out.dv = scatter(packed, 3, 2);
  download(out.z, z);
  download(out.dtau, d_tau);
  download(out.dscale, d_scale);
  if (rms) download(out.dgain, d_gain);
  download(out.counters, counters);
  std::vector<std::uint32_t> bits;
  download(bits, bitmap);
  out.query_tiles = map->query_tiles;
  out.key_tiles = map->key_tiles;
  out.tile_map = unpack_tiles(bits, B * H * out.query_tiles, out.key_tiles);
  return out;
}

void write(const Output& out, const Input& in, const Config& config, const std::string& path) {
  const Hdf5Shape dims = in.dims();
  const std::uint64_t B = dims[0], H = dims[1], T = dims[2], D = dims[3];
  AtomicFile whole(path);
  Hdf5File file = Hdf5File::create(whole.temporary());
  const auto floats = [&](const char* name, const Hdf5Shape& shape, const Floats& values) { file.write<float>(name, shape, values); };
  floats("o", dims, out.o);
  floats("dq", dims, out.dq);
  floats("dk", dims, out.dk);
  floats("dv", dims, out.dv);
  floats("z", {B, H, T}, out.z);
  floats("dtau", {H}, out.dtau);
  floats("dscale", {H}, out.dscale);
  if (!out.dgain.empty()) floats("dgain", {H, D}, out.dgain);
  const auto counter = [&](const char* name, AttentionCounter column) {
    std::vector<std::uint64_t> values;
    for (std::uint64_t h = 0; h < H; ++h) values.push_back(out.counters[h * kAttentionCounters + column]);
    file.write<std::uint64_t>(name, {H}, values);
  };
  counter("active_edges", kActiveEdges);
  counter("visible_edges", kVisibleEdges);
  counter("active_tiles", kActiveTiles);
  counter("visible_tiles", kVisibleTiles);
  counter("empty_rows", kEmptyRows);
  file.write<std::uint8_t>("tile_map", {B, H, static_cast<std::uint64_t>(out.query_tiles), static_cast<std::uint64_t>(out.key_tiles)}, out.tile_map);
  file.set_attribute("tile_query", config.model.attention.tile_query);
  file.set_attribute("tile_key", config.model.attention.tile_key);
  file.set_attribute("pattern", describe(config.model.attention.pattern.base));
  file.close();
  whole.commit();
}

Json summary(const Output& out, const Input& in) {
  std::uint64_t total[kAttentionCounters] = {};
  for (std::size_t n = 0; n < out.counters.size(); ++n) total[n % kAttentionCounters] += out.counters[n];
  const double T = static_cast<double>(in.shape.tokens), heads = static_cast<double>(in.shape.batch * in.shape.heads);
  return {{"batch", in.shape.batch},
          {"heads", in.shape.heads},
          {"tokens", in.shape.tokens},
          {"head_size", in.shape.head_size},
          {"active_edges", total[kActiveEdges]},
          {"visible_edges", total[kVisibleEdges]},
          {"active_tiles", total[kActiveTiles]},
          {"visible_tiles", total[kVisibleTiles]},
          {"empty_rows", total[kEmptyRows]},
          {"edge_sparsity", 1.0 - static_cast<double>(total[kActiveEdges]) / (heads * T * (T + 1) / 2)}};  // of the causal edges
}

void run(const AttentionOptions& options) {
  const Config config = configure(options);
  for (const auto& notice : config.notices) fmt::print(stderr, "tessera: note: {}\n", notice);
  std::error_code ignored;
  if (std::filesystem::equivalent(options.in, options.out, ignored))
    throw std::invalid_argument(fmt::format("{}: IN.h5 and OUT.h5 are the same file", options.out));
  if (std::filesystem::is_directory(options.out, ignored))
    throw std::invalid_argument(fmt::format("{}: expected a file to write, found a folder", options.out));
  if (!std::filesystem::is_directory(folder_of(options.out), ignored))
    throw std::invalid_argument(fmt::format("{}: the folder {} does not exist; make it first", options.out, folder_of(options.out)));
  const Input in(options.in, config.model.attention);
  for (const auto& name : in.unused()) fmt::print(stderr, "tessera: note: {}: dataset {} has no effect here\n", options.in, name);
  const std::int64_t size = in.shape.head_size;
  if (config.device == "cuda" && size != 64 && size != 128)
    throw std::invalid_argument(fmt::format("{}: dataset q: device cuda computes head sizes 64 and 128, found {}", options.in, size));
  const auto ops = make_ops(config.device, config.run.threads);
  const Output out = compute(in, config, *ops, options.layer);
  write(out, in, config, options.out);

  const Json s = summary(out, in);
  if (options.json) {
    std::cout << s.dump(2) << '\n';
    return;
  }
  std::cout << fmt::format("{}: [{}, {}, {}, {}], edge sparsity {:.4f}, {} of {} visible edges and {} of {} visible tiles ({} x {}) active\n",
                           options.out, in.shape.batch, in.shape.heads, in.shape.tokens, in.shape.head_size, s["edge_sparsity"].get<double>(),
                           s["active_edges"].get<std::uint64_t>(), s["visible_edges"].get<std::uint64_t>(), s["active_tiles"].get<std::uint64_t>(),
                           s["visible_tiles"].get<std::uint64_t>(), config.model.attention.tile_query, config.model.attention.tile_key);
}

}  // namespace

void add_attention_command(CLI::App& app) {
  auto options = std::make_shared<AttentionOptions>();
  CLI::App* command = app.add_subcommand("attention", "The attention operator alone, forward and backward, HDF5 in and out");
  command->add_option("IN.h5", options->in, "Datasets q, k, v, do")->type_name("")->required();
  command->add_option("OUT.h5", options->out, "File to write; one that exists is replaced")->type_name("")->required();
  command->add_option("--set", options->sets, "Set a key attention.*; the last one counts")->type_name("KEY=VALUE")->expected(1)->take_all();
  command->add_option("--visit", options->visit, "Compute every visible tile or only active ones: the same bits (attention.visit; over --set)")
      ->check(CLI::IsMember({"all", "active"}));
  command->add_flag("--document-mask", options->document_mask, "Keys of another document are not visible (attention.document_mask)");
  command->add_option("--layer", options->layer, "Layer of attention.pattern")->check(CLI::Range(0, 1 << 20))->capture_default_str();
  command->add_flag("--json", options->json, "Print a summary as JSON");
  command->footer(
      "IN.h5:  q k v do  float32 [B, H, T, D]; D a multiple of 8 up to 256\n"
      "        optional: tau [H], scale [H] (cosine, fidelity), gain [H, D] (normalizer rms), float32;\n"
      "        document_start int32 [B, T], with --document-mask: the first token of each token's document\n"
      "OUT.h5: o dq dk dv [B, H, T, D], z [B, H, T], dtau dscale [H], dgain [H, D] (rms), float32;\n"
      "        active_edges visible_edges active_tiles visible_tiles empty_rows uint64 [H], sums over B;\n"
      "        tile_map uint8 [B, H, query tiles, key tiles]: 1 where a tile is active\n"
      "q and k are divided by their lengths first for the scores cosine and fidelity. Without tau: attention.threshold.init;\n"
      "without scale: attention.scale_init, for dot 1/sqrt(D). z is the divisor of o, for softmax ln sum exp; where a row sees no key\n"
      "it is 1 for length and 0 for softmax. Threshold mode length stands inside the scale: x = scale (cos - tau_i). Normalizer rms adds\n"
      "1e-5 to the mean square. kernels/attention.h has the whole definition.\n"
      "--set device=cuda computes on the GPU in bf16 with sums in float32: head sizes 64 and 128, tiles of 64 x 64.\n"
      "Example:\n"
      "  tessera attention in.h5 out.h5 --set attention.gate=relu --set 'attention.pattern={window: {size: 256}}' --visit all");
  command->callback([options] { run(*options); });
}

}  // namespace tessera
