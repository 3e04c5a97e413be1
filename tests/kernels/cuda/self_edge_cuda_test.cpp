// The edge from each token to itself on the GPU against its definition in double precision (the judge: ops_cuda.h).

#include <vector>

#include "ops_cuda.h"

namespace tessera {
namespace {

using namespace cuda_test;

struct Case {
  std::int64_t batch, heads, tokens, size;
  Score score;
  Gate gate;
};

std::string name_of(const Case& c) {
  return "[" + std::to_string(c.batch) + "," + std::to_string(c.heads) + "," + std::to_string(c.tokens) + "," + std::to_string(c.size) + "] score " +
         std::to_string(static_cast<int>(c.score)) + " gate " + std::to_string(static_cast<int>(c.gate));
}

/// Both head sizes of the attention and others, whole tiles of heads and not, rows that fill a block and not, more rows than the blocks take at once
/// (8,448 forward, 2,112 backward).
std::vector<Case> cases() {
  std::vector<Case> list;
  const std::int64_t shapes[][4] = {{1, 1, 1, 64},  {2, 3, 37, 64}, {3, 12, 101, 64}, {1, 5, 3, 128},   {2, 2, 129, 128}, {1, 1, 2500, 8},
                                    {2, 3, 19, 40}, {1, 2, 7, 256}, {2, 33, 11, 8},   {3, 3, 2900, 64}, {2, 2, 1100, 40}};
  for (const auto& s : shapes)
    for (const Score score : {Score::dot, Score::cosine, Score::fidelity})
      for (const Gate gate : {Gate::relu, Gate::relu2, Gate::relu4}) list.push_back({s[0], s[1], s[2], s[3], score, gate});
  return list;
}

/// The values of a case: qkv [B, T, 3, H, D], o and d_o [B, T, H, D], z [B, H, T]. Exact outputs, and the same maths with inputs to the second step
/// rounded as the operation stores them.
struct Problem {
  Case c;
  Doubles qkv, o, z, d_o, dqkv, scale, bias, dscale, dbias;

  explicit Problem(const Case& which)
      : c(which),
        qkv(random_bf16(rows() * 3 * c.heads * c.size, 1)),
        o(random_bf16(rows() * c.heads * c.size, 2)),
        z(random_f32(rows() * c.heads, 3)),
        d_o(random_bf16(rows() * c.heads * c.size, 4)),
        dqkv(random_bf16(rows() * 3 * c.heads * c.size, 5)),
        scale(random_f32(c.heads, 6, 0.3)),
        bias(random_f32(c.heads, 7, 0.3)),
        dscale(random_f32(c.heads, 8)),
        dbias(random_f32(c.heads, 9)) {
    for (double& x : scale) x = static_cast<float>(x + 2);
    for (double& x : z) x = static_cast<float>(0.05 + std::abs(x));
    // q and k of about unit length, so that x is of the order of 1.
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(qkv.size()); ++i)
      if (i / (c.heads * c.size) % 3 < 2) qkv[i] = bf16(qkv[i] * 1.5 / std::sqrt(static_cast<double>(c.size)));
  }
  std::int64_t rows() const { return c.batch * c.tokens; }

  /// Calls body(head, qkv's q, k and v of an edge, its place in o, its place in z).
  template <class Body>
  void for_each_edge(Body&& body) const {
    for (std::int64_t b = 0; b < c.batch; ++b)
      for (std::int64_t t = 0; t < c.tokens; ++t)
        for (std::int64_t h = 0; h < c.heads; ++h) {
          const std::int64_t row = b * c.tokens + t, q = (row * 3 * c.heads + h) * c.size, part = c.heads * c.size;
          body(h, q, q + part, q + 2 * part, (row * c.heads + h) * c.size, (b * c.heads + h) * c.tokens + t);
        }
  }
  double product(std::int64_t q, std::int64_t k) const {
    double s = 0;
    for (std::int64_t d = 0; d < c.size; ++d) s += qkv[q + d] * qkv[k + d];
    return s;
  }
  double f(double s) const { return c.score == Score::fidelity ? s * s : s; }
  double argument(std::int64_t h, double s) const { return scale[h] * f(s) + bias[h]; }

