// Learned keys and values that every query sees, on the GPU, against their definition in double precision (the judge: ops_cuda.h).

#include <vector>

#include "ops_cuda.h"

namespace tessera {
namespace {

using namespace cuda_test;

struct Case {
  std::int64_t batch, heads, tokens, size, sinks;
  Score score;
  Gate gate;
};

std::string name_of(const Case& c) {
  return "[" + std::to_string(c.batch) + "," + std::to_string(c.heads) + "," + std::to_string(c.tokens) + "," + std::to_string(c.size) + "] " +
         std::to_string(c.sinks) + " sinks, score " + std::to_string(static_cast<int>(c.score)) + " gate " + std::to_string(static_cast<int>(c.gate));
}

/// Both head sizes of the attention and others, whole tiles of heads and not, rows that fill a block and not, more rows than the blocks take at once
/// (8,448 forward, 2,112 backward); every number of sinks.
std::vector<Case> cases() {
  std::vector<Case> list;
  const std::int64_t shapes[][5] = {{1, 1, 1, 64, 1},    {2, 3, 37, 64, 4},   {3, 12, 101, 64, 2}, {1, 5, 3, 128, 3},
                                    {2, 2, 129, 128, 8}, {1, 1, 2500, 8, 5},  {2, 3, 19, 40, 6},   {1, 2, 7, 256, 7},
                                    {2, 33, 11, 8, 1},   {3, 3, 2900, 64, 3}, {2, 2, 1100, 40, 4}};
  for (const auto& s : shapes)
    for (const Score score : {Score::dot, Score::cosine, Score::fidelity})
      for (const Gate gate : {Gate::relu, Gate::relu2, Gate::relu4}) list.push_back({s[0], s[1], s[2], s[3], s[4], score, gate});
  return list;
}

/// The values of a case: q, o and d_o [B, T, H, D], z [B, H, T], sinks [H, S, D]. Exact outputs.
struct Problem {
  Case c;
  Doubles q, o, z, d_o, dq, keys, values, bias, scale, dkeys, dvalues, dbias, dscale;

  explicit Problem(const Case& which)
      : c(which),
        q(random_bf16(rows() * c.heads * c.size, 1)),
        o(random_bf16(rows() * c.heads * c.size, 2)),
        z(random_f32(rows() * c.heads, 3)),
        d_o(random_bf16(rows() * c.heads * c.size, 4)),
        dq(random_bf16(rows() * c.heads * c.size, 5)),
        keys(random_f32(sinks() * c.size, 6)),
        values(random_f32(sinks() * c.size, 7)),
        bias(random_f32(sinks(), 8, 0.3)),
        scale(random_f32(c.heads, 9, 0.3)),
        dkeys(random_f32(sinks() * c.size, 10)),
        dvalues(random_f32(sinks() * c.size, 11)),
        dbias(random_f32(sinks(), 12)),
        dscale(random_f32(c.heads, 13)) {
    for (double& x : scale) x = static_cast<float>(x + 2);
    for (double& x : z) x = static_cast<float>(0.05 + std::abs(x));
    const double shorter = 1.5 / std::sqrt(static_cast<double>(c.size));  // of about unit length, so that x is of the order of 1
    for (double& x : q) x = bf16(x * shorter);
    for (double& x : keys) x = static_cast<float>(x * shorter);
  }
  std::int64_t rows() const { return c.batch * c.tokens; }
  std::int64_t sinks() const { return c.heads * c.sinks; }

  /// Calls body(head, its place in q and o, its place in z) for each row.
  template <class Body>
  void for_each_query(Body&& body) const {
    for (std::int64_t b = 0; b < c.batch; ++b)
      for (std::int64_t t = 0; t < c.tokens; ++t)
        for (std::int64_t h = 0; h < c.heads; ++h) body(h, ((b * c.tokens + t) * c.heads + h) * c.size, (b * c.heads + h) * c.tokens + t);
  }
  double product(std::int64_t at, std::int64_t sink) const {
    double s = 0;
    for (std::int64_t d = 0; d < c.size; ++d) s += q[at + d] * keys[sink * c.size + d];
    return s;
  }
  double f(double s) const { return c.score == Score::fidelity ? s * s : s; }

