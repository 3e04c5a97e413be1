// Unit length and rotary positions on the GPU against their definition in double precision (the judge: ops_cuda.h).

#include <memory>
#include <vector>

#include "ops_cuda.h"

namespace tessera {
namespace {

using namespace cuda_test;

struct Case {
  std::int64_t rows, heads, size;
  bool unit, rotary;
};

std::string name_of(const Case& c) {
  return std::string(c.unit ? "unit " : "") + (c.rotary ? "rotary " : "") + "[" + std::to_string(c.rows) + ",3," + std::to_string(c.heads) + "," +
         std::to_string(c.size) + "]";
}

/// Both piece sizes, full groups of lanes and not, one pass over a row's vectors and several.
std::vector<Case> cases() {
  std::vector<Case> list;
  const std::int64_t shapes[][3] = {{1, 1, 8},   {3, 16, 64},  {1000, 12, 64}, {3, 1, 64},   {1000, 3, 128}, {100, 16, 128}, {100, 5, 16},
                                    {37, 7, 24}, {100, 2, 40}, {100, 3, 96},   {3, 11, 104}, {37, 2, 248},   {37, 5, 256},   {5, 70, 32}};
  for (const auto& s : shapes) {
    for (const int which : {1, 2, 3}) list.push_back({s[0], s[1], s[2], (which & 1) != 0, (which & 2) != 0});
  }
  return list;
}

constexpr std::int64_t kPositions = 1500;
constexpr double kSmallestLength = 1e-6;

Doubles rotary_table(std::int64_t size) {
  Doubles table(kPositions * size);
  for (std::int64_t p = 0; p < kPositions; ++p) {
    for (std::int64_t i = 0; i < size / 2; ++i) {
      const double angle = p * std::pow(10000.0, -2.0 * i / size);
      table[p * size + 2 * i] = std::cos(angle), table[p * size + 2 * i + 1] = std::sin(angle);
    }
  }
  return f32(table);
}

/// Values of [N, 3, H, D] for one case.
struct Problem {
  Case c;
  Doubles qkv, gradients, table, positions;

  explicit Problem(const Case& c_)
      : c(c_),
        qkv(random_bf16(c.rows * 3 * c.heads * c.size, 1, 2)),
        gradients(random_bf16(c.rows * 3 * c.heads * c.size, 2)),
        table(rotary_table(c.size)),
        positions(random_i32(c.rows, 0, kPositions - 1, 3)) {
    // Of the vectors, one in seven is zero and one in seven too short to have a direction.
    for (std::int64_t i = 0; i < c.rows * 3 * c.heads; ++i) {
      const double scale = i % 7 == 5 ? 0.0 : i % 7 == 6 ? 1e-9 : 1.0;
      for (std::int64_t d = 0; d < c.size; ++d) qkv[i * c.size + d] = bf16(qkv[i * c.size + d] * scale);
    }
  }

  /// Calls body(vector in [N, 2, H], its first element in qkv, its row) for queries and keys.
  template <class Body>
  void for_each_vector(Body&& body) const {
    for (std::int64_t n = 0; n < c.rows; ++n) {
      for (std::int64_t i = 0; i < 2 * c.heads; ++i) body(n * 2 * c.heads + i, (n * 3 * c.heads + i) * c.size, n);
    }
  }
  void rotate(double* x, std::int64_t row, double sign) const {
    if (!c.rotary) return;
    const double* angles = table.data() + static_cast<std::int64_t>(positions[row]) * c.size;
    for (std::int64_t i = 0; i < c.size / 2; ++i) {
      const double cosine = angles[2 * i], sine = sign * angles[2 * i + 1], a = x[i], b = x[i + c.size / 2];
      x[i] = a * cosine - b * sine, x[i + c.size / 2] = b * cosine + a * sine;
    }
  }
  /// The transformed [N, 3, H, D], and 1/|q| of every vector.
  std::pair<Doubles, Doubles> forward() const {
    Doubles out = qkv, inverse(c.rows * 2 * c.heads);
    for_each_vector([&](std::int64_t vector, std::int64_t at, std::int64_t row) {
      double square = 0;
      for (std::int64_t d = 0; d < c.size; ++d) square += qkv[at + d] * qkv[at + d];
      inverse[vector] = std::sqrt(square) < kSmallestLength ? 0 : 1 / std::sqrt(square);
      for (std::int64_t d = 0; d < c.size && c.unit; ++d) out[at + d] *= inverse[vector];
      rotate(out.data() + at, row, 1);
    });
    return {out, inverse};
  }
  /// Of `transformed` as the operation gets it.
  Doubles backward(const Doubles& transformed, const Doubles& inverse) const {
    Doubles out = gradients;
    for_each_vector([&](std::int64_t vector, std::int64_t at, std::int64_t row) {
      double along = 0;
      for (std::int64_t d = 0; d < c.size; ++d) along += transformed[at + d] * gradients[at + d];
      for (std::int64_t d = 0; d < c.size && c.unit; ++d) out[at + d] = (gradients[at + d] - transformed[at + d] * along) * inverse[vector];
      rotate(out.data() + at, row, -1);
    });
    return out;
  }
  Doubles values(const Doubles& packed) const {
    Doubles v;
    for (std::int64_t n = 0; n < c.rows; ++n) {
      const auto first = packed.begin() + (n * 3 + 2) * c.heads * c.size;
      v.insert(v.end(), first, first + c.heads * c.size);
    }
    return v;
  }
};

/// A call's memory.
struct Memory {
  OnDevice qkv, gradients, inverse, table, positions;
  QkTransform t;