  /// And how many edges are open, counters as the operation leaves them from 7 on.
  Doubles forward(Doubles& to_o, Doubles& to_z) const {
    to_o = o, to_z = z;
    Doubles counters(c.heads * kAttentionCounters, 7);
    for_each_edge([&](auto h, auto q, auto k, auto v, auto at, auto at_z) {
      const double x = argument(h, product(q, k)), weight = x > 0 ? std::pow(x, gate_power(c.gate)) : 0;
      to_z[at_z] = z[at_z] + weight;
      for (std::int64_t d = 0; d < c.size; ++d) to_o[at + d] = (z[at_z] * o[at + d] + weight * qkv[v + d]) / to_z[at_z];
      counters[h * kAttentionCounters + kActiveEdges] += x > 0;
    });
    return counters;
  }
  /// With o' and z' as the operation gets them.
  struct Gradients {
    Doubles dqkv, dscale, dbias;
  };
  Gradients backward(const Doubles& o_, const Doubles& z_) const {
    Gradients g{dqkv, dscale, dbias};
    for_each_edge([&](auto h, auto q, auto k, auto v, auto at, auto at_z) {
      const double s = product(q, k), x = argument(h, s), p = gate_power(c.gate);
      if (!(x > 0)) return;
      double along = 0;
      for (std::int64_t d = 0; d < c.size; ++d) along += d_o[at + d] * (qkv[v + d] - o_[at + d]);
      const double dx = along / z_[at_z] * p * std::pow(x, p - 1), ds = scale[h] * dx * (c.score == Score::fidelity ? 2 * s : 1);
      for (std::int64_t d = 0; d < c.size; ++d) {
        g.dqkv[q + d] += ds * qkv[k + d];
        g.dqkv[k + d] += ds * qkv[q + d];
        g.dqkv[v + d] += std::pow(x, p) / z_[at_z] * d_o[at + d];
      }
      g.dbias[h] += dx;
      g.dscale[h] += dx * f(s);
    });
    return g;
  }
};

/// A call's memory.
struct Memory {
  const Case c;
  OnDevice qkv, o, d_o, dqkv, z, scale, bias, dscale, dbias, counters;

  explicit Memory(const Problem& p)
      : c(p.c),
        qkv(DType::bf16, {c.batch, c.tokens, 3, c.heads * c.size}, p.qkv),
        o(DType::bf16, {c.batch, c.tokens, c.heads, c.size}, p.o),
        d_o(DType::bf16, {c.batch, c.tokens, c.heads, c.size}, p.d_o),
        dqkv(DType::bf16, {c.batch, c.tokens, 3, c.heads * c.size}, p.dqkv),
        z(DType::f32, {c.batch, c.heads, c.tokens}, p.z),
        scale(DType::f32, {c.heads}, p.scale),
        bias(DType::f32, {c.heads}, p.bias),
        dscale(DType::f32, {c.heads}, p.dscale),
        dbias(DType::f32, {c.heads}, p.dbias),
        counters(DType::u64, {c.heads, kAttentionCounters}, Doubles(c.heads * kAttentionCounters, 7)) {}

