// The CUDA attention over keys that come in parts (AttentionForward::carry), against one call over all of them. In ascending order of the keys the
// forward pass has the same bits: sums go on from registers that were put away.

#include <numeric>

#include "attention_problem.h"

namespace tessera {
namespace {

using namespace cuda_test;

struct Results {
  std::vector<Bf16> o;
  std::vector<float> z, dq, dscale, dtau;
  std::vector<float> dk, dv;          // [B, H, T, D]
  std::vector<std::uint32_t> bitmap;  // [B, H, query_tiles, key_tiles], a word a tile
  std::vector<std::uint64_t> counters;
};

std::vector<float> floats(const std::vector<Bf16>& v) {
  std::vector<float> f(v.size());
  std::transform(v.begin(), v.end(), f.begin(), [](Bf16 x) { return __bfloat162float(x); });
  return f;
}

/// The calls of one problem. Gradients of queries are added up over the parts, each part's as it comes, in bf16.
class Calls {
 public:
  Calls(const Problem& p, CudaAttentionPath path, Visit visit)
      : p_(p),
        path_(path),
        visit_(visit),
        tiles_((p.in.shape.tokens + 63) / 64),
        q_(rounded(p.in.q)),
        d_o_(rounded(p.d_o)),
        o_(q_.size()),
        scale_(std::vector<float>(p.in.scale.begin(), p.in.scale.end())),
        tau_(std::vector<float>(p.in.tau.begin(), p.in.tau.end())),
        balance_(std::vector<float>(p.in.balance.begin(), p.in.balance.end())),
        z_(p.in.shape.batch * p.in.shape.heads * p.in.shape.tokens),
        carry_(z_.size() * (p.in.shape.head_size + kCarryExtra)),
        dscale_(std::vector<float>(p.in.shape.heads, 0.f)),
        dtau_(std::vector<float>(p.in.shape.heads, 0.f)),
        work_(attention_backward_workspace(p.in.shape, 64)),
        counters_(std::vector<std::uint64_t>(p.in.shape.heads * kAttentionCounters, 0)) {}

  /// Parts of the key tiles, in the order in which they come; `carry` is used even for a single one.
  Results run(const std::vector<std::vector<int>>& parts, bool carry = true) {
    const auto [B, H, T, D] = p_.in.shape;
    const auto map = make_tiles(T, H, p_.patterns);
    std::vector<int> queries(tiles_);
    std::iota(queries.begin(), queries.end(), 0);
    Results r;
    r.bitmap.assign(B * H * tiles_ * tiles_, 0);
    r.dq.assign(q_.size(), 0.f), r.dk = r.dv = r.dq;
    std::vector<Part> made;
    for (const auto& keys : parts) made.push_back(part(*map, queries, keys));
    for (std::size_t n = 0; n < made.size(); ++n) {
      AttentionForward f = call(made[n]);
      if (carry) f.carry = {carry_.get(), DType::f32, {B, H, T, D + kCarryExtra}};
      f.carry_first = n == 0, f.carry_last = n + 1 == made.size();
      if (f.carry_last) expect_untouched();
      cuda_attention_forward(f, nullptr, {path_});
    }
    for (const Part& part : made) backward(part, r);
    r.o = o_.host(), r.z = z_.host(), r.dscale = dscale_.host(), r.dtau = dtau_.host(), r.counters = counters_.host();
    return r;
  }