  void forward(Doubles& to_o, Doubles& to_z) const {
    to_o = o, to_z = z;
    for_each_query([&](auto h, auto at, auto at_z) {
      for (std::int64_t d = 0; d < c.size; ++d) to_o[at + d] *= z[at_z];
      for (std::int64_t sink = h * c.sinks; sink < (h + 1) * c.sinks; ++sink) {
        const double x = scale[h] * f(product(at, sink)) + bias[sink], weight = x > 0 ? std::pow(x, gate_power(c.gate)) : 0;
        to_z[at_z] += weight;
        for (std::int64_t d = 0; d < c.size; ++d) to_o[at + d] += weight * values[sink * c.size + d];
      }
      for (std::int64_t d = 0; d < c.size; ++d) to_o[at + d] /= to_z[at_z];
    });
  }
  /// With o' and z' as the operation gets them.
  struct Gradients {
    Doubles dq, dkeys, dvalues, dbias, dscale;
  };
  Gradients backward(const Doubles& o_, const Doubles& z_) const {
    Gradients g{dq, dkeys, dvalues, dbias, dscale};
    for_each_query([&](auto h, auto at, auto at_z) {
      for (std::int64_t sink = h * c.sinks; sink < (h + 1) * c.sinks; ++sink) {
        const double s = product(at, sink), x = scale[h] * f(s) + bias[sink], p = gate_power(c.gate);
        if (!(x > 0)) continue;
        double along = 0;
        for (std::int64_t d = 0; d < c.size; ++d) along += d_o[at + d] * (values[sink * c.size + d] - o_[at + d]);
        const double dx = along / z_[at_z] * p * std::pow(x, p - 1), ds = scale[h] * dx * (c.score == Score::fidelity ? 2 * s : 1);
        for (std::int64_t d = 0; d < c.size; ++d) {
          g.dq[at + d] += ds * keys[sink * c.size + d];
          g.dkeys[sink * c.size + d] += ds * q[at + d];
          g.dvalues[sink * c.size + d] += std::pow(x, p) / z_[at_z] * d_o[at + d];
        }
        g.dbias[sink] += dx;
        g.dscale[h] += dx * f(s);
      }
    });
    return g;
  }
};

/// A call's memory.
struct Memory {
  const Case c;
  OnDevice q, o, d_o, dq, z, keys, values, bias, scale, dkeys, dvalues, dbias, dscale;

  explicit Memory(const Problem& p)
      : c(p.c),
        q(DType::bf16, rows(), p.q),
        o(DType::bf16, rows(), p.o),
        d_o(DType::bf16, rows(), p.d_o),
        dq(DType::bf16, rows(), p.dq),
        z(DType::f32, {c.batch, c.heads, c.tokens}, p.z),
        keys(DType::f32, {c.heads, c.sinks, c.size}, p.keys),
        values(DType::f32, {c.heads, c.sinks, c.size}, p.values),
        bias(DType::f32, {c.heads, c.sinks}, p.bias),
        scale(DType::f32, {c.heads}, p.scale),
        dkeys(DType::f32, {c.heads, c.sinks, c.size}, p.dkeys),
        dvalues(DType::f32, {c.heads, c.sinks, c.size}, p.dvalues),
        dbias(DType::f32, {c.heads, c.sinks}, p.dbias),
        dscale(DType::f32, {c.heads}, p.dscale) {}

