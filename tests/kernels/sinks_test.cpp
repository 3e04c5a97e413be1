// Learned keys and values that every query sees against their definition in double and its differences.

#include <algorithm>

#include "tests/kernels/ops_testing.h"

namespace tessera::testing {
namespace {

struct Case {
  std::int64_t batch, heads, tokens, size, sinks;
  Score score;
  Gate gate;
  bool scale_learned;

  std::int64_t rows() const { return batch * tokens; }
};

/// The variables of the definition: q [B, T, H, D], keys and values [H, S, D], bias [H, S], scale [H].
struct Values {
  std::vector<double> q, keys, values, bias, scale;
};
struct Outputs {
  std::vector<double> o, z;
  std::int64_t open = 0;  // edges with x > 0
};

Outputs definition(const Case& c, const Values& in, const std::vector<double>& o, const std::vector<double>& z) {
  Outputs out{o, z};
  const auto D = static_cast<std::size_t>(c.size), S = static_cast<std::size_t>(c.sinks), H = static_cast<std::size_t>(c.heads);
  for (std::size_t row = 0; row < static_cast<std::size_t>(c.rows()); ++row)
    for (std::size_t h = 0; h < H; ++h) {
      const std::size_t at = (row * H + h) * D, tokens = static_cast<std::size_t>(c.tokens), at_z = (row / tokens * H + h) * tokens + row % tokens;
      std::vector<double> sum(D);
      for (std::size_t d = 0; d < D; ++d) sum[d] = z[at_z] * o[at + d];
      for (std::size_t sink = h * S; sink < (h + 1) * S; ++sink) {
        double s = 0;
        for (std::size_t d = 0; d < D; ++d) s += in.q[at + d] * in.keys[sink * D + d];
        const double x = in.scale[h] * (c.score == Score::fidelity ? s * s : s) + in.bias[sink];
        const double weight = std::pow(std::max(0.0, x), gate_power(c.gate));
        out.open += x > 0;
        out.z[at_z] += weight;
        for (std::size_t d = 0; d < D; ++d) sum[d] += weight * in.values[sink * D + d];
      }
      for (std::size_t d = 0; d < D; ++d) out.o[at + d] = sum[d] / out.z[at_z];
    }
  return out;
}

/// A call over every head, and its memory.
struct Problem {
  Case c;
  Floats q, keys, values, bias, scale, o, z, d_o, dq, dkeys, dvalues, dbias, dscale;

  explicit Problem(const Case& which)
      : c(which),
        q(random_floats({c.batch, c.tokens, c.heads * c.size}, 1)),
        keys(random_floats({c.heads, c.sinks, c.size}, 2)),
        values(random_floats({c.heads, c.sinks, c.size}, 3)),
        bias(random_floats({c.heads, c.sinks}, 4, 0.3f)),
        scale(random_floats({c.heads}, 5, 0.3f)),
        o(random_floats({c.batch, c.tokens, c.heads * c.size}, 6)),
        z(random_floats({c.batch, c.heads, c.tokens}, 7)),
        d_o(random_floats({c.batch, c.tokens, c.heads * c.size}, 8)),
        dq(random_floats({c.batch, c.tokens, c.heads * c.size}, 9)),
        dkeys(random_floats({c.heads, c.sinks, c.size}, 10)),
        dvalues(random_floats({c.heads, c.sinks, c.size}, 11)),
        dbias(random_floats({c.heads, c.sinks}, 12)),
        dscale(random_floats({c.heads}, 13)) {
    for (float& x : scale.values) x += 2.0f;
    for (float& x : z.values) x = 0.01f + std::abs(x);
    for (Floats* of : {&q, &keys})  // of about unit length, so that x is of the order of 1
      for (float& x : of->values) x /= std::sqrt(static_cast<float>(c.size)) / 1.5f;
  }