  explicit Memory(const Problem& p)
      : qkv(DType::bf16, {p.c.rows, 3 * p.c.heads * p.c.size}),
        gradients(DType::bf16, {p.c.rows, 3 * p.c.heads * p.c.size}),
        inverse(DType::f32, {p.c.rows, 2, p.c.heads}),
        table(DType::f32, {kPositions, p.c.size / 2, 2}, p.table),
        positions(DType::i32, {p.c.rows}, p.positions) {
    t.qkv = qkv, t.heads = p.c.heads, t.unit = p.c.unit;
    if (p.c.unit) t.inverse_norm = inverse;
    if (p.c.rotary) t.rotary = table, t.positions = positions;
  }
};

TEST(CudaQkTransform, ForwardMatchesTheDefinition) {
  TESSERA_NEEDS_GPU();
  for (const Case& c : cases()) {
    SCOPED_TRACE(name_of(c));
    const Problem p(c);
    Memory m(p);
    const auto run = [&] {
      m.qkv.set(p.qkv), m.inverse.poison();
      cuda::qk_transform_forward(context(), m.t);
      return m.qkv.bytes();
    };
    run();
    const auto [exact, inverse] = p.forward();
    const Doubles got = m.qkv.doubles();
    expect_within_twice(got, exact, bf16(exact), "q, k");
    EXPECT_TRUE(p.values(got) == p.values(p.qkv)) << "V was touched";
    if (c.unit) {
      const Doubles got_inverse = m.inverse.doubles();
      for (std::size_t i = 0; i < inverse.size(); ++i) {
        ASSERT_LE(std::abs(got_inverse[i] - inverse[i]), 1e-6 * inverse[i])
            << "inverse_norm[" << i << "] " << got_inverse[i] << " for " << inverse[i];
      }
      p.for_each_vector([&](std::int64_t vector, std::int64_t at, std::int64_t) {
        for (std::int64_t d = 0; d < c.size && inverse[vector] == 0; ++d) ASSERT_EQ(got[at + d], 0.0) << "a vector without direction becomes zero";
      });
    }
    expect_repeatable(run, name_of(c));
  }
}

TEST(CudaQkTransform, BackwardMatchesTheDefinition) {
  TESSERA_NEEDS_GPU();
  for (const Case& c : cases()) {
    SCOPED_TRACE(name_of(c));
    const Problem p(c);
    auto [transformed, inverse] = p.forward();
    transformed = bf16(transformed), inverse = f32(inverse);
    Memory m(p);
    m.qkv.set(transformed);
    if (c.unit) m.inverse.set(inverse);
    const auto run = [&] {
      m.gradients.set(p.gradients);
      cuda::qk_transform_backward(context(), m.t, m.gradients);
      return m.gradients.bytes();
    };
    run();
    const Doubles exact = p.backward(transformed, inverse), got = m.gradients.doubles();
    expect_within_twice(got, exact, bf16(exact), "gradients of q, k");
    EXPECT_TRUE(p.values(got) == p.values(p.gradients)) << "V's gradient was touched";
    EXPECT_TRUE(m.qkv.doubles() == transformed) << "the transformed projection was touched";
    expect_repeatable(run, name_of(c));
  }
}

TEST(CudaQkTransform, GradientIsThatOfTheForward) {
  // <dq', q'(q + h u) - q'(q - h u)> / 2h = <dq, u> for a direction u: all in double but the gradient itself.
  TESSERA_NEEDS_GPU();
  const Case c{3, 2, 64, true, true};
  Problem p(c);
  auto [transformed, inverse] = p.forward();
  Memory m(p);
  m.qkv.set(bf16(transformed)), m.inverse.set(f32(inverse)), m.gradients.set(p.gradients);
  cuda::qk_transform_backward(context(), m.t, m.gradients);
  const Doubles got = m.gradients.doubles(), original = p.qkv, direction = random_f32(static_cast<std::int64_t>(original.size()), 9);
  constexpr double kStep = 1e-5;
  const auto moved = [&](double step) {
    for (std::size_t i = 0; i < original.size(); ++i) p.qkv[i] = original[i] + step * direction[i];
    return p.forward().first;
  };
  const Doubles above = moved(kStep), below = moved(-kStep);
  p.for_each_vector([&](std::int64_t vector, std::int64_t at, std::int64_t) {
    if (inverse[vector] == 0) return;
    double numeric = 0, analytic = 0, size = 0;
    for (std::int64_t d = 0; d < c.size; ++d) {
      numeric += p.gradients[at + d] * (above[at + d] - below[at + d]) / (2 * kStep);
      analytic += got[at + d] * direction[at + d];
      size += std::abs(got[at + d] * direction[at + d]);
    }
    EXPECT_NEAR(numeric, analytic, size / 100) << "vector " << vector;  // q', inputs and gradients are bf16: 1/256 each
  });
}

TEST(CudaQkTransform, RowsBeyond32BitElements) {
  TESSERA_NEEDS_GPU();
  constexpr std::int64_t kHeadsHere = 16, kSize = 128, kRow = 3 * kHeadsHere * kSize, kRows = (std::int64_t{1} << 31) / kRow + 3;
  std::size_t free = 0, total = 0;
  TESSERA_CUDA_CHECK(cudaMemGetInfo(&free, &total));
  if (free < (std::size_t{6} << 30)) GTEST_SKIP() << "needs 6 GiB of GPU memory";
  const Problem p({1, kHeadsHere, kSize, true, false});
  std::vector<Bf16> last(kRow);
  for (std::int64_t i = 0; i < kRow; ++i) last[i] = __float2bfloat16_rn(static_cast<float>(p.qkv[i]));
  Device<Bf16> qkv(kRows * kRow);
  OnDevice inverse(DType::f32, {kRows, 2, kHeadsHere});
  TESSERA_CUDA_CHECK(cudaMemcpy(qkv.get() + (kRows - 1) * kRow, last.data(), kRow * sizeof(Bf16), cudaMemcpyHostToDevice));
  TESSERA_CUDA_CHECK(cudaDeviceSynchronize());
  QkTransform t;
  t.qkv = {qkv.get(), DType::bf16, {kRows, kRow}}, t.heads = kHeadsHere, t.unit = true, t.inverse_norm = inverse;
  cuda::qk_transform_forward(context(), t);
  TESSERA_CUDA_CHECK(cudaDeviceSynchronize());
  TESSERA_CUDA_CHECK(cudaMemcpy(last.data(), qkv.get() + (kRows - 1) * kRow, kRow * sizeof(Bf16), cudaMemcpyDeviceToHost));
  const Doubles exact = p.forward().first;
  expect_within_twice(Doubles(last.begin(), last.end()), exact, bf16(exact), "the last row");
}

TEST(CudaQkTransform, RefusesWrongArguments) {
  TESSERA_NEEDS_GPU();
  const Problem p({3, 2, 64, true, true});
  Memory m(p);
  m.qkv.set(p.qkv);
  QkTransform t = m.t;
  t.heads = 5;
  EXPECT_THROW(cuda::qk_transform_forward(context(), t), std::logic_error) << "heads that do not divide the width";
  t = m.t, t.heads = 16;
  EXPECT_THROW(cuda::qk_transform_forward(context(), t), std::logic_error) << "inverse_norm of another shape";
  t = m.t, t.positions = {};
  EXPECT_THROW(cuda::qk_transform_forward(context(), t), std::logic_error) << "rotary without positions";
  EXPECT_THROW(cuda::qk_transform_backward(context(), m.t, m.inverse), std::logic_error) << "gradients of another type";
}

}  // namespace
}  // namespace tessera
