// The edge from each token to itself against its definition in double and its differences.

#include <algorithm>
#include <numeric>

#include "tests/kernels/ops_testing.h"

namespace tessera::testing {
namespace {

struct Case {
  std::int64_t batch, heads, tokens, size;
  Score score;
  Gate gate;
  bool scale_learned;
};

/// Where element d of part p (q, k, v) of (b, h, t) lies in [B, T, 3, H, D], and of (b, h, t) in [B, T, H, D].
std::size_t packed_at(const Case& c, std::int64_t p, std::int64_t b, std::int64_t h, std::int64_t t) {
  return static_cast<std::size_t>((((b * c.tokens + t) * 3 + p) * c.heads + h) * c.size);
}
std::size_t output_at(const Case& c, std::int64_t b, std::int64_t h, std::int64_t t) {
  return static_cast<std::size_t>(((b * c.tokens + t) * c.heads + h) * c.size);
}

/// The variables of the definition, one vector after another: q, k, v packed, scale, bias.
struct Values {
  std::vector<double> qkv, scale, bias;
};
struct Outputs {
  std::vector<double> o, z;
  std::vector<std::uint64_t> open;  // edges with x > 0, of each head
};

Outputs definition(const Case& c, const Values& in, const std::vector<double>& o, const std::vector<double>& z) {
  Outputs out{o, z, std::vector<std::uint64_t>(static_cast<std::size_t>(c.heads))};
  for (std::int64_t b = 0; b < c.batch; ++b)
    for (std::int64_t h = 0; h < c.heads; ++h)
      for (std::int64_t t = 0; t < c.tokens; ++t) {
        const double *q = &in.qkv[packed_at(c, 0, b, h, t)], *k = &in.qkv[packed_at(c, 1, b, h, t)], *v = &in.qkv[packed_at(c, 2, b, h, t)];
        double s = 0;
        for (std::int64_t d = 0; d < c.size; ++d) s += q[d] * k[d];
        const auto head = static_cast<std::size_t>(h), row = static_cast<std::size_t>((b * c.heads + h) * c.tokens + t);
        const double x = in.scale[head] * (c.score == Score::fidelity ? s * s : s) + in.bias[head];
        const double weight = std::pow(std::max(0.0, x), gate_power(c.gate));
        out.open[head] += x > 0;
        out.z[row] = z[row] + weight;
        for (std::int64_t d = 0; d < c.size; ++d) {
          const std::size_t at = output_at(c, b, h, t) + static_cast<std::size_t>(d);
          out.o[at] = (z[row] * o[at] + weight * v[d]) / out.z[row];
        }
      }
  return out;
}

/// A call over every head, and its memory.
struct Problem {
  Case c;
  Floats qkv, scale, bias, o, z, d_o, dqkv, dscale, dbias;
  Host<std::uint64_t> counters;

  explicit Problem(const Case& which)
      : c(which),
        qkv(random_floats({c.batch, c.tokens, 3, c.heads * c.size}, 1)),
        scale(random_floats({c.heads}, 2, 0.3f)),
        bias(random_floats({c.heads}, 3, 0.3f)),
        o(random_floats({c.batch, c.tokens, c.heads, c.size}, 4)),
        z(random_floats({c.batch, c.heads, c.tokens}, 5)),
        d_o(random_floats({c.batch, c.tokens, c.heads, c.size}, 6)),
        dqkv(random_floats({c.batch, c.tokens, 3, c.heads * c.size}, 7)),
        dscale(random_floats({c.heads}, 8)),
        dbias(random_floats({c.heads}, 9)),
        counters({c.heads, kAttentionCounters}, 1000) {
    for (float& x : scale.values) x += 2.0f;
    for (float& x : z.values) x = 0.01f + std::abs(x);
    // q and k of about unit length, so that x is of the order of 1.
    for (std::size_t i = 0; i < qkv.values.size(); ++i)
      if (i / static_cast<std::size_t>(c.heads * c.size) % 3 < 2) qkv.values[i] /= std::sqrt(static_cast<float>(c.size)) / 1.5f;
  }