  HeadsView rows(Floats& of, std::int64_t first_head) {
    const std::int64_t width = c.heads * c.size;
    return {of.values.data() + first_head * c.size, DType::f32, c.tokens * width, c.size, width};
  }
  /// Of heads [first, first + count), whose z lies together: [B, count, T] from B first T on.
  Sinks call(std::int64_t first, std::int64_t count) {
    const std::int64_t S = c.sinks, D = c.size;
    Sinks s;
    s.shape = {c.batch, count, c.tokens, c.size};
    s.score = c.score, s.gate = c.gate;
    s.q = rows(q, first), s.o = rows(o, first);
    s.scale = scale.tensor().slice(first, count);
    s.keys = keys.tensor().slice(first * S * D, count * S * D).view({count, S, D});
    s.values = values.tensor().slice(first * S * D, count * S * D).view({count, S, D});
    s.bias = bias.tensor().slice(first * S, count * S).view({count, S});
    s.z = z.tensor().slice(c.batch * first * c.tokens, c.batch * count * c.tokens);
    return s;
  }
  Sinks call() { return call(0, c.heads); }
  SinksBackward backward_call(std::int64_t first, std::int64_t count) {
    const std::int64_t S = c.sinks, D = c.size;
    SinksBackward g;
    g.forward = call(first, count);
    g.d_o = rows(d_o, first), g.dq = rows(dq, first);
    if (c.scale_learned) g.dscale = dscale.tensor().slice(first, count);
    g.dkeys = dkeys.tensor().slice(first * S * D, count * S * D).view({count, S, D});
    g.dvalues = dvalues.tensor().slice(first * S * D, count * S * D).view({count, S, D});
    g.dbias = dbias.tensor().slice(first * S, count * S).view({count, S});
    return g;
  }
  SinksBackward backward_call() { return backward_call(0, c.heads); }
};

class SinksOfKinds : public ::testing::TestWithParam<std::tuple<Score, Gate>> {};

TEST_P(SinksOfKinds, MatchTheDefinitionAndItsDifferences) {
  const auto [score, gate] = GetParam();
  const std::int64_t shapes[][5] = {{1, 1, 1, 8, 1}, {2, 3, 13, 8, 2}, {1, 2, 3, 64, 8}, {2, 1, 1, 128, 5}};
  for (const auto& s : shapes) {
    for (const bool scale_learned : {false, true}) {
      SCOPED_TRACE(::testing::Message() << s[0] << " x " << s[1] << " x " << s[2] << " x " << s[3] << ", " << s[4] << " sinks"
                                        << (scale_learned ? ", scale learned" : ""));
      Problem p({s[0], s[1], s[2], s[3], s[4], score, gate, scale_learned});
      const Case& c = p.c;
      const Values in{p.q.doubles(), p.keys.doubles(), p.values.doubles(), p.bias.doubles(), p.scale.doubles()};
      const auto o = p.o.doubles(), z = p.z.doubles();
      const Outputs exact = definition(c, in, o, z);
      if (c.tokens > 10 && score != Score::fidelity) {
        EXPECT_GT(exact.open, 0) << "the case is to have open edges";
        EXPECT_LT(exact.open, c.rows() * c.heads * c.sinks) << "and closed ones";
      }
      ops().sinks_forward(p.call());
      // Products of D terms, to the power p, relative to z.
      const double tolerance = 4 * (static_cast<double>(c.size) + 20) * kEpsilon;
      expect_close(p.o.values, exact.o, tolerance, "o");
      expect_close(p.z.values, exact.z, tolerance, "z");

      const Floats dq = p.dq, dkeys = p.dkeys, dvalues = p.dvalues, dbias = p.dbias, dscale = p.dscale;
      ops().sinks_backward(p.backward_call());
      // What goes through z and o of the attention's own edges is attention_backward's: here they are constants.
      const auto numeric = [&](std::vector<double> Values::*variable) {
        return numeric_gradient(
            [&](const std::vector<double>& x) {
              Values at = in;
              at.*variable = x;
              return inner(definition(c, at, o, z).o, p.d_o.values);
            },
            in.*variable);
      };
      const double loose = 10 * tolerance + 1e-5;
      expect_close(p.dq.values, plus(dq, numeric(&Values::q)), loose, "dq");
      expect_close(p.dkeys.values, plus(dkeys, numeric(&Values::keys)), loose, "dkeys");
      expect_close(p.dvalues.values, plus(dvalues, numeric(&Values::values)), loose, "dvalues");
      expect_close(p.dbias.values, plus(dbias, numeric(&Values::bias)), loose, "dbias");
      if (scale_learned)
        expect_close(p.dscale.values, plus(dscale, numeric(&Values::scale)), loose, "dscale");
      else
        EXPECT_EQ(p.dscale, dscale);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, SinksOfKinds,
                         ::testing::Combine(::testing::Values(Score::dot, Score::cosine, Score::fidelity),
                                            ::testing::Values(Gate::relu, Gate::relu2, Gate::relu4)));

void expect_same_gradients(const Problem& found, const Problem& expected) {
  EXPECT_EQ(found.dq, expected.dq);
  EXPECT_EQ(found.dkeys, expected.dkeys);
  EXPECT_EQ(found.dvalues, expected.dvalues);
  EXPECT_EQ(found.dbias, expected.dbias);
  EXPECT_EQ(found.dscale, expected.dscale);
}

constexpr Case kCase{2, 4, 5, 16, 3, Score::cosine, Gate::relu2, true};

TEST(Sinks, ClosedChangeNoBit) {
  Problem p(kCase);
  for (float& b : p.bias.values) b = -100.0f;
  const Problem before = p;
  ops().sinks_forward(p.call());
  EXPECT_EQ(p.o, before.o);
  EXPECT_EQ(p.z, before.z);
  ops().sinks_backward(p.backward_call());
  expect_same_gradients(p, before);
}

TEST(Sinks, OneAloneGivesItsValue) {
  Problem p({2, 3, 5, 16, 1, Score::cosine, Gate::relu2, true});
  for (float& b : p.bias.values) b = 30.0f;
  std::ranges::fill(p.o.values, 0.0f);
  std::ranges::fill(p.z.values, 1e-6f);  // a query without an active edge: eps
  ops().sinks_forward(p.call());
  for (std::size_t i = 0; i < p.o.values.size(); ++i) ASSERT_NEAR(p.o.values[i], p.values.values[i % 48], 1e-5);  // [H, 1, D] for each row
}

TEST(Sinks, OnesAreAnEpsilonOfTheirOwn) {  // a value of zeros takes its weight's share and gives nothing
  Problem p({1, 2, 4, 8, 1, Score::dot, Gate::relu, true});
  std::ranges::fill(p.values.values, 0.0f);
  std::ranges::fill(p.keys.values, 0.0f);
  p.bias.values = {0.5f, 2.0f};
  const Problem before = p;
  ops().sinks_forward(p.call());
  for (std::int64_t h = 0; h < 2; ++h)
    for (std::int64_t t = 0; t < 4; ++t) {
      const float z = before.z[h * 4 + t];
      EXPECT_FLOAT_EQ(p.z[h * 4 + t], z + p.bias[h]);
      for (std::int64_t d = 0; d < 8; ++d) EXPECT_FLOAT_EQ(p.o[(t * 2 + h) * 8 + d], before.o[(t * 2 + h) * 8 + d] * z / (z + p.bias[h]));
    }
}

TEST(Sinks, SomeHeadsAtATimeHaveTheBitsOfAll) {
  Problem all(kCase), parts(kCase);
  parts.z = in_stretches(all.z, {3, 1});
  ops().sinks_forward(all.call());
  ops().sinks_forward(parts.call(0, 3));
  ops().sinks_forward(parts.call(3, 1));
  EXPECT_EQ(parts.o, all.o);
  EXPECT_EQ(parts.z, in_stretches(all.z, {3, 1}));
  ops().sinks_backward(all.backward_call());
  ops().sinks_backward(parts.backward_call(0, 3));
  ops().sinks_backward(parts.backward_call(3, 1));
  expect_same_gradients(parts, all);
}

TEST(Sinks, RefuseWrongArguments) {
  Problem p(kCase);
  const auto refused = [&](auto&& change, const char* what) {
    SinksBackward g = p.backward_call();
    change(g.forward, g);
    EXPECT_THROW(ops().sinks_backward(g), std::logic_error) << what;
  };
  refused([](Sinks& s, auto&) { s.gate = Gate::softmax; }, "softmax");
  refused([](Sinks& s, auto&) { s.z = s.z.slice(1, s.z.numel() - 1); }, "z of another size");
  refused([](Sinks& s, auto&) { s.bias = {}; }, "no bias");
  refused([](Sinks& s, auto&) { s.keys = s.keys.slice(0, s.keys.numel()); }, "keys without a shape");
  refused([](Sinks& s, auto&) { s.keys = s.keys.view({4, 0, 16}); }, "no sink");
  refused([](Sinks& s, auto&) { s.keys = s.keys.view({2, 9, 8}); }, "nine");
  refused([](Sinks& s, auto&) { s.keys = s.keys.view({2, 3, 32}); }, "keys of half the heads");
  refused([](Sinks& s, auto&) { s.bias = s.bias.view({3, 4}); }, "bias of another shape");
  refused([](Sinks& s, auto&) { s.values = s.values.slice(0, 16).view({1, 1, 16}); }, "values of another size");
  refused([](Sinks& s, auto&) { s.q.token = 3; }, "tokens that overlap");
  refused([](Sinks& s, auto&) { s.o.dtype = DType::bf16; }, "o in bf16");
  refused([](auto&, SinksBackward& g) { g.dq.data = nullptr; }, "no dq");
  refused([](auto&, SinksBackward& g) { g.dkeys = {}; }, "no dkeys");
  refused([](auto&, SinksBackward& g) { g.dbias = {}; }, "no dbias");
  Sinks s = p.call();
  s.gate = Gate::softmax;
  EXPECT_THROW(ops().sinks_forward(s), std::logic_error);
}

}  // namespace
}  // namespace tessera::testing
