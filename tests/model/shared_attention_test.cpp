// Attention over sequences that several ranks (threads) share: the bits of o, z and dq that one rank gets, gradients of keys and values that agree to
// rounding, counters that add up, and the bytes that were planned.

#include "model/shared_attention.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <random>

#include "model/sequence_bytes.h"
#include "tests/model/pattern_cases.h"
#include "tests/trainer/thread_ranks.h"

namespace tessera {
namespace {

struct Case {
  std::vector<PatternSpec> patterns{causal()};  // of heads, in turn
  AttentionMath math{.epsilon = 0.05f};
  std::int64_t sequences = 2, heads = 3, tokens = 149, size = 8;
  int tile_query = 8, tile_key = 8;
  bool documents = false;
  int ranks = 2, stages = 2;
  SequenceLayout layout = SequenceLayout::zigzag;
  SequenceExchange exchange = SequenceExchange::needed;
};

const char* name_of(SequenceLayout l) { return l == SequenceLayout::contiguous ? "contiguous" : l == SequenceLayout::zigzag ? "zigzag" : "balanced"; }

struct Inputs {
  std::vector<float> qkv, d_o, scale, threshold;
  std::vector<std::int32_t> document_start;
};

/// Of rank 0 of 1, or of one rank: rows of its tokens.
struct Results {
  std::vector<float> o, z, gradients, dscale, dthreshold;  // o [B, T, H, D], z [B, T, H], gradients [B, T, 3, H, D]
  std::vector<std::uint64_t> counters;
};

Inputs make_inputs(const Case& c, unsigned seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  Inputs in;
  in.qkv.resize(static_cast<std::size_t>(c.sequences * c.tokens * 3 * c.heads * c.size));
  in.d_o.resize(in.qkv.size() / 3);
  for (auto& x : in.qkv) x = normal(rng) / std::sqrt(static_cast<float>(c.size));
  for (auto& x : in.d_o) x = normal(rng);
  for (std::int64_t h = 0; h < c.heads; ++h) {
    in.scale.push_back(6.0f - static_cast<float>(h));
    in.threshold.push_back(0.2f + 0.1f * static_cast<float>(h));
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

Inputs part_of(const Inputs& in, const Case& c, const std::vector<std::int32_t>& positions) {
  Inputs part;
  part.scale = in.scale;
  part.threshold = in.threshold;
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

std::shared_ptr<const TileMap> map_of(const Case& c) {
  PatternConfig config;
  config.base = c.patterns[0];
  for (std::size_t n = 1; n < c.patterns.size(); ++n)
    for (int h = static_cast<int>(n); h < c.heads; h += static_cast<int>(c.patterns.size()))
      config.overrides.push_back({.head_first = h, .head_last = h, .pattern = c.patterns[n]});
  return make_tile_map(config, 0, static_cast<int>(c.heads), c.tokens, c.tile_query, c.tile_key);
}

template <class T>
Tensor tensor(std::vector<T>& v, Shape shape) {
  return {v.data(), dtype_of<T>::value, shape};
}

/// A call on rows of `tokens` tokens a sequence, without what tiles need. Outputs start as NaN, so that what is left out shows.
struct Call {
  Call(const Case& c, Inputs& in, Results& r, std::int64_t tokens) {
    const std::int64_t B = c.sequences, H = c.heads, D = c.size;
    const float nan = std::numeric_limits<float>::quiet_NaN();
    r.o.assign(static_cast<std::size_t>(B * tokens * H * D), nan);
    r.gradients.assign(3 * r.o.size(), 0.0f);
    r.dscale.assign(static_cast<std::size_t>(H), 0.0f);
    r.dthreshold = r.dscale;
    r.counters.assign(static_cast<std::size_t>(H * kAttentionCounters), 0);
    const auto part = [&](std::vector<float>& x, std::int64_t n) {
      return HeadsView{x.data() + n * H * D, DType::f32, tokens * 3 * H * D, D, 3 * H * D};
    };
    const auto heads = [&](std::vector<float>& x) { return HeadsView{x.data(), DType::f32, tokens * H * D, D, H * D}; };
    AttentionForward& f = a.forward;
    f.shape = {B, H, tokens, D};
    f.math = c.math;
    f.q = part(in.qkv, 0);
    f.k = part(in.qkv, 1);
    f.v = part(in.qkv, 2);
    f.o = heads(r.o);
    f.scale = tensor(in.scale, {H});
    f.threshold = tensor(in.threshold, {H});
    f.counters = tensor(r.counters, {H, kAttentionCounters});
    a.d_o = heads(in.d_o);
    a.dq = part(r.gradients, 0);
    a.dk = part(r.gradients, 1);
    a.dv = part(r.gradients, 2);
    a.dscale = tensor(r.dscale, {H});
    a.dthreshold = tensor(r.dthreshold, {H});
  }
  AttentionBackward a;
};

Results alone(const Case& c, Inputs in) {
  const auto ops = make_cpu_ops(1);
  const auto map = map_of(c);
  const auto tiles = ops->upload_tiles(map);
  Results r;
  Call call(c, in, r, c.tokens);
  const std::int64_t B = c.sequences, H = c.heads;
  std::vector<float> z(static_cast<std::size_t>(B * H * c.tokens));
  std::vector<std::uint32_t> bitmap(static_cast<std::size_t>(B * H * map->query_tiles * bitmap_words(map->key_tiles)));
  std::vector<float> workspace(static_cast<std::size_t>(attention_backward_workspace(call.a.forward.shape, c.tile_query)));
  call.a.forward.tiles = tiles.get();
  call.a.forward.z = tensor(z, {B, H, c.tokens});
  call.a.forward.active_tiles = tensor(bitmap, {std::ssize(bitmap)});
  if (c.documents) call.a.forward.document_start = tensor(in.document_start, {B, c.tokens});
  call.a.workspace = tensor(workspace, {std::ssize(workspace)});
  ops->attention_forward(call.a.forward);
  ops->attention_backward(call.a);
  for (std::int64_t b = 0; b < B; ++b)
    for (std::int64_t t = 0; t < c.tokens; ++t)
      for (std::int64_t h = 0; h < H; ++h) r.z.push_back(z[static_cast<std::size_t>((b * H + h) * c.tokens + t)]);
  return r;
}

/// A communicator whose exchanges happen when they are waited for, with what was to be sent when they were begun; until then NaN stands where they
/// will write. So nothing may be used too early, nor written too early.
class Late final : public testing::Forwarding {
 public:
  using Forwarding::Forwarding;
  Ticket begin_exchange(const Tensor& in, std::span<const Part> send, const Tensor& out, std::span<const Part> receive) override {
    const char* bytes = static_cast<const char*>(in.data);
    jobs_[++last_] = {{bytes, bytes + in.bytes()}, in, out, {send.begin(), send.end()}, {receive.begin(), receive.end()}};
    if (out.bytes() > 0) std::memset(out.data, 0xff, out.bytes());
    return last_;
  }
  void wait(Ticket begun) override {
    Job job = std::move(jobs_.at(begun));
    jobs_.erase(begun);
    to_.exchange({job.bytes.data(), job.in.dtype, job.in.shape}, job.send, job.out, job.receive);
  }
  bool idle() const { return jobs_.empty(); }

 private:
  struct Job {
    std::vector<char> bytes;
    Tensor in, out;
    std::vector<Part> send, receive;
  };
  std::map<Ticket, Job> jobs_;
  Ticket last_ = 0;
};

SequencePart part_of(const Case& c, int rank) { return {c.ranks, rank, c.layout, c.exchange, c.stages}; }

SharedAttention::Shape shape_of(const Case& c) {
  return {.sequences = c.sequences, .heads = c.heads, .head_size = c.size, .document_mask = c.documents, .positions = c.math.length_beta > 0};
}

struct Sent {
  std::uint64_t forward = 0, backward = 0;
};

/// One rank's results. z is left out.
Results on_rank(const Case& c, const Inputs& whole, const SequenceSplit& split, Communicator& comm, Sent& sent) {
  const int rank = comm.rank();
  Late late(comm);
  const auto ops = make_cpu_ops(1);
  MemoryPlan plan;
  const auto shared = make_shared_attention(part_of(c, rank), split, {map_of(c)}, shape_of(c), plan);
  plan.allocate(*ops);
  SequenceGroup group{&late, {}};
  for (int r = 0; r < c.ranks; ++r) group.members.push_back(r);
  shared->bind(*ops, group);

  const std::int64_t B = c.sequences, H = c.heads, T = split.tokens_of(rank);
  Inputs in = part_of(whole, c, split.positions(rank));
  Results r;
  Call call(c, in, r, T);
  const auto sizes = shared->sizes();
  std::vector<float> z(static_cast<std::size_t>(sizes.z)), workspace(static_cast<std::size_t>(sizes.workspace));
  std::vector<std::uint32_t> bitmap(static_cast<std::size_t>(sizes.active_tiles));
  call.a.forward.z = tensor(z, {sizes.z});
  call.a.forward.active_tiles = tensor(bitmap, {sizes.active_tiles});
  call.a.workspace = tensor(workspace, {sizes.workspace});
  shared->begin(c.documents ? tensor(in.document_start, {B * T}) : Tensor{});
  const std::uint64_t before = comm.sent_bytes();  // starts of documents are no part of the attention's tensors
  shared->forward(0, call.a.forward);
  sent.forward = comm.sent_bytes() - before;
  shared->backward(0, call.a);
  sent.backward = comm.sent_bytes() - before - sent.forward;
  EXPECT_TRUE(late.idle());
  if (c.exchange == SequenceExchange::needed) {  // z: by turns of heads, [B, heads of the turn, T]
    const std::int64_t turn = (H + c.stages - 1) / c.stages;
    for (std::int64_t b = 0; b < B; ++b)
      for (std::int64_t t = 0; t < T; ++t)
        for (std::int64_t h = 0; h < H; ++h) {
          const std::int64_t first = h / turn * turn, heads = std::min(turn, H - first);
          r.z.push_back(z[static_cast<std::size_t>(B * first * T + (b * heads + h - first) * T + t)]);
        }
  }
  return r;
}

/// Rows of the positions, `width` elements each, of [B, T, width].
std::vector<float> rows_of(const std::vector<float>& x, const Case& c, const std::vector<std::int32_t>& positions, std::int64_t width) {
  std::vector<float> rows;
  for (std::int64_t b = 0; b < c.sequences; ++b)
    for (const auto t : positions) rows.insert(rows.end(), x.begin() + (b * c.tokens + t) * width, x.begin() + (b * c.tokens + t + 1) * width);
  return rows;
}

/// The third `part` (of q, k, v) of packed rows.
std::vector<float> part_of(const std::vector<float>& packed, const Case& c, std::int64_t part) {
  const std::int64_t width = c.heads * c.size;
  std::vector<float> out;
  for (std::int64_t row = 0; row < std::ssize(packed) / (3 * width); ++row)
    out.insert(out.end(), packed.begin() + (3 * row + part) * width, packed.begin() + (3 * row + part + 1) * width);
  return out;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

/// max |a - b| / max(1, |b|); infinity for what is not finite.
double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double error = a.size() == b.size() ? 0 : std::numeric_limits<double>::infinity(), largest = 1;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    const double off = std::abs(static_cast<double>(a[i]) - b[i]);
    error = std::isfinite(off) ? std::max(error, off) : std::numeric_limits<double>::infinity();
    largest = std::max(largest, std::abs(static_cast<double>(b[i])));
  }
  return error / largest;
}

ExchangeBytes planned(const Case& c, const SequenceSplit& split) {
  const ExchangeShape shape{c.sequences, c.heads, c.size, sizeof(float)};
  switch (c.exchange) {
    case SequenceExchange::ring: return bytes_of_ring(split, shape);
    case SequenceExchange::heads: return bytes_of_heads(split, shape);
    default: return bytes_of_needed(split, plan_needed(split, *map_of(c)), c.tile_key, shape);
  }
}

/// The tolerance is on sums of the same fp32 terms in another order.
void check(const Case& c, unsigned seed, double tolerance = 1e-5) {
  const Inputs in = make_inputs(c, seed);
  const Results whole = alone(c, in);
  const auto split = split_sequence(c.layout, c.tokens, c.ranks, {map_of(c)});
  std::vector<Results> results(static_cast<std::size_t>(c.ranks));
  std::vector<Sent> sent(results.size());
  testing::ThreadRanks::run(c.ranks, [&](Communicator& comm) {
    const auto r = static_cast<std::size_t>(comm.rank());
    results[r] = on_rank(c, in, split, comm, sent[r]);
  });

  const bool bits = c.exchange != SequenceExchange::ring;
  const std::int64_t row = c.heads * c.size;
  const ExchangeBytes bytes = planned(c, split);
  std::vector<float> dscale(whole.dscale.size()), dthreshold(whole.dscale.size());
  std::vector<std::uint64_t> counters(whole.counters.size());
  for (int rank = 0; rank < c.ranks; ++rank) {
    const Results& r = results[static_cast<std::size_t>(rank)];
    const auto positions = split.positions(rank);
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
    EXPECT_LT(distance(r.o, o), tolerance) << "o";
    for (int part = 0; part < 3; ++part)
      EXPECT_LT(distance(part_of(r.gradients, c, part), part_of(gradients, c, part)), tolerance) << "gradient of q, k, v: " << part;
    EXPECT_EQ(static_cast<std::int64_t>(sent[static_cast<std::size_t>(rank)].forward), bytes.forward_sent(rank));
    EXPECT_EQ(static_cast<std::int64_t>(sent[static_cast<std::size_t>(rank)].backward), bytes.backward_sent(rank));
    for (std::size_t h = 0; h < dscale.size(); ++h) dscale[h] += r.dscale[h], dthreshold[h] += r.dthreshold[h];
    for (std::size_t n = 0; n < counters.size(); ++n) counters[n] += r.counters[n];
  }
  EXPECT_LT(distance(dscale, whole.dscale), 10 * tolerance);
  EXPECT_LT(distance(dthreshold, whole.dthreshold), 10 * tolerance);
  EXPECT_EQ(counters, whole.counters);
}

struct Named {
  const char* name;
  std::vector<PatternSpec> patterns;
};
std::vector<Named> families() {
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

class Shared : public ::testing::TestWithParam<SequenceExchange> {};

TEST_P(Shared, EveryPatternLayoutAndNumberOfRanks) {
  unsigned n = 0;
  for (const auto& [name, patterns] : families())
    for (const auto layout : {SequenceLayout::contiguous, SequenceLayout::zigzag, SequenceLayout::balanced})
      for (const int ranks : {2, 3, 4, 8}) {
        Case c;
        c.patterns = patterns;
        c.layout = layout;
        c.ranks = ranks;
        c.exchange = GetParam();
        c.documents = ++n % 2 == 0;
        c.stages = 1 + static_cast<int>(n % 3);
        if (c.exchange == SequenceExchange::heads) c.heads = ranks;
        SCOPED_TRACE(fmt::format("{}, {}, {} ranks{}", name, name_of(layout), ranks, c.documents ? ", documents" : ""));
        check(c, n);
      }
}

TEST_P(Shared, EveryScoreGateAndNormalizer) {
  unsigned n = 0;
  for (const Score score : {Score::dot, Score::cosine, Score::fidelity})
    for (const Gate gate : {Gate::relu, Gate::relu2, Gate::relu4, Gate::softmax})
      for (const Normalizer normalizer : {Normalizer::none, Normalizer::length, Normalizer::sum, Normalizer::rms}) {
        if (gate == Gate::softmax && normalizer != Normalizer::none) continue;
        Case c;
        c.math.score = score;
        c.math.gate = gate;
        c.math.normalizer = normalizer;
        c.math.length_beta = score == Score::cosine && n % 2 == 1 ? 0.2f : 0.0f;
        c.patterns = families()[n % 9].patterns;
        c.heads = 4;
        c.exchange = GetParam();
        c.documents = n % 3 == 0;
        c.tokens = 90 + 7 * (n % 5);
        SCOPED_TRACE(fmt::format("score {}, gate {}, normalizer {}, {}", static_cast<int>(score), static_cast<int>(gate),
                                 static_cast<int>(normalizer), families()[n % 9].name));
        check(c, 200 + n++, 3e-5);
      }
}

TEST_P(Shared, TilesThatAreNotSquareAndSequencesOfEveryLength) {
  for (const auto& [query, key] : {std::pair{8, 16}, {16, 8}, {24, 16}})
    for (const std::int64_t tokens : {97, 144, 145, 160, 191}) {
      Case c;
      c.patterns = {window(23), causal()};
      c.tile_query = query;
      c.tile_key = key;
      c.tokens = tokens;
      c.heads = 2;
      c.layout = SequenceLayout::balanced;
      c.exchange = GetParam();
      c.documents = tokens % 2 == 1;
      SCOPED_TRACE(fmt::format("{} tokens in tiles of {} x {}", tokens, query, key));
      check(c, 300);
    }
}

INSTANTIATE_TEST_SUITE_P(Exchanges, Shared, ::testing::Values(SequenceExchange::needed, SequenceExchange::heads, SequenceExchange::ring),
                         [](const auto& info) {
                           return info.param == SequenceExchange::needed ? "needed" : info.param == SequenceExchange::heads ? "heads" : "ring";
                         });

/// With a window each rank needs the end of the part before its own, and no more however long the sequence is.
TEST(SharedAttention, AWindowMovesAHaloWhateverTheLength) {
  for (const std::int64_t tokens : {128, 256, 1024}) {
    Case c;
    c.patterns = {window(17)};  // the first query of a tile sees all of the two tiles before
    c.layout = SequenceLayout::contiguous;
    c.tokens = tokens;
    c.ranks = 4;
    const Inputs in = make_inputs(c, 9);
    const auto split = split_sequence(c.layout, c.tokens, c.ranks, {map_of(c)});
    std::vector<Sent> sent(4);
    testing::ThreadRanks::run(c.ranks, [&](Communicator& comm) { on_rank(c, in, split, comm, sent[static_cast<std::size_t>(comm.rank())]); });
    const std::uint64_t halo = 2 * 8 * c.heads * c.size * c.sequences * 2 * sizeof(float);  // two tiles of keys and values
    for (int rank = 0; rank < c.ranks; ++rank) {
      const Sent& s = sent[static_cast<std::size_t>(rank)];
      EXPECT_EQ(s.forward, rank == 3 ? 0 : halo) << tokens << " tokens, rank " << rank;
      // Keys and values again to the next rank, gradients to the one before.
      EXPECT_EQ(s.backward, (rank == 3 ? 0 : halo) + (rank == 0 ? 0 : halo)) << tokens << " tokens, rank " << rank;
    }
  }
}

TEST(SharedAttention, CallsThatDoNotFitAreRefused) {
  Case c;
  const auto map = map_of(c);
  const auto split = split_sequence(c.layout, c.tokens, c.ranks, {map});
  const auto ops = make_cpu_ops(1);
  MemoryPlan plan;
  EXPECT_THROW(make_shared_attention({3, 0, c.layout, c.exchange, 1}, split, {map}, shape_of(c), plan), std::logic_error);
  EXPECT_THROW(make_shared_attention({2, 0, c.layout, SequenceExchange::automatic, 1}, split, {map}, shape_of(c), plan), std::logic_error);
  const auto shared = make_shared_attention(part_of(c, 0), split, {map}, shape_of(c), plan);
  plan.allocate(*ops);
  const auto single = make_single_communicator();
  EXPECT_THROW(shared->bind(*ops, {single.get(), {0}}), std::logic_error);
  EXPECT_THROW(shared->forward(0, {}), std::logic_error);
}

}  // namespace
}  // namespace tessera
