#pragma once
// Attention over sequences that several ranks (threads) share, against one rank, on any Ops: the CPU's, its bf16 form, a GPU's.

#include "model/shared_attention.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/bf16.h"
#include "model/sequence_bytes.h"
#include "model/shared_attention_parts.h"
#include "tests/kernels/same_bits.h"
#include "tests/model/pattern_cases.h"
#include "tests/trainer/thread_ranks.h"

namespace tessera::test {

struct Case {
  std::vector<PatternSpec> patterns{causal()};  // of heads, in turn
  AttentionMath math{.epsilon = 0.05f};
  std::int64_t sequences = 2, heads = 3, tokens = 149, size = 8;
  int tile_query = 8, tile_key = 8;
  bool documents = false, self_edges = false;
  int ranks = 2, stages = 2;
  SequenceLayout layout = SequenceLayout::zigzag;
  SequenceExchange exchange = SequenceExchange::needed;
  DeviceKind kind = DeviceKind::cpu;
  std::function<std::unique_ptr<Ops>()> device = [] { return make_cpu_ops(1); };  // of this kind, for each rank
};

inline const char* name_of(SequenceLayout l) {
  return l == SequenceLayout::contiguous ? "contiguous" : l == SequenceLayout::zigzag ? "zigzag" : "balanced";
}
inline std::string name_of(const ::testing::TestParamInfo<SequenceExchange>& info) {
  return info.param == SequenceExchange::needed ? "needed" : info.param == SequenceExchange::heads ? "heads" : "ring";
}

struct Inputs {
  std::vector<float> qkv, d_o, scale, threshold, balance;  // balance: empty where there is none
  std::vector<std::int32_t> document_start;
};

/// Of rank 0 of 1, or of one rank: rows of its tokens.
struct Results {
  std::vector<float> o, z, gradients, dscale, dthreshold, dbias;  // o [B, T, H, D], z [B, T, H], gradients [B, T, 3, H, D]
  std::vector<std::uint64_t> counters;
};

/// For a device that computes in bf16: values that it holds, values v of size 1, q and k of unit length (up to rounding) where the score wants them
/// so.
inline Inputs make_inputs(const Case& c, unsigned seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  Inputs in;
  in.qkv.resize(static_cast<std::size_t>(c.sequences * c.tokens * 3 * c.heads * c.size));
  in.d_o.resize(in.qkv.size() / 3);
  for (auto& x : in.qkv) x = normal(rng) / std::sqrt(static_cast<float>(c.size));
  for (auto& x : in.d_o) x = normal(rng);
  if (compute_type(c.kind) == DType::bf16) {
    const std::int64_t D = c.size, H = c.heads;
    for (std::int64_t row = 0; row < std::ssize(in.qkv) / D; ++row) {
      float* x = in.qkv.data() + row * D;
      const float length = std::sqrt(std::inner_product(x, x + D, x, 0.0f));
      const bool value = row % (3 * H) >= 2 * H;
      const float factor = value ? std::sqrt(static_cast<float>(D)) : c.math.score == Score::dot ? 1.0f : 1 / length;
      std::transform(x, x + D, x, [&](float e) { return factor * e; });
    }
    for (auto* v : {&in.qkv, &in.d_o})
      for (auto& x : *v) x = from_bf16(to_bf16(x));
  }
  for (std::int64_t h = 0; h < c.heads; ++h) {
    in.scale.push_back(6.0f - static_cast<float>(h));
    in.threshold.push_back((c.math.score == Score::fidelity && c.kind == DeviceKind::cuda ? 0.1f : 1.0f) * (0.2f + 0.1f * static_cast<float>(h)));
    if (c.math.gate != Gate::softmax && c.math.score != Score::fidelity && !(c.math.length_beta > 0))
      in.balance.push_back(0.1f * static_cast<float>(h) - 0.15f);
  }
  for (std::int64_t b = 0; b < c.sequences; ++b) {
    std::int32_t start = 0;
    for (std::int64_t t = 0; t < c.tokens; ++t) {
      if (rng() % 40 == 0) start = static_cast<std::int32_t>(t);
      in.document_start.push_back(start);
    }
  }
  return in;
}

inline Inputs part_of(const Inputs& in, const Case& c, const std::vector<std::int32_t>& positions) {
  Inputs part;
  part.scale = in.scale;
  part.threshold = in.threshold;
  part.balance = in.balance;
  const std::int64_t row = 3 * c.heads * c.size;
  for (std::int64_t b = 0; b < c.sequences; ++b)
    for (const auto t : positions) {
      const std::int64_t at = b * c.tokens + t;
      part.qkv.insert(part.qkv.end(), in.qkv.begin() + at * row, in.qkv.begin() + (at + 1) * row);
      part.d_o.insert(part.d_o.end(), in.d_o.begin() + at * row / 3, in.d_o.begin() + (at + 1) * row / 3);
      part.document_start.push_back(in.document_start[static_cast<std::size_t>(at)]);
    }
  return part;
}

inline PatternConfig pattern_of(const Case& c) {
  PatternConfig config;
  config.base = c.patterns[0];
  for (std::size_t n = 1; n < c.patterns.size(); ++n)
    for (int h = static_cast<int>(n); h < c.heads; h += static_cast<int>(c.patterns.size()))
      config.overrides.push_back({.head_first = h, .head_last = h, .pattern = c.patterns[n]});
  return config;
}
inline std::shared_ptr<const TileMap> map_of(const Case& c) {
  return make_tile_map(pattern_of(c), 0, static_cast<int>(c.heads), c.tokens, c.tile_query, c.tile_key);
}

/// Device memory. What it is not given a value is full of 0xff, which is NaN in every floating type.
class Memory {
 public:
  Memory(Ops& ops, DType type, std::int64_t count) : ops_(ops), tensor_(nullptr, type, {count}), bytes_(tensor_.bytes()) {
    tensor_.data = ops.allocate(std::max<std::size_t>(bytes_, 1));
    ops.upload(tensor_, std::vector<char>(bytes_, static_cast<char>(0xff)).data());
  }
  /// Floats in the type.
  Memory(Ops& ops, DType type, const std::vector<float>& values) : Memory(ops, type, std::ssize(values)) {
    std::vector<std::uint16_t> narrow(values.size());
    std::ranges::transform(values, narrow.begin(), to_bf16);
    ops.upload(tensor_, type == DType::bf16 ? static_cast<const void*>(narrow.data()) : values.data());
  }
  template <class T>
  Memory(Ops& ops, const std::vector<T>& values) : Memory(ops, dtype_of<T>::value, std::ssize(values)) {
    ops.upload(tensor_, values.data());
  }
  ~Memory() { ops_.deallocate(tensor_.data); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  Tensor operator()(Shape shape) const { return {tensor_.data, tensor_.dtype, shape}; }
  Tensor operator()() const { return tensor_; }
  template <class T>
  std::vector<T> host() const {
    std::vector<T> values(static_cast<std::size_t>(tensor_.numel()));
    ops_.download(values.data(), tensor_);
    return values;
  }
  std::vector<float> floats() const {
    if (tensor_.dtype == DType::f32) return host<float>();
    std::vector<float> values(static_cast<std::size_t>(tensor_.numel()));
    std::ranges::transform(host<std::uint16_t>(), values.begin(), from_bf16);
    return values;
  }

 private:
  Ops& ops_;
  Tensor tensor_;
  std::size_t bytes_;
};

/// A call on rows of `tokens` tokens a sequence, without what tiles need.
class Call {
 public:
  Call(Ops& ops, const Case& c, const Inputs& in, std::int64_t tokens)
      : type_(compute_type(ops.kind())),
        qkv_(ops, type_, in.qkv),
        d_o_(ops, type_, in.d_o),
        scale_(ops, in.scale),
        threshold_(ops, in.threshold),
        balance_(ops, in.balance.empty() ? in.threshold : in.balance),
        o_(ops, type_, std::ssize(in.d_o)),
        gradients_(ops, type_, std::vector<float>(in.qkv.size())),
        dscale_(ops, std::vector<float>(in.scale.size())),
        dthreshold_(ops, std::vector<float>(in.scale.size())),
        dbias_(ops, std::vector<float>(in.scale.size())),
        counters_(ops, std::vector<std::uint64_t>(in.scale.size() * kAttentionCounters)) {
    const std::int64_t H = c.heads, D = c.size;
    const auto part = [&](const Memory& m, std::int64_t n) {
      const Tensor t = m();
      return HeadsView{static_cast<char*>(t.data) + n * H * D * static_cast<std::int64_t>(size_of(t.dtype)), t.dtype, tokens * 3 * H * D, D,
                       3 * H * D};
    };
    const auto heads = [&](const Memory& m) { return HeadsView{m().data, type_, tokens * H * D, D, H * D}; };
    AttentionForward& f = a.forward;
    f.shape = {c.sequences, H, tokens, D};
    f.math = c.math;
    f.q = part(qkv_, 0);
    f.k = part(qkv_, 1);
    f.v = part(qkv_, 2);
    f.o = heads(o_);
    f.scale = scale_();
    f.threshold = threshold_();
    f.counters = counters_({H, kAttentionCounters});
    a.d_o = heads(d_o_);
    a.dq = part(gradients_, 0);
    a.dk = part(gradients_, 1);
    a.dv = part(gradients_, 2);
    a.dscale = dscale_();
    a.dthreshold = dthreshold_();
    if (!in.balance.empty()) a.balance = balance_();
  }
  std::vector<float> o() const { return o_.floats(); }
  /// z is left out.
  Results results() const {
    return {o_.floats(), {}, gradients_.floats(), dscale_.floats(), dthreshold_.floats(), dbias_.floats(), counters_.host<std::uint64_t>()};
  }
  AttentionBackward a;