 private:
  struct Part {
    std::vector<int> key_tiles;
    std::int64_t keys;
    std::unique_ptr<DeviceTiles> tiles;
    Device<Bf16> k, v;
    Device<std::int32_t> document_start;
    Device<std::uint32_t> bits;
  };
  Part part(const TileMap& map, const std::vector<int>& queries, const std::vector<int>& keys) const {
    const auto [B, H, T, D] = p_.in.shape;
    std::vector<double> k, v;
    std::vector<std::int64_t> tokens;
    for (const int tile : keys)
      for (std::int64_t t = 64 * tile; t < std::min<std::int64_t>(T, 64 * tile + 64); ++t) tokens.push_back(t);
    for (std::int64_t bh = 0; bh < B * H; ++bh)
      for (const auto t : tokens) {
        const std::int64_t at = (bh * T + t) * D;
        k.insert(k.end(), &p_.in.k[at], &p_.in.k[at] + D), v.insert(v.end(), &p_.in.v[at], &p_.in.v[at] + D);
      }
    std::vector<std::int32_t> starts;
    for (const std::int32_t s : p_.document_start)
      starts.push_back(static_cast<std::int32_t>(std::lower_bound(tokens.begin(), tokens.end(), s) - tokens.begin()));
    return {keys,
            std::ssize(tokens),
            upload_tiles_cuda(part_of(map, queries, keys)),
            Device<Bf16>(rounded(k)),
            Device<Bf16>(rounded(v)),
            Device<std::int32_t>(starts),
            Device<std::uint32_t>(B * H * tiles_ * bitmap_words(std::ssize(keys)))};
  }
  AttentionForward call(const Part& part) const {
    const AttentionShape& s = p_.in.shape;
    const auto [B, H, T, D] = s;
    const AttentionShape ks{B, H, part.keys, D};
    AttentionForward f;
    f.shape = s, f.keys = part.keys, f.math = p_.in.math, f.visit = visit_, f.tiles = part.tiles.get();
    f.q = packed(q_.get(), s), f.k = packed(part.k.get(), ks), f.v = packed(part.v.get(), ks), f.o = packed(o_.get(), s);
    f.scale = {scale_.get(), DType::f32, {H}}, f.threshold = {tau_.get(), DType::f32, {H}};
    if (part.document_start.size() > 0) f.document_start = {part.document_start.get(), DType::i32, {B, T}};
    f.z = {z_.get(), DType::f32, {B, H, T}}, f.active_tiles = {part.bits.get(), DType::u32, {static_cast<std::int64_t>(part.bits.size())}};
    f.counters = {counters_.get(), DType::u64, {H, kAttentionCounters}};
    return f;
  }
  void expect_untouched() const {
    TESSERA_CUDA_CHECK(cudaDeviceSynchronize());
    for (const float z : z_.host()) ASSERT_TRUE(std::isnan(z)) << "z was written before the last part";
    for (const Bf16 o : o_.host()) ASSERT_TRUE(std::isnan(__bfloat162float(o))) << "o was written before the last part";
  }
  void backward(const Part& part, Results& r) const {
    const auto [B, H, T, D] = p_.in.shape;
    const std::int64_t m = part.keys, words = bitmap_words(std::ssize(part.key_tiles));
    Device<Bf16> dq(B * H * T * D), dk(B * H * m * D), dv(B * H * m * D);
    const auto view = [&](const Device<Bf16>& d, std::int64_t rows) { return HeadsView{d.get(), DType::bf16, H * rows * D, rows * D, D}; };
    AttentionBackward g;
    g.forward = call(part), g.d_o = packed(d_o_.get(), p_.in.shape), g.dq = view(dq, T), g.dk = view(dk, m), g.dv = view(dv, m);
    if (!p_.in.balance.empty()) g.balance = {balance_.get(), DType::f32, {H}};
    g.dscale = {dscale_.get(), DType::f32, {H}}, g.dthreshold = {dtau_.get(), DType::f32, {H}};
    g.workspace = {work_.get(), DType::f32, {static_cast<std::int64_t>(work_.size())}};
    cuda_attention_backward(g, nullptr, {path_});
    TESSERA_CUDA_CHECK(cudaDeviceSynchronize());
    const auto dq_host = floats(dq.host()), dk_host = floats(dk.host()), dv_host = floats(dv.host());
    const auto bits = part.bits.host();
    for (std::size_t n = 0; n < r.dq.size(); ++n) r.dq[n] += dq_host[n];
    for (std::int64_t bh = 0; bh < B * H; ++bh)
      for (std::int64_t n = 0; n < std::ssize(part.key_tiles); ++n) {
        const std::int64_t tile = part.key_tiles[n], rows = std::min<std::int64_t>(64, T - 64 * tile);
        std::copy_n(&dk_host[(bh * m + 64 * n) * D], rows * D, &r.dk[(bh * T + 64 * tile) * D]);
        std::copy_n(&dv_host[(bh * m + 64 * n) * D], rows * D, &r.dv[(bh * T + 64 * tile) * D]);
        for (std::int64_t a = 0; a < tiles_; ++a)
          r.bitmap[(bh * tiles_ + a) * tiles_ + tile] = bits[(bh * tiles_ + a) * words + n / 32] >> (n % 32) & 1;
      }
  }

