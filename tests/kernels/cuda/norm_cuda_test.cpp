// The CUDA norms against their definition in double precision (the judge: ops_cuda.h).

#include <functional>
#include <memory>
#include <vector>

#include "ops_cuda.h"

namespace tessera {
namespace {

using namespace cuda_test;

constexpr double kStatistics = 1e-5;  // of f32 sums over at most a few thousand values

struct Case {
  NormKind kind;
  std::int64_t rows, columns;
  bool residual, bias;
};

std::string name_of(const Case& c) {
  return std::string(c.kind == NormKind::layernorm ? "layernorm" : "rmsnorm") + (c.bias ? " with bias" : "") + (c.residual ? " and residual" : "") +
         " [" + std::to_string(c.rows) + "," + std::to_string(c.columns) + "]";
}

/// Each kind of team: one warp with 1 to 4 pieces a lane, full or not; several warps, several teams a block or one; the widest rows.
std::vector<Case> cases() {
  std::vector<Case> list;
  const std::int64_t widths[] = {8, 24, 264, 768, 1000, 1024, 1600, 2048, 2304, 4096, 6144, 6152, 8192, 8200, 12288};
  int n = 0;
  for (const std::int64_t columns : widths) {
    for (const std::int64_t rows : {1, 3, 1000}) {
      if (rows * columns > 2'100'000) continue;
      ++n;
      list.push_back({NormKind::layernorm, rows, columns, n % 2 == 0, true});
      list.push_back({NormKind::rmsnorm, rows, columns, n % 2 == 1, false});
    }
  }
  list.push_back({NormKind::layernorm, 3, 65536, true, true});
  list.push_back({NormKind::layernorm, 3500, 640, true, false});  // more rows than teams: two or three each
  list.push_back({NormKind::layernorm, 4001, 64, false, true});
  list.push_back({NormKind::rmsnorm, 5003, 200, true, false});
  list.push_back({NormKind::layernorm, 1700, 1288, true, true});
  list.push_back({NormKind::rmsnorm, 600, 4096, true, false});
  list.push_back({NormKind::layernorm, 300, 8200, false, true});
  return list;
}

struct Reference {
  Doubles y, mean, rstd;
};

Reference normalize(const Doubles& x, const Doubles& gain, const Doubles& bias, NormKind kind, double epsilon) {
  const std::size_t columns = gain.size(), rows = x.size() / columns;
  Reference r{Doubles(x.size()), Doubles(rows), Doubles(rows)};
  for (std::size_t n = 0; n < rows; ++n) {
    const double* row = x.data() + n * columns;
    double sum = 0, squares = 0;
    for (std::size_t i = 0; i < columns; ++i) sum += row[i];
    r.mean[n] = kind == NormKind::layernorm ? sum / columns : 0;
    for (std::size_t i = 0; i < columns; ++i) squares += (row[i] - r.mean[n]) * (row[i] - r.mean[n]);
    r.rstd[n] = 1 / std::sqrt(squares / columns + epsilon);
    for (std::size_t i = 0; i < columns; ++i) {
      r.y[n * columns + i] = (row[i] - r.mean[n]) * r.rstd[n] * gain[i] + (bias.empty() ? 0 : bias[i]);
    }
  }
  return r;
}

Doubles sum_of(Doubles a, const Doubles& b) {
  for (std::size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  return a;
}

/// Inputs with a mean that is far from zero in every other row.
Doubles stream(const Case& c, unsigned seed) {
  Doubles x = random_bf16(c.rows * c.columns, seed, 2);
  for (std::int64_t n = 0; n < c.rows; n += 2) {
    for (std::int64_t i = 0; i < c.columns; ++i) x[n * c.columns + i] = bf16(x[n * c.columns + i] + 3);
  }
  return x;
}

/// A forward call and its memory.
struct Forward {
  OnDevice x, residual, residual_out, gain, bias, y, mean, rstd;
  NormForward f;

  Forward(const Case& c, const Doubles& x_, const Doubles& residual_, const Doubles& gain_, const Doubles& bias_)
      : x(DType::bf16, {c.rows, c.columns}, x_),
        residual(DType::bf16, {c.rows, c.columns}, residual_),
        residual_out(DType::bf16, {c.rows, c.columns}),
        gain(DType::f32, {c.columns}, gain_),
        bias(DType::f32, {c.columns}, bias_),
        y(DType::bf16, {c.rows, c.columns}),
        mean(DType::f32, {c.rows}),
        rstd(DType::f32, {c.rows}) {
    f.kind = c.kind, f.x = x, f.gain = gain, f.y = y, f.rstd = rstd;
    if (c.kind == NormKind::layernorm) f.mean = mean;
    if (c.residual) f.residual = residual, f.residual_out = residual_out;
    if (c.bias) f.bias = bias;
  }
  void run() { cuda::norm_forward(context(), f); }
};

TEST(CudaNorm, ForwardMatchesTheDefinition) {
  TESSERA_NEEDS_GPU();
  for (const Case& c : cases()) {
    SCOPED_TRACE(name_of(c));
    const Doubles x = stream(c, 1), residual = random_bf16(c.rows * c.columns, 2), gain = random_f32(c.columns, 3), bias = random_f32(c.columns, 4);
    const Doubles used_bias = c.bias ? bias : Doubles{};
    Forward op(c, x, residual, gain, bias);
    op.run();

    const Doubles total = c.residual ? sum_of(x, residual) : x, rounded_total = bf16(total);
    const Reference exact = normalize(total, gain, used_bias, c.kind, op.f.epsilon);
    const Reference rounded = normalize(rounded_total, gain, used_bias, c.kind, op.f.epsilon);
    if (c.residual) {
      EXPECT_TRUE(op.residual_out.doubles() == rounded_total) << "residual_out is the sum, rounded once";
    }
    expect_within_twice(op.y.doubles(), exact.y, bf16(rounded.y), "y");
    expect_close(op.rstd.doubles(), rounded.rstd, kStatistics, "rstd");
    if (c.kind == NormKind::layernorm) expect_close(op.mean.doubles(), rounded.mean, kStatistics, "mean");
  }
}

TEST(CudaNorm, ForwardOfTheStoredSumGivesTheSameBits) {  // what the model's recomputation relies on
  TESSERA_NEEDS_GPU();
  for (const NormKind kind : {NormKind::layernorm, NormKind::rmsnorm}) {
    for (const std::int64_t columns : {8, 768, 1024, 1288, 4096, 8192, 8200}) {
      const Case c{kind, 37, columns, true, kind == NormKind::layernorm};
      SCOPED_TRACE(name_of(c));
      const Doubles x = stream(c, 5), residual = random_bf16(c.rows * columns, 6), gain = random_f32(columns, 7), bias = random_f32(columns, 8);
      Forward first(c, x, residual, gain, bias);
      first.run();
      Case again = c;
      again.residual = false;
      Forward second(again, first.residual_out.doubles(), residual, gain, bias);
      second.run();
      EXPECT_TRUE(joined({&first.y, &first.mean, &first.rstd}) == joined({&second.y, &second.mean, &second.rstd}));

      Forward in_place(c, x, residual, gain, bias);
      in_place.f.residual_out = in_place.residual;
      in_place.run();
      EXPECT_TRUE(joined({&first.residual_out, &first.y}) == joined({&in_place.residual, &in_place.y})) << "residual_out in residual's memory";
    }
  }
}

TEST(CudaNorm, ForwardRepeats) {
  TESSERA_NEEDS_GPU();
  for (const std::int64_t columns : {1024, 1600, 8200}) {
    const Case c{NormKind::layernorm, 100, columns, true, true};
    Forward op(c, stream(c, 1), random_bf16(c.rows * columns, 2), random_f32(columns, 3), random_f32(columns, 4));
    expect_repeatable(
        [&] {
          op.y.poison(), op.residual_out.poison(), op.mean.poison(), op.rstd.poison();
          op.run();
          return joined({&op.y, &op.residual_out, &op.mean, &op.rstd});
        },
        name_of(c));
  }
}

struct BackwardReference {
  Doubles dx, dgain, dbias;
};

BackwardReference backward(const Doubles& dy, const Doubles& x, const Doubles& gain, const Doubles& mean, const Doubles& rstd, bool centred,
                           BackwardReference before) {
  const std::size_t columns = gain.size(), rows = x.size() / columns;
  for (std::size_t n = 0; n < rows; ++n) {
    double g_mean = 0, gx_mean = 0;
    for (std::size_t i = 0; i < columns; ++i) {
      const double g = dy[n * columns + i] * gain[i], xh = (x[n * columns + i] - mean[n]) * rstd[n];
      g_mean += g / columns, gx_mean += g * xh / columns;
      before.dgain[i] += dy[n * columns + i] * xh;
      if (!before.dbias.empty()) before.dbias[i] += dy[n * columns + i];
    }
    for (std::size_t i = 0; i < columns; ++i) {
      const double g = dy[n * columns + i] * gain[i], xh = (x[n * columns + i] - mean[n]) * rstd[n];
      before.dx[n * columns + i] += rstd[n] * (g - (centred ? g_mean : 0) - xh * gx_mean);
    }
  }
  return before;
}

/// A backward call, its memory and the values from before, which it adds to.
struct Backward {
  Case c;
  Doubles dy, x, gain;
  Reference statistics;
  BackwardReference before;
  OnDevice d_dy, d_x, d_gain, d_mean, d_rstd, dx, dgain, dbias, scratch;
  NormBackward b;

  explicit Backward(const Case& c_)
      : c(c_),
        dy(random_bf16(c.rows * c.columns, 11)),
        x(stream(c, 12)),
        gain(random_f32(c.columns, 13)),
        statistics(normalize(x, gain, {}, c.kind, 1e-5)),
        before{random_bf16(c.rows * c.columns, 14), random_f32(c.columns, 15), c.bias ? random_f32(c.columns, 16) : Doubles{}},
        d_dy(DType::bf16, {c.rows, c.columns}, dy),
        d_x(DType::bf16, {c.rows, c.columns}, x),
        d_gain(DType::f32, {c.columns}, gain),
        d_mean(DType::f32, {c.rows}, f32(statistics.mean)),
        d_rstd(DType::f32, {c.rows}, f32(statistics.rstd)),
        dx(DType::bf16, {c.rows, c.columns}),
        dgain(DType::f32, {c.columns}),
        dbias(DType::f32, {c.columns}),
        scratch(DType::f32, {static_cast<std::int64_t>(cuda::norm_backward_scratch(c.columns) / sizeof(float))}) {
    b.kind = c.kind, b.dy = d_dy, b.x = d_x, b.gain = d_gain, b.rstd = d_rstd, b.dx = dx, b.dgain = dgain;
    if (c.kind == NormKind::layernorm) b.mean = d_mean;
    if (c.bias) b.dbias = dbias;
  }
  void run() {
    dx.set(before.dx), dgain.set(before.dgain);
    if (c.bias) dbias.set(before.dbias);
    cuda::Context mine = context();
    mine.scratch = scratch.tensor().data, mine.scratch_bytes = scratch.tensor().bytes();
    cuda::norm_backward(mine, b);
  }
};

TEST(CudaNorm, BackwardMatchesTheDefinition) {
  TESSERA_NEEDS_GPU();
  for (const Case& c : cases()) {
    SCOPED_TRACE(name_of(c));
    Backward op(c);
    op.run();
    const BackwardReference exact =
        backward(op.dy, op.x, op.gain, f32(op.statistics.mean), f32(op.statistics.rstd), c.kind == NormKind::layernorm, op.before);
    expect_within_twice(op.dx.doubles(), exact.dx, bf16(exact.dx), "dx");
    expect_close(op.dgain.doubles(), exact.dgain, kStatistics, "dgain");
    if (c.bias) expect_close(op.dbias.doubles(), exact.dbias, kStatistics, "dbias");
    op.scratch.bytes();  // checks that nothing behind it was written
  }
}

TEST(CudaNorm, BackwardRepeats) {
  TESSERA_NEEDS_GPU();
  for (const Case& c : {Case{NormKind::layernorm, 1700, 768, false, true}, Case{NormKind::layernorm, 700, 1600, false, true},
                        Case{NormKind::rmsnorm, 300, 8192, false, false}, Case{NormKind::layernorm, 300, 8200, false, true}}) {
    Backward op(c);
    expect_repeatable(
        [&] {
          op.run();
          return joined({&op.dx, &op.dgain, &op.dbias});
        },
        name_of(c));
  }
}

TEST(CudaNorm, RowsBeyond32BitElements) {
  TESSERA_NEEDS_GPU();
  constexpr std::int64_t kColumns = 8192, kRows = (std::int64_t{1} << 31) / kColumns + 2;
  std::size_t free = 0, total = 0;
  TESSERA_CUDA_CHECK(cudaMemGetInfo(&free, &total));
  if (free < (std::size_t{10} << 30)) GTEST_SKIP() << "needs 10 GiB of GPU memory";
  const Doubles row = random_bf16(kColumns, 21), gain = random_f32(kColumns, 22);
  std::vector<Bf16> last(kColumns);
  for (std::int64_t i = 0; i < kColumns; ++i) last[i] = __float2bfloat16_rn(static_cast<float>(row[i]));
  Device<Bf16> x(kRows * kColumns), y(kRows * kColumns);
  OnDevice d_gain(DType::f32, {kColumns}, gain), rstd(DType::f32, {kRows});
  TESSERA_CUDA_CHECK(cudaMemcpy(x.get() + (kRows - 1) * kColumns, last.data(), kColumns * sizeof(Bf16), cudaMemcpyHostToDevice));
  TESSERA_CUDA_CHECK(cudaDeviceSynchronize());
  NormForward f;
  f.x = {x.get(), DType::bf16, {kRows, kColumns}}, f.y = {y.get(), DType::bf16, {kRows, kColumns}}, f.gain = d_gain, f.rstd = rstd;
  cuda::norm_forward(context(), f);
  TESSERA_CUDA_CHECK(cudaDeviceSynchronize());
  TESSERA_CUDA_CHECK(cudaMemcpy(last.data(), y.get() + (kRows - 1) * kColumns, kColumns * sizeof(Bf16), cudaMemcpyDeviceToHost));
  const Doubles exact = normalize(row, gain, {}, NormKind::rmsnorm, f.epsilon).y;
  expect_within_twice(Doubles(last.begin(), last.end()), exact, bf16(exact), "the last row");
}

TEST(CudaNorm, RefusesWrongArguments) {
  TESSERA_NEEDS_GPU();
  const Case c{NormKind::rmsnorm, 3, 12, false, false};
  EXPECT_THROW(Forward(c, Doubles(36), Doubles(36), Doubles(12), Doubles(12)).run(), std::logic_error) << "width 12 is no multiple of 8";
  const Case good{NormKind::rmsnorm, 3, 16, false, false};
  Forward op(good, Doubles(48), Doubles(48), Doubles(16), Doubles(16));
  op.f.y = op.rstd;
  EXPECT_THROW(op.run(), std::logic_error) << "y of another type and shape";
  Forward biased(good, Doubles(48), Doubles(48), Doubles(16), Doubles(16));
  biased.f.bias = biased.bias;
  EXPECT_THROW(biased.run(), std::logic_error) << "rmsnorm has no bias";
  Backward back(good);
  cuda::Context poor = context();
  poor.scratch_bytes = cuda::norm_backward_scratch(16) - 1;
  EXPECT_THROW(cuda::norm_backward(poor, back.b), std::logic_error) << "too little scratch";
}

// -- each head its own norm -------------------------------------------------------------------------------------------

struct Heads {
  std::int64_t rows, heads, size;
};
std::string name_of(const Heads& c) {
  return "heads [" + std::to_string(c.rows) + "," + std::to_string(c.heads) + "," + std::to_string(c.size) + "]";
}
const Heads kHeads[] = {{1, 1, 8},    {3, 1, 64},    {1000, 12, 64}, {3, 16, 64},   {2200, 17, 64}, {1000, 5, 128}, {3, 9, 128},
                        {1000, 3, 8}, {100, 70, 16}, {100, 7, 24},   {1000, 2, 96}, {100, 11, 104}, {3, 3, 200},    {300, 5, 256}};

/// The forward pass of every head, with the gain of its place.
Reference normalize_heads(const Doubles& x, const Doubles& gain, const Heads& c, double epsilon) {
  Reference all{Doubles(x.size()), {}, Doubles(c.rows * c.heads)};
  for (std::int64_t i = 0; i < c.rows * c.heads; ++i) {
    const auto part = x.begin() + i * c.size, head = gain.begin() + i % c.heads * c.size;
    const Reference one = normalize({part, part + c.size}, {head, head + c.size}, {}, NormKind::rmsnorm, epsilon);
    std::copy(one.y.begin(), one.y.end(), all.y.begin() + i * c.size);
    all.rstd[i] = one.rstd[0];
  }
  return all;
}

TEST(CudaHeadNorm, ForwardMatchesTheDefinition) {
  TESSERA_NEEDS_GPU();
  for (const Heads& c : kHeads) {
    SCOPED_TRACE(name_of(c));
    const Doubles x = random_bf16(c.rows * c.heads * c.size, 31), gain = random_f32(c.heads * c.size, 32);
    OnDevice d_x(DType::bf16, {c.rows, c.heads, c.size}, x), d_gain(DType::f32, {c.heads, c.size}, gain);
    OnDevice y(DType::bf16, {c.rows, c.heads, c.size}), rstd(DType::f32, {c.rows, c.heads});
    const HeadNorm f{.x = d_x, .gain = d_gain, .y = y, .rstd = rstd};
    cuda::head_norm_forward(context(), f);
    const Reference exact = normalize_heads(x, gain, c, f.epsilon);
    expect_within_twice(y.doubles(), exact.y, bf16(exact.y), "y");
    expect_close(rstd.doubles(), exact.rstd, kStatistics, "rstd");
    expect_repeatable(
        [&] {
          y.poison(), rstd.poison();
          cuda::head_norm_forward(context(), f);
          return joined({&y, &rstd});
        },
        name_of(c));
  }
}

TEST(CudaHeadNorm, BackwardMatchesTheDefinition) {
  TESSERA_NEEDS_GPU();
  for (const Heads& c : kHeads) {
    SCOPED_TRACE(name_of(c));
    const Doubles dy = random_bf16(c.rows * c.heads * c.size, 41), x = random_bf16(c.rows * c.heads * c.size, 42),
                  gain = random_f32(c.heads * c.size, 43), dgain_before = random_f32(c.heads * c.size, 44),
                  rstd = f32(normalize_heads(x, gain, c, 1e-5).rstd);
    const Shape shape{c.rows, c.heads, c.size};
    OnDevice d_dy(DType::bf16, shape, dy), d_x(DType::bf16, shape, x), d_gain(DType::f32, {c.heads, c.size}, gain),
        d_rstd(DType::f32, {c.rows, c.heads}, rstd), dx(DType::bf16, shape), dgain(DType::f32, {c.heads, c.size});
    const HeadNormBackward b{.dy = d_dy, .x = d_x, .gain = d_gain, .rstd = d_rstd, .dx = dx, .dgain = dgain};
    const auto run = [&] {
      dx.poison(), dgain.set(dgain_before);
      cuda::head_norm_backward(context(), b);
      return joined({&dx, &dgain});
    };
    run();

    Doubles exact_dx(x.size()), exact_dgain = dgain_before;
    for (std::int64_t i = 0; i < c.rows * c.heads; ++i) {
      const auto part = [&](const Doubles& v) { return Doubles(v.begin() + i * c.size, v.begin() + (i + 1) * c.size); };
      const std::int64_t head = i % c.heads * c.size;
      const BackwardReference one = backward(part(dy), part(x), {gain.begin() + head, gain.begin() + head + c.size}, {0}, {rstd[i]}, false,
                                             {Doubles(c.size, 0.0), Doubles(c.size, 0.0), {}});
      std::copy(one.dx.begin(), one.dx.end(), exact_dx.begin() + i * c.size);
      for (std::int64_t d = 0; d < c.size; ++d) exact_dgain[head + d] += one.dgain[d];
    }
    expect_within_twice(dx.doubles(), exact_dx, bf16(exact_dx), "dx");
    expect_close(dgain.doubles(), exact_dgain, kStatistics, "dgain");
    expect_repeatable(run, name_of(c));
  }
}

}  // namespace
}  // namespace tessera