  /// Self edges with the thresholds as biases, over the stretches of heads in which z has them: after the forward pass, or after the backward pass.
  void self_edges(Ops& ops, const std::vector<Stretch>& stretches, bool backward) const {
    for (const Stretch heads : stretches) {
      const AttentionForward& f = a.forward;
      const std::int64_t first = heads.first, rows = f.shape.batch * f.shape.tokens;
      SelfEdge e;
      e.shape = f.shape;
      e.shape.heads = heads.count;
      e.score = f.math.score;
      e.gate = f.math.gate;
      e.q = from_head(f.q, first), e.k = from_head(f.k, first), e.v = from_head(f.v, first), e.o = from_head(f.o, first);
      e.scale = heads_slice(f.scale, heads), e.bias = heads_slice(f.threshold, heads);
      e.counters = counters_slice(f.counters, heads);
      e.z = Tensor(f.z.data, f.z.dtype, {f.z.numel()}).slice(rows * first, rows * heads.count);
      if (backward)
        ops.self_edge_backward({.forward = e,
                                .d_o = from_head(a.d_o, first),
                                .dq = from_head(a.dq, first),
                                .dk = from_head(a.dk, first),
                                .dv = from_head(a.dv, first),
                                .dscale = heads_slice(a.dscale, heads),
                                .dbias = heads_slice(dbias_(), heads)});
      else
        ops.self_edge_forward(e);
    }
  }