  const Problem& p_;
  const CudaAttentionPath path_;
  const Visit visit_;
  const std::int64_t tiles_;
  const Device<Bf16> q_, d_o_, o_;
  const Device<float> scale_, tau_, balance_, z_, carry_, dscale_, dtau_, work_;
  const Device<std::uint64_t> counters_;
};

/// Neighbouring key tiles, as evenly as goes; at most as many parts as tiles.
std::vector<std::vector<int>> cut(int tiles, int parts) {
  std::vector<std::vector<int>> result(std::min(tiles, parts));
  for (int t = 0; t < tiles; ++t) result[t * std::ssize(result) / tiles].push_back(t);
  return result;
}

/// Largest error, over the largest value or 1.
double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double error = 0, largest = 1;
  for (std::size_t n = 0; n < a.size(); ++n) {
    const double off = std::abs(static_cast<double>(a[n]) - b[n]);
    error = std::isfinite(off) ? std::max(error, off) : INFINITY, largest = std::max(largest, std::abs(static_cast<double>(b[n])));
  }
  return error / largest;
}

void compare(const Problem& p, CudaAttentionPath path, int parts, const std::string& what) {
  const int tiles = static_cast<int>((p.in.shape.tokens + 63) / 64);
  const Results whole = Calls(p, path, Visit::active).run(cut(tiles, 1), false);
  for (const auto visit : {Visit::active, Visit::all}) {
    const Results r = Calls(p, path, visit).run(cut(tiles, parts));
    EXPECT_TRUE(same_bits(r.o, whole.o)) << what << " o";
    EXPECT_TRUE(same_bits(r.z, whole.z)) << what << " z";
    EXPECT_TRUE(same_bits(r.dk, whole.dk)) << what << " dk";
    EXPECT_TRUE(same_bits(r.dv, whole.dv)) << what << " dv";
    EXPECT_EQ(r.bitmap, whole.bitmap) << what << " bitmap";
    EXPECT_EQ(r.counters, whole.counters) << what << " counters";
    EXPECT_LT(distance(r.dq, whole.dq), 4.0 / 256) << what << " dq";  // a rounding a part, at most four
    EXPECT_LT(distance(r.dscale, whole.dscale), 5e-4) << what << " dscale";
    EXPECT_LT(distance(r.dtau, whole.dtau), 5e-4) << what << " dtau";
  }
  // As a ring has them: one's own part in the middle, then backwards and round. Sums in another order; under softmax weights are rounded to bf16
  // over another maximum.
  auto turned = cut(tiles, parts);
  std::rotate(turned.begin(), turned.begin() + std::ssize(turned) / 2, turned.end());
  std::reverse(turned.begin(), turned.end());
  const Results r = Calls(p, path, Visit::active).run(turned);
  EXPECT_LT(distance(r.z, whole.z), 1e-5) << what << " z, turned";
  EXPECT_LT(distance(floats(r.o), floats(whole.o)), 3.0 / 256) << what << " o, turned";
  EXPECT_EQ(r.bitmap, whole.bitmap) << what << " bitmap, turned";
  EXPECT_EQ(r.counters, whole.counters) << what << " counters, turned";
}

class CudaAttentionPartsOf : public ::testing::TestWithParam<unsigned> {};

constexpr unsigned kShares = 12;  // of the combinations

TEST_P(CudaAttentionPartsOf, EveryCombinationGiveTheBitsOfOneCall) {
  NEEDS_GPU();
  for_every_combination(
      {65, 130, 200, 257, 449, 17},
      [](const Problem& p, CudaAttentionPath path, unsigned n, const std::string& what) { compare(p, path, 1 + static_cast<int>(n / 3 % 4), what); },
      {GetParam(), kShares});
}
INSTANTIATE_TEST_SUITE_P(Shares, CudaAttentionPartsOf, ::testing::Range(0u, kShares));

TEST(CudaAttentionParts, ThresholdsOfEachQueryAndNegativeScales) {
  NEEDS_GPU();
  for (const auto path : paths())
    for (const std::int64_t D : {64, 128}) {
      AttentionMath math;
      math.length_beta = 0.6f;
      const AttentionShape shape{1, 2, 350, D};
      compare(make_problem(shape, math, {is_causal, windowed}, true, 0.1, 78), path, 3, describe(math, shape, path) + " length_beta");
      Problem p = make_problem(shape, {}, {is_causal}, true, -0.5, 79);
      for (double& c : p.in.scale) c = -c;
      compare(p, path, 4, std::string(name_of(path)) + " negative scale");
    }
}

TEST(CudaAttentionParts, RefusesACarryThatIsTooSmall) {
  NEEDS_GPU();
  const auto tiles = upload_tiles_cuda(make_tiles(64, 1, {is_causal}));
  const AttentionShape s{1, 1, 64, 64};
  const Device<Bf16> x(64 * 64);
  const Device<float> one(std::vector<float>{1.f}), z(64), carry(64 * (64 + kCarryExtra));
  const Device<std::uint32_t> bits(1);
  AttentionForward f;
  f.shape = s, f.tiles = tiles.get(), f.q = f.k = f.v = f.o = packed(x.get(), s);
  f.scale = f.threshold = {one.get(), DType::f32, {1}}, f.z = {z.get(), DType::f32, {64}}, f.active_tiles = {bits.get(), DType::u32, {1}};
  f.carry = {carry.get(), DType::f32, {64 * (64 + kCarryExtra) - 1}};
  EXPECT_THROW(cuda_attention_forward(f, nullptr), std::logic_error);
}

}  // namespace
}  // namespace tessera