  HeadsView part(const Tensor& packed, std::int64_t n, std::int64_t first_head) const {
    const std::int64_t width = c.heads * c.size;
    return {static_cast<Bf16*>(packed.data) + n * width + first_head * c.size, DType::bf16, c.tokens * 3 * width, c.size, 3 * width};
  }
  HeadsView heads(const Tensor& of, std::int64_t first_head) const {
    const std::int64_t width = c.heads * c.size;
    return {static_cast<Bf16*>(of.data) + first_head * c.size, DType::bf16, c.tokens * width, c.size, width};
  }
  /// Of heads [first, first + count), whose z is [B, count, T] from element B first T on.
  SelfEdge forward(std::int64_t first, std::int64_t count) const {
    SelfEdge e;
    e.shape = {c.batch, count, c.tokens, c.size}, e.score = c.score, e.gate = c.gate;
    e.q = part(qkv, 0, first), e.k = part(qkv, 1, first), e.v = part(qkv, 2, first), e.o = heads(o, first);
    e.scale = scale.tensor().slice(first, count), e.bias = bias.tensor().slice(first, count);
    e.z = z.tensor().slice(c.batch * first * c.tokens, c.batch * count * c.tokens);
    e.counters = counters.tensor().slice(first * kAttentionCounters, count * kAttentionCounters).view({count, kAttentionCounters});
    return e;
  }
  SelfEdge forward() const { return forward(0, c.heads); }
  SelfEdgeBackward backward() const {
    SelfEdgeBackward g;
    g.forward = forward(), g.d_o = heads(d_o, 0);
    g.dq = part(dqkv, 0, 0), g.dk = part(dqkv, 1, 0), g.dv = part(dqkv, 2, 0), g.dscale = dscale, g.dbias = dbias;
    return g;
  }
};

TEST(CudaSelfEdge, ForwardMatchesTheDefinition) {
  TESSERA_NEEDS_GPU();
  for (const Case& c : cases()) {
    SCOPED_TRACE(name_of(c));
    const Problem p(c);
    Memory m(p);
    const auto run = [&] {
      m.o.set(p.o), m.z.set(p.z), m.counters.set(Doubles(c.heads * kAttentionCounters, 7));
      cuda::self_edge_forward(context(), m.forward());
      return joined({&m.o, &m.z, &m.counters});
    };
    run();
    Doubles o, z;
    EXPECT_TRUE(m.counters.doubles() == p.forward(o, z)) << "open edges";
    expect_within_twice(m.o.doubles(), o, bf16(o), "o");
    expect_close(m.z.doubles(), z, 1e-5, "z");
    EXPECT_TRUE(m.qkv.doubles() == p.qkv) << "q, k, v were touched";
    expect_repeatable(run, name_of(c));
  }
}

TEST(CudaSelfEdge, BackwardMatchesTheDefinition) {
  TESSERA_NEEDS_GPU();
  for (const Case& c : cases()) {
    SCOPED_TRACE(name_of(c));
    const Problem p(c);
    Doubles o, z;
    p.forward(o, z);
    o = bf16(o), z = f32(z);
    Memory m(p);
    m.o.set(o), m.z.set(z);
    const auto run = [&] {
      m.dqkv.set(p.dqkv), m.dscale.set(p.dscale), m.dbias.set(p.dbias);
      cuda::self_edge_backward(context(), m.backward());
      return joined({&m.dqkv, &m.dscale, &m.dbias});
    };
    run();
    const auto exact = p.backward(o, z);
    expect_within_twice(m.dqkv.doubles(), exact.dqkv, bf16(exact.dqkv), "dq, dk, dv");
    expect_close(m.dbias.doubles(), exact.dbias, 1e-4, "dbias");
    expect_close(m.dscale.doubles(), exact.dscale, 1e-4, "dscale");
    EXPECT_TRUE(m.o.doubles() == o && m.z.doubles() == z) << "o or z was touched";
    expect_repeatable(run, name_of(c));

    // Without dscale the rest has the same bits.
    const auto with = joined({&m.dqkv, &m.dbias});
    m.dqkv.set(p.dqkv), m.dscale.set(p.dscale), m.dbias.set(p.dbias);
    SelfEdgeBackward g = m.backward();
    g.dscale = {};
    cuda::self_edge_backward(context(), g);
    EXPECT_TRUE(joined({&m.dqkv, &m.dbias}) == with);
    EXPECT_TRUE(m.dscale.doubles() == p.dscale);
  }
}

TEST(CudaSelfEdge, ClosedChangesNoBit) {
  TESSERA_NEEDS_GPU();
  const Problem p({2, 3, 9, 64, Score::cosine, Gate::relu2});
  Memory m(p);
  m.bias.set(Doubles(3, -100.0));
  cuda::self_edge_forward(context(), m.forward());
  cuda::self_edge_backward(context(), m.backward());
  EXPECT_TRUE(m.o.doubles() == p.o);
  EXPECT_TRUE(m.z.doubles() == p.z);
  EXPECT_TRUE(m.dqkv.doubles() == p.dqkv);
  EXPECT_TRUE(m.dbias.doubles() == p.dbias);
}

TEST(CudaSelfEdge, SomeHeadsAndSomeRowsHaveTheBitsOfAll) {
  TESSERA_NEEDS_GPU();
  const Problem p({1, 5, 13, 64, Score::cosine, Gate::relu2});
  Memory all(p), heads(p), rows(p);
  cuda::self_edge_forward(context(), all.forward());
  cuda::self_edge_forward(context(), heads.forward(0, 3));
  cuda::self_edge_forward(context(), heads.forward(3, 2));
  EXPECT_TRUE(heads.o.bytes() == all.o.bytes());
  EXPECT_TRUE(heads.z.bytes() == all.z.bytes());
  EXPECT_TRUE(heads.counters.bytes() == all.counters.bytes());
  // The last token alone, as generation has it, with z [B, H] of its own.
  Doubles z;
  for (int h = 0; h < 5; ++h) z.push_back(p.z[h * 13 + 12]);
  OnDevice last(DType::f32, {1, 5}, z);
  SelfEdge e = rows.forward();
  e.shape.tokens = 1;
  for (HeadsView* v : {&e.q, &e.k, &e.v, &e.o}) v->data = static_cast<Bf16*>(v->data) + 12 * v->token;
  e.z = last;
  cuda::self_edge_forward(context(), e);
  const Doubles got = rows.o.doubles(), want = all.o.doubles(), want_z = all.z.doubles(), got_z = last.doubles();
  EXPECT_TRUE(std::equal(got.end() - 5 * 64, got.end(), want.end() - 5 * 64));
  for (int h = 0; h < 5; ++h) EXPECT_EQ(got_z[h], want_z[h * 13 + 12]);
}

TEST(CudaSelfEdge, RefusesWrongArguments) {
  TESSERA_NEEDS_GPU();
  const Problem p({2, 3, 9, 64, Score::cosine, Gate::relu2});
  Memory m(p);
  const auto refused = [&](auto&& change, const char* what) {
    SelfEdgeBackward g = m.backward();
    change(g.forward, g);
    EXPECT_THROW(cuda::self_edge_backward(context(), g), std::logic_error) << what;
  };
  refused([](SelfEdge& e, auto&) { e.gate = Gate::softmax; }, "softmax");
  refused([](SelfEdge& e, auto&) { e.shape.head_size = 12; }, "a head size of 12");
  refused([](SelfEdge& e, auto&) { e.bias = {}; }, "no bias");
  refused([](SelfEdge& e, auto&) { e.counters = e.counters.slice(0, 5); }, "counters of another size");
  refused([](SelfEdge& e, auto&) { e.z = e.z.slice(0, 5); }, "z of another size");
  refused([](SelfEdge& e, auto&) { e.v.data = static_cast<Bf16*>(e.v.data) + 1; }, "v on no boundary of 16 bytes");
  refused([](auto&, SelfEdgeBackward& g) { g.dk.dtype = DType::f32; }, "dk in f32");
  refused([](auto&, SelfEdgeBackward& g) { g.dbias = {}; }, "no dbias");
}

}  // namespace
}  // namespace tessera