 private:
  const DType type_;
  const Memory qkv_, d_o_, scale_, threshold_, balance_, o_, gradients_, dscale_, dthreshold_, dbias_, counters_;
};

inline Results alone(const Case& c, const Inputs& in) {
  const auto ops = c.device();
  const auto map = map_of(c);
  const auto tiles = ops->upload_tiles(map);
  const std::int64_t B = c.sequences, H = c.heads;
  Call call(*ops, c, in, c.tokens);
  const Memory z(*ops, DType::f32, B * H * c.tokens), bitmap(*ops, DType::u32, B * H * map->query_tiles * bitmap_words(map->key_tiles)),
      workspace(*ops, DType::f32, attention_backward_workspace(call.a.forward.shape, c.tile_query)), document_start(*ops, in.document_start);
  call.a.forward.tiles = tiles.get();
  call.a.forward.z = z({B, H, c.tokens});
  call.a.forward.active_tiles = bitmap();
  if (c.documents) call.a.forward.document_start = document_start({B, c.tokens});
  call.a.workspace = workspace();
  ops->attention_forward(call.a.forward);
  if (c.self_edges) call.self_edges(*ops, {{0, H}}, false);
  ops->attention_backward(call.a);
  if (c.self_edges) call.self_edges(*ops, {{0, H}}, true);
  Results r = call.results();
  const auto z_host = z.floats();
  for (std::int64_t b = 0; b < B; ++b)
    for (std::int64_t t = 0; t < c.tokens; ++t)
      for (std::int64_t h = 0; h < H; ++h) r.z.push_back(z_host[static_cast<std::size_t>((b * H + h) * c.tokens + t)]);
  return r;
}

/// A communicator over a device's memory, whose exchanges happen when they are waited for, with what was to be sent when they were begun; until then
/// NaN stands where they will write. So nothing may be used too early, nor written too early.
class Late final : public testing::Forwarding {
 public:
  Late(Communicator& to, Ops& ops) : Forwarding(to), ops_(ops) {}
  Ticket begin_exchange(const Tensor& in, std::span<const Part> send, const Tensor& out, std::span<const Part> receive) override {
    Job& job = jobs_[++last_];
    job = {std::vector<char>(in.bytes()),   std::vector<char>(out.bytes(), static_cast<char>(0xff)), in, out, {send.begin(), send.end()},
           {receive.begin(), receive.end()}};
    if (on_begin) on_begin();
    ops_.download(job.in_bytes.data(), in);
    ops_.upload(out, job.out_bytes.data());
    return last_;
  }
  void wait(Ticket begun) override {
    Job job = std::move(jobs_.at(begun));
    jobs_.erase(begun);
    to_.exchange({job.in_bytes.data(), job.in.dtype, job.in.shape}, job.send, {job.out_bytes.data(), job.out.dtype, job.out.shape}, job.receive);
    ops_.upload(job.out, job.out_bytes.data());
  }
  bool idle() const { return jobs_.empty(); }
  std::function<void()> on_begin;  // called as an exchange begins