  HeadsView part(Floats& packed, std::int64_t p, std::int64_t first_head) {
    const std::int64_t width = c.heads * c.size;
    return {packed.values.data() + p * width + first_head * c.size, DType::f32, c.tokens * 3 * width, c.size, 3 * width};
  }
  HeadsView rows(Floats& of, std::int64_t first_head) {
    const std::int64_t width = c.heads * c.size;
    return {of.values.data() + first_head * c.size, DType::f32, c.tokens * width, c.size, width};
  }
  /// Of heads [first, first + count), whose z lies together: [B, count, T] from B first T on.
  SelfEdge call(std::int64_t first, std::int64_t count) {
    SelfEdge s;
    s.shape = {c.batch, count, c.tokens, c.size};
    s.score = c.score;
    s.gate = c.gate;
    s.q = part(qkv, 0, first), s.k = part(qkv, 1, first), s.v = part(qkv, 2, first), s.o = rows(o, first);
    s.scale = scale.tensor().slice(first, count), s.bias = bias.tensor().slice(first, count);
    s.z = z.tensor().slice(c.batch * first * c.tokens, c.batch * count * c.tokens);
    s.counters = counters.tensor().slice(first * kAttentionCounters, count * kAttentionCounters).view({count, kAttentionCounters});
    return s;
  }
  SelfEdge call() { return call(0, c.heads); }
  SelfEdgeBackward backward_call() {
    SelfEdgeBackward g;
    g.forward = call();
    g.d_o = rows(d_o, 0);
    g.dq = part(dqkv, 0, 0), g.dk = part(dqkv, 1, 0), g.dv = part(dqkv, 2, 0);
    if (c.scale_learned) g.dscale = dscale.tensor();
    g.dbias = dbias.tensor();
    return g;
  }
};

class SelfEdges : public ::testing::TestWithParam<std::tuple<Score, Gate>> {};

TEST_P(SelfEdges, MatchTheDefinitionAndItsDifferences) {
  const auto [score, gate] = GetParam();
  const std::int64_t shapes[][4] = {{1, 1, 1, 8}, {2, 3, 13, 8}, {1, 2, 3, 64}, {2, 1, 1, 128}};
  for (const auto& s : shapes) {
    for (const bool scale_learned : {false, true}) {
      SCOPED_TRACE(::testing::Message() << s[0] << " x " << s[1] << " x " << s[2] << " x " << s[3] << (scale_learned ? ", scale learned" : ""));
      Problem p({s[0], s[1], s[2], s[3], score, gate, scale_learned});
      const Case& c = p.c;
      const Values in{p.qkv.doubles(), p.scale.doubles(), p.bias.doubles()};
      const auto o = p.o.doubles(), z = p.z.doubles();
      const Outputs exact = definition(c, in, o, z);
      if (c.tokens > 10 && score != Score::fidelity) {
        const auto open = std::accumulate(exact.open.begin(), exact.open.end(), std::uint64_t{0});
        EXPECT_GT(open, 0u) << "the case is to have open edges";
        EXPECT_LT(open, static_cast<std::uint64_t>(c.batch * c.heads * c.tokens)) << "and closed ones";
      }
      ops().self_edge_forward(p.call());
      for (std::int64_t h = 0; h < c.heads; ++h)
        for (std::int64_t n = 0; n < kAttentionCounters; ++n)
          EXPECT_EQ(p.counters[h * kAttentionCounters + n], 1000 + (n == kActiveEdges ? exact.open[static_cast<std::size_t>(h)] : 0))
              << h << ", " << n;
      // A product of D terms, to the power p, relative to z.
      const double tolerance = 4 * (static_cast<double>(c.size) + 20) * kEpsilon;
      expect_close(p.o.values, exact.o, tolerance, "o");
      expect_close(p.z.values, exact.z, tolerance, "z");

      const Floats dqkv = p.dqkv, dscale = p.dscale, dbias = p.dbias;
      ops().self_edge_backward(p.backward_call());
      const auto loss = [&](const Values& at) { return inner(definition(c, at, o, z).o, p.d_o.values); };
      // What goes through z and o of the gated edges is attention_backward's: here they are constants.
      const auto wrt_qkv = numeric_gradient([&](const auto& x) { return loss({x, in.scale, in.bias}); }, in.qkv);
      const auto wrt_scale = numeric_gradient([&](const auto& x) { return loss({in.qkv, x, in.bias}); }, in.scale);
      const auto wrt_bias = numeric_gradient([&](const auto& x) { return loss({in.qkv, in.scale, x}); }, in.bias);
      const double loose = 10 * tolerance + 1e-5;
      expect_close(p.dqkv.values, plus(dqkv, wrt_qkv), loose, "dq, dk, dv");
      expect_close(p.dbias.values, plus(dbias, wrt_bias), loose, "dbias");
      if (scale_learned)
        expect_close(p.dscale.values, plus(dscale, wrt_scale), loose, "dscale");
      else
        EXPECT_EQ(p.dscale, dscale);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, SelfEdges,
                         ::testing::Combine(::testing::Values(Score::dot, Score::cosine, Score::fidelity),
                                            ::testing::Values(Gate::relu, Gate::relu2, Gate::relu4)));

constexpr Case kCase{2, 4, 5, 16, Score::cosine, Gate::relu2, true};

TEST(SelfEdge, ClosedChangesNoBit) {
  Problem p(kCase);
  for (float& b : p.bias.values) b = -100.0f;
  const Floats o = p.o, z = p.z, dqkv = p.dqkv, dscale = p.dscale, dbias = p.dbias;
  ops().self_edge_forward(p.call());
  EXPECT_EQ(p.o, o);
  EXPECT_EQ(p.z, z);
  ops().self_edge_backward(p.backward_call());
  EXPECT_EQ(p.dqkv, dqkv);
  EXPECT_EQ(p.dscale, dscale);
  EXPECT_EQ(p.dbias, dbias);
}

TEST(SelfEdge, AloneGivesTheTokensOwnValue) {
  Problem p(kCase);
  for (float& b : p.bias.values) b = 30.0f;
  std::ranges::fill(p.o.values, 0.0f);
  std::ranges::fill(p.z.values, 1e-6f);  // a query without an active edge: eps
  ops().self_edge_forward(p.call());
  for (std::int64_t b = 0; b < p.c.batch; ++b)
    for (std::int64_t t = 0; t < p.c.tokens; ++t)
      for (std::int64_t h = 0; h < p.c.heads; ++h)
        for (std::size_t d = 0; d < static_cast<std::size_t>(p.c.size); ++d)
          ASSERT_NEAR(p.o.values[output_at(p.c, b, h, t) + d], p.qkv.values[packed_at(p.c, 2, b, h, t) + d], 1e-5);
}

TEST(SelfEdge, SomeHeadsAtATimeHaveTheBitsOfAll) {
  Problem all(kCase), parts(kCase);
  parts.z = in_stretches(all.z, {3, 1});
  ops().self_edge_forward(all.call());
  ops().self_edge_forward(parts.call(0, 3));
  ops().self_edge_forward(parts.call(3, 1));
  EXPECT_EQ(parts.o, all.o);
  EXPECT_EQ(parts.z, in_stretches(all.z, {3, 1}));
  EXPECT_EQ(parts.counters, all.counters);

  // Nobody has to count.
  Problem uncounted(kCase);
  SelfEdge s = uncounted.call();
  s.counters = {};
  ops().self_edge_forward(s);
  EXPECT_EQ(uncounted.o, all.o);
}

TEST(SelfEdge, RefusesWrongArguments) {
  Problem p(kCase);
  const auto refused = [&](auto&& change) {
    SelfEdgeBackward g = p.backward_call();
    change(g.forward, g);
    EXPECT_THROW(ops().self_edge_backward(g), std::logic_error);
  };
  refused([](SelfEdge& s, auto&) { s.gate = Gate::softmax; });
  refused([](SelfEdge& s, auto&) { s.z = s.z.slice(1, s.z.numel() - 1); });
  refused([](SelfEdge& s, auto&) { s.bias = {}; });
  refused([](SelfEdge& s, auto&) { s.counters = s.counters.slice(0, 5); });
  refused([](SelfEdge& s, auto&) { s.v.dtype = DType::bf16; });
  refused([](SelfEdge& s, auto&) { s.q.token = 3; });
  refused([](auto&, SelfEdgeBackward& g) { g.dk.data = nullptr; });
  refused([](auto&, SelfEdgeBackward& g) { g.dbias = {}; });
  SelfEdge s = p.call();
  s.gate = Gate::softmax;
  EXPECT_THROW(ops().self_edge_forward(s), std::logic_error);
}

}  // namespace
}  // namespace tessera::testing