  Shape rows() const { return {c.batch, c.tokens, c.heads, c.size}; }
  HeadsView heads(const Tensor& of, std::int64_t first_head) const {
    const std::int64_t width = c.heads * c.size;
    return {static_cast<Bf16*>(of.data) + first_head * c.size, DType::bf16, c.tokens * width, c.size, width};
  }
  /// Of heads [first, first + count), whose z is [B, count, T] from element B first T on.
  Sinks forward(std::int64_t first, std::int64_t count) const {
    const auto part = [&](const OnDevice& of, std::int64_t each) { return of.tensor().slice(first * each, count * each); };
    Sinks e;
    e.shape = {c.batch, count, c.tokens, c.size}, e.score = c.score, e.gate = c.gate;
    e.q = heads(q, first), e.o = heads(o, first), e.scale = part(scale, 1);
    e.keys = part(keys, c.sinks * c.size).view({count, c.sinks, c.size}), e.values = part(values, c.sinks * c.size).view({count, c.sinks, c.size});
    e.bias = part(bias, c.sinks).view({count, c.sinks});
    e.z = z.tensor().slice(c.batch * first * c.tokens, c.batch * count * c.tokens);
    return e;
  }
  Sinks forward() const { return forward(0, c.heads); }
  SinksBackward backward(std::int64_t first, std::int64_t count) const {
    const auto part = [&](const OnDevice& of, std::int64_t each) { return of.tensor().slice(first * each, count * each); };
    SinksBackward g;
    g.forward = forward(first, count), g.d_o = heads(d_o, first), g.dq = heads(dq, first);
    g.dkeys = part(dkeys, c.sinks * c.size), g.dvalues = part(dvalues, c.sinks * c.size), g.dbias = part(dbias, c.sinks), g.dscale = part(dscale, 1);
    return g;
  }
  SinksBackward backward() const { return backward(0, c.heads); }
};

TEST(CudaSinks, ForwardMatchesTheDefinition) {
  TESSERA_NEEDS_GPU();
  for (const Case& c : cases()) {
    SCOPED_TRACE(name_of(c));
    const Problem p(c);
    Memory m(p);
    const auto run = [&] {
      m.o.set(p.o), m.z.set(p.z);
      cuda::sinks_forward(context(), m.forward());
      return joined({&m.o, &m.z});
    };
    run();
    Doubles o, z;
    p.forward(o, z);
    expect_within_twice(m.o.doubles(), o, bf16(o), "o");
    expect_close(m.z.doubles(), z, 1e-5, "z");
    EXPECT_TRUE(m.q.doubles() == p.q) << "q was touched";
    expect_repeatable(run, name_of(c));
  }
}

TEST(CudaSinks, BackwardMatchesTheDefinition) {
  TESSERA_NEEDS_GPU();
  for (const Case& c : cases()) {
    SCOPED_TRACE(name_of(c));
    const Problem p(c);
    Doubles o, z;
    p.forward(o, z);
    o = bf16(o), z = f32(z);
    Memory m(p);
    m.o.set(o), m.z.set(z);
    const auto reset = [&] { m.dq.set(p.dq), m.dkeys.set(p.dkeys), m.dvalues.set(p.dvalues), m.dbias.set(p.dbias), m.dscale.set(p.dscale); };
    const auto run = [&] {
      reset();
      cuda::sinks_backward(context(), m.backward());
      return joined({&m.dq, &m.dkeys, &m.dvalues, &m.dbias, &m.dscale});
    };
    run();
    const auto exact = p.backward(o, z);
    expect_within_twice(m.dq.doubles(), exact.dq, bf16(exact.dq), "dq");
    expect_close(m.dkeys.doubles(), exact.dkeys, 1e-4, "dkeys");
    expect_close(m.dvalues.doubles(), exact.dvalues, 1e-4, "dvalues");
    expect_close(m.dbias.doubles(), exact.dbias, 1e-4, "dbias");
    expect_close(m.dscale.doubles(), exact.dscale, 1e-4, "dscale");
    EXPECT_TRUE(m.o.doubles() == o && m.z.doubles() == z) << "o or z was touched";
    expect_repeatable(run, name_of(c));

    // Without dscale the rest has the same bits.
    const auto with = joined({&m.dq, &m.dkeys, &m.dvalues, &m.dbias});
    reset();
    SinksBackward g = m.backward();
    g.dscale = {};
    cuda::sinks_backward(context(), g);
    EXPECT_TRUE(joined({&m.dq, &m.dkeys, &m.dvalues, &m.dbias}) == with);
    EXPECT_TRUE(m.dscale.doubles() == p.dscale);
  }
}

TEST(CudaSinks, ClosedChangeNoBit) {
  TESSERA_NEEDS_GPU();
  const Problem p({2, 3, 9, 64, 2, Score::cosine, Gate::relu2});
  Memory m(p);
  m.bias.set(Doubles(6, -100.0));
  cuda::sinks_forward(context(), m.forward());
  cuda::sinks_backward(context(), m.backward());
  EXPECT_TRUE(m.o.doubles() == p.o);
  EXPECT_TRUE(m.z.doubles() == p.z);
  EXPECT_TRUE(m.dq.doubles() == p.dq);
  EXPECT_TRUE(m.dkeys.doubles() == p.dkeys);
  EXPECT_TRUE(m.dvalues.doubles() == p.dvalues);
  EXPECT_TRUE(m.dbias.doubles() == p.dbias);
}

TEST(CudaSinks, SomeHeadsHaveTheBitsOfAll) {
  TESSERA_NEEDS_GPU();
  const Problem p({2, 5, 13, 64, 3, Score::cosine, Gate::relu2});
  const std::vector<std::pair<std::int64_t, std::int64_t>> stretches = {{0, 3}, {3, 2}};
  const auto stretched = [&](const Doubles& z) {  // [B, H, T] as [B, count, T] of one stretch after another
    Doubles to;
    for (const auto& [first, count] : stretches)
      for (std::int64_t b = 0; b < 2; ++b)
        for (std::int64_t n = 0; n < count * 13; ++n) to.push_back(z[(b * 5 + first) * 13 + n]);
    return to;
  };
  Memory all(p), some(p);
  some.z.set(stretched(p.z));
  cuda::sinks_forward(context(), all.forward());
  for (const auto& [first, count] : stretches) cuda::sinks_forward(context(), some.forward(first, count));
  EXPECT_TRUE(some.o.bytes() == all.o.bytes());
  EXPECT_TRUE(some.z.doubles() == stretched(all.z.doubles()));
  cuda::sinks_backward(context(), all.backward());
  for (const auto& [first, count] : stretches) cuda::sinks_backward(context(), some.backward(first, count));
  EXPECT_TRUE(joined({&some.dq, &some.dkeys, &some.dvalues, &some.dbias, &some.dscale}) ==
              joined({&all.dq, &all.dkeys, &all.dvalues, &all.dbias, &all.dscale}));
}

TEST(CudaSinks, SomeRowsHaveTheBitsOfAll) {
  TESSERA_NEEDS_GPU();
  const Problem p({1, 5, 13, 64, 3, Score::cosine, Gate::relu2});
  Memory all(p), rows(p);
  cuda::sinks_forward(context(), all.forward());
  // The last token alone, as generation has it, with z [B, H] of its own.
  Doubles z;
  for (int h = 0; h < 5; ++h) z.push_back(p.z[h * 13 + 12]);
  OnDevice last(DType::f32, {1, 5}, z);
  Sinks e = rows.forward();
  e.shape.tokens = 1;
  for (HeadsView* v : {&e.q, &e.o}) v->data = static_cast<Bf16*>(v->data) + 12 * v->token;
  e.z = last;
  cuda::sinks_forward(context(), e);
  const Doubles got = rows.o.doubles(), want = all.o.doubles(), want_z = all.z.doubles(), got_z = last.doubles();
  EXPECT_TRUE(std::equal(got.end() - 5 * 64, got.end(), want.end() - 5 * 64));
  for (int h = 0; h < 5; ++h) EXPECT_EQ(got_z[h], want_z[h * 13 + 12]);
}

TEST(CudaSinks, RefuseWrongArguments) {
  TESSERA_NEEDS_GPU();
  const Problem p({2, 3, 9, 64, 2, Score::cosine, Gate::relu2});
  Memory m(p);
  const auto refused = [&](auto&& change, const char* what) {
    SinksBackward g = m.backward();
    change(g.forward, g);
    EXPECT_THROW(cuda::sinks_backward(context(), g), std::logic_error) << what;
  };
  refused([](Sinks& e, auto&) { e.gate = Gate::softmax; }, "softmax");
  refused([](Sinks& e, auto&) { e.shape.head_size = 12; }, "a head size of 12");
  refused([](Sinks& e, auto&) { e.bias = {}; }, "no bias");
  refused([](Sinks& e, auto&) { e.keys = e.keys.slice(0, e.keys.numel()); }, "keys without a shape");
  refused([](Sinks& e, auto&) { e.keys = e.keys.view({3, 9, 8}); }, "nine sinks");
  refused([](Sinks& e, auto&) { e.values = e.values.slice(4, 380).view({3, 2, 60}); }, "values of another size");
  refused([](Sinks& e, auto&) { e.keys.data = static_cast<float*>(e.keys.data) + 1; }, "keys on no boundary of 16 bytes");
  refused([](Sinks& e, auto&) { e.z = e.z.slice(0, 5); }, "z of another size");
  refused([](auto&, SinksBackward& g) { g.dq.dtype = DType::f32; }, "dq in f32");
  refused([](auto&, SinksBackward& g) { g.dvalues = {}; }, "no dvalues");
  refused([](auto&, SinksBackward& g) { g.dbias = {}; }, "no dbias");
}

}  // namespace
}  // namespace tessera