 private:
  struct Job {
    std::vector<char> in_bytes, out_bytes;
    Tensor in, out;
    std::vector<Part> send, receive;
  };
  Ops& ops_;
  std::map<Ticket, Job> jobs_;
  Ticket last_ = 0;
};

inline SequencePart part_of(const Case& c, int rank) { return {c.ranks, rank, c.layout, c.exchange, c.stages}; }

inline SharedAttention::Shape shape_of(const Case& c) {
  return {.sequences = c.sequences,
          .heads = c.heads,
          .head_size = c.size,
          .device = c.kind,
          .document_mask = c.documents,
          .positions = c.math.length_beta > 0,
          .added_edges = c.self_edges};
}

struct Sent {
  std::uint64_t forward = 0, backward = 0;
  std::vector<int> heads_done{};  // of the forward pass: heads that had an output as each exchange began
};

/// One rank's results. z is left out, but for exchange needed.
inline Results on_rank(const Case& c, const Inputs& whole, const SequenceSplit& split, Communicator& comm, Sent& sent) {
  const int rank = comm.rank();
  const auto ops = c.device();
  Late late(comm, *ops);
  MemoryPlan plan;
  const auto shared = make_shared_attention(part_of(c, rank), split, {map_of(c)}, shape_of(c), plan);
  plan.allocate(*ops);
  SequenceGroup group{&late, {}};
  for (int r = 0; r < c.ranks; ++r) group.members.push_back(r);
  shared->bind(*ops, group);

  const std::int64_t B = c.sequences, H = c.heads, T = split.tokens_of(rank);
  const Inputs in = part_of(whole, c, split.positions(rank));
  Call call(*ops, c, in, T);
  const auto sizes = shared->sizes();
  const Memory z(*ops, DType::f32, sizes.z), workspace(*ops, DType::f32, sizes.workspace), bitmap(*ops, DType::u32, sizes.active_tiles),
      document_start(*ops, in.document_start);
  call.a.forward.z = z();
  call.a.forward.active_tiles = bitmap();
  call.a.workspace = workspace();
  shared->begin(c.documents ? document_start() : Tensor{});
  const std::uint64_t before = comm.sent_bytes();  // starts of documents are no part of the attention's tensors
  late.on_begin = [&] {
    const std::vector<float> o = call.o();
    sent.heads_done.push_back(0);
    for (std::int64_t h = 0; h < H; ++h) sent.heads_done.back() += !std::isnan(o[static_cast<std::size_t>(h * c.size)]);
  };
  shared->forward(0, call.a.forward);
  late.on_begin = nullptr;
  sent.forward = comm.sent_bytes() - before;
  if (c.self_edges) call.self_edges(*ops, shared->z_heads(), false);
  shared->backward(0, call.a);
  sent.backward = comm.sent_bytes() - before - sent.forward;
  EXPECT_TRUE(late.idle());
  if (c.self_edges) call.self_edges(*ops, shared->z_heads(), true);
  Results r = call.results();
  if (c.exchange == SequenceExchange::needed) {  // z: by turns of heads, [B, heads of the turn, T]
    const auto z_host = z.floats();
    const std::int64_t turn = (H + c.stages - 1) / c.stages;
    for (std::int64_t b = 0; b < B; ++b)
      for (std::int64_t t = 0; t < T; ++t)
        for (std::int64_t h = 0; h < H; ++h) {
          const std::int64_t first = h / turn * turn, heads = std::min(turn, H - first);
          r.z.push_back(z_host[static_cast<std::size_t>(B * first * T + (b * heads + h - first) * T + t)]);
        }
  }
  return r;
}

struct OnRanks {
  SequenceSplit split;
  std::vector<Results> results;
  std::vector<Sent> sent;
};
inline OnRanks on_ranks(const Case& c, const Inputs& in) {
  OnRanks r{split_sequence(c.layout, c.tokens, c.ranks, {map_of(c)}), std::vector<Results>(static_cast<std::size_t>(c.ranks)),
            std::vector<Sent>(static_cast<std::size_t>(c.ranks))};
  testing::ThreadRanks::run(c.ranks, [&](Communicator& comm) {
    const auto rank = static_cast<std::size_t>(comm.rank());
    r.results[rank] = on_rank(c, in, r.split, comm, r.sent[rank]);
  });
  return r;
}

/// Rows of the positions, `width` elements each, of [B, T, width].
inline std::vector<float> rows_of(const std::vector<float>& x, const Case& c, const std::vector<std::int32_t>& positions, std::int64_t width) {
  std::vector<float> rows;
  for (std::int64_t b = 0; b < c.sequences; ++b)
    for (const auto t : positions) rows.insert(rows.end(), x.begin() + (b * c.tokens + t) * width, x.begin() + (b * c.tokens + t + 1) * width);
  return rows;
}

/// The third `part` (of q, k, v) of packed rows.
inline std::vector<float> part_of(const std::vector<float>& packed, const Case& c, std::int64_t part) {
  const std::int64_t width = c.heads * c.size;
  std::vector<float> out;
  for (std::int64_t row = 0; row < std::ssize(packed) / (3 * width); ++row)
    out.insert(out.end(), packed.begin() + (3 * row + part) * width, packed.begin() + (3 * row + part + 1) * width);
  return out;
}

/// max |a - b| / max(1, |b|); infinity for what is not finite.
inline double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double error = a.size() == b.size() ? 0 : std::numeric_limits<double>::infinity(), largest = 1;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    const double off = std::abs(static_cast<double>(a[i]) - b[i]);
    error = std::isfinite(off) ? std::max(error, off) : std::numeric_limits<double>::infinity();
    largest = std::max(largest, std::abs(static_cast<double>(b[i])));
  }
  return error / largest;
}

inline ExchangeBytes planned(const Case& c, const SequenceSplit& split) {
  const ExchangeShape shape{c.sequences, c.heads, c.size, static_cast<std::int64_t>(size_of(compute_type(c.kind)))};
  switch (c.exchange) {
    case SequenceExchange::ring: return bytes_of_ring(split, shape);
    case SequenceExchange::heads: return bytes_of_heads(split, shape);
    default: return bytes_of_needed(split, plan_needed(split, *map_of(c)), c.tile_key, shape);
  }
}

/// Largest errors, over the largest value of one rank's.
struct Tolerances {
  double o = 1e-5, dq = 1e-5, dkv = 1e-5, parameters = 1e-4;
};
inline Tolerances fp32(double tolerance) { return {tolerance, tolerance, tolerance, 10 * tolerance}; }

/// The tolerances are on sums of the same terms in another order.
inline void check(const Case& c, unsigned seed, const Tolerances& tolerance = {}) {
  const Inputs in = make_inputs(c, seed);
  const Results whole = alone(c, in);
  const OnRanks ranks = on_ranks(c, in);
  const bool bits = c.exchange != SequenceExchange::ring;
  const std::int64_t row = c.heads * c.size;
  const ExchangeBytes bytes = planned(c, ranks.split);
  std::vector<float> dscale(whole.dscale.size()), dthreshold(whole.dscale.size()), dbias(whole.dscale.size());
  std::vector<std::uint64_t> counters(whole.counters.size());
  for (int rank = 0; rank < c.ranks; ++rank) {
    const Results& r = ranks.results[static_cast<std::size_t>(rank)];
    const auto positions = ranks.split.positions(rank);
    const auto o = rows_of(whole.o, c, positions, row), gradients = rows_of(whole.gradients, c, positions, 3 * row);
    SCOPED_TRACE(fmt::format("rank {}", rank));
    if (bits) {
      EXPECT_TRUE(same_bits(r.o, o)) << "o";
      EXPECT_TRUE(same_bits(part_of(r.gradients, c, 0), part_of(gradients, c, 0))) << "dq";
    }
    if (c.exchange == SequenceExchange::needed) {
      EXPECT_TRUE(same_bits(r.z, rows_of(whole.z, c, positions, c.heads))) << "z";
    }
    if (c.exchange == SequenceExchange::heads) {
      EXPECT_TRUE(same_bits(r.gradients, gradients)) << "dk, dv";
    }
    EXPECT_LT(distance(r.o, o), tolerance.o) << "o";
    for (int part = 0; part < 3; ++part)
      EXPECT_LT(distance(part_of(r.gradients, c, part), part_of(gradients, c, part)), part == 0 ? tolerance.dq : tolerance.dkv)
          << "gradient of q, k, v: " << part;
    EXPECT_EQ(static_cast<std::int64_t>(ranks.sent[static_cast<std::size_t>(rank)].forward), bytes.forward_sent(rank));
    EXPECT_EQ(static_cast<std::int64_t>(ranks.sent[static_cast<std::size_t>(rank)].backward), bytes.backward_sent(rank));
    for (std::size_t h = 0; h < dscale.size(); ++h) dscale[h] += r.dscale[h], dthreshold[h] += r.dthreshold[h], dbias[h] += r.dbias[h];
    for (std::size_t n = 0; n < counters.size(); ++n) counters[n] += r.counters[n];
  }
  EXPECT_LT(distance(dscale, whole.dscale), tolerance.parameters);
  EXPECT_LT(distance(dthreshold, whole.dthreshold), tolerance.parameters);
  EXPECT_LT(distance(dbias, whole.dbias), tolerance.parameters);
  EXPECT_EQ(counters, whole.counters);
}

/// As check(), and with self edges where there can be any.
inline void check_with_self_edges(Case c, unsigned seed, const Tolerances& tolerance = {}) {
  check(c, seed, tolerance);
  if (c.math.gate == Gate::softmax || c.math.normalizer != Normalizer::sum || c.exchange == SequenceExchange::heads) return;
  c.self_edges = true;
  SCOPED_TRACE("self edges");
  check(c, seed, tolerance);
}

/// Tolerances of bf16, for o, dq, dk and dv alike: of values that two roundings may have moved by 1/256 each and one rank's by as much; a ring's own
/// o and what its sums of parameters then see.
inline constexpr Tolerances kBf16{3.0 / 256, 3.0 / 256, 3.0 / 256, 0.05};

/// Root mean square of the errors of dv, for the first `keys` keys, which every rank sees, over what rounding the exact sums once gives: 1 where fp32
/// terms are added in fp32.
inline double roundings_of_dv(const Case& c, std::int64_t keys, unsigned seed) {
  Inputs in = make_inputs(c, seed);
  for (auto& x : in.d_o) x = std::abs(x);  // sums that grow
  Case in_fp32 = c;
  in_fp32.kind = Case{}.kind;
  in_fp32.device = Case{}.device;
  const auto exact = part_of(alone(in_fp32, in).gradients, c, 2);
  const OnRanks ranks = on_ranks(c, in);
  double error = 0, once = 0;
  for (int rank = 0; rank < c.ranks; ++rank) {
    const auto dv = part_of(ranks.results[static_cast<std::size_t>(rank)].gradients, c, 2);
    const auto positions = ranks.split.positions(rank);
    const std::int64_t width = c.heads * c.size, T = std::ssize(positions);
    for (std::int64_t row = 0; row < c.sequences * T; ++row) {
      const std::int64_t t = positions[static_cast<std::size_t>(row % T)];
      if (t >= keys) continue;
      for (std::int64_t x = 0; x < width; ++x) {
        const float wanted = exact[static_cast<std::size_t>((row / T * c.tokens + t) * width + x)];
        error += std::pow(dv[static_cast<std::size_t>(row * width + x)] - wanted, 2);
        once += std::pow(from_bf16(to_bf16(wanted)) - wanted, 2);
      }
    }
  }
  return std::sqrt(error / once);
}

/// The kinds of math that differ most.
inline std::vector<AttentionMath> kinds_of_math() {
  return {AttentionMath{.epsilon = 0.05f},
          {.gate = Gate::relu, .normalizer = Normalizer::length},
          {.score = Score::dot, .gate = Gate::softmax, .normalizer = Normalizer::none},
          {.normalizer = Normalizer::none, .length_beta = 0.2f},
          {.score = Score::fidelity, .epsilon = 0.05f},
          {.gate = Gate::relu4, .normalizer = Normalizer::rms}};
}

struct Named {
  const char* name;
  std::vector<PatternSpec> patterns;
};
inline std::vector<Named> families() {
  return {{"causal", {causal()}},
          {"window", {window(19)}},
          {"strided", {strided(21, 3)}},
          {"dilated", {dilated(5, 9)}},
          {"global", {any({global(4), window(12)})}},
          {"bigbird", {bigbird(2, 1, 2, 8)}},
          {"blocks", {blocks(8, 19, 5)}},  // with rows that see nothing
          {"far", {all({strided(40, 3), blocks(16, 10, 3)})}},
          {"of each head", {window(9), causal(), global(3)}}};
}

}  // namespace tessera::test
