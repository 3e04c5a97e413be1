#include "attention_reference.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace tessera::reference {
namespace {

double dot(const std::vector<double>& x, std::int64_t at_x, const std::vector<double>& y, std::int64_t at_y, std::int64_t n) {
  double sum = 0;
  for (std::int64_t d = 0; d < n; ++d) sum += x[at_x + d] * y[at_y + d];
  return sum;
}

/// Element [b, h, t, 0] of a [B, H, T, D] tensor.
std::int64_t row(const AttentionShape& s, std::int64_t b, std::int64_t h, std::int64_t t) { return ((b * s.heads + h) * s.tokens + t) * s.head_size; }

double threshold(const AttentionInputs& in, std::int64_t h, std::int64_t i) {
  if (in.math.length_beta > 0) return in.math.length_beta * std::sqrt(2 * std::log(i + 2.0) / in.shape.head_size);
  return in.tau[h];
}

/// x = scale * part(s) - (what does not depend on the scale); `part` is also dx/dscale.
double scaled_part(const AttentionInputs& in, std::int64_t h, std::int64_t i, double s) {
  if (in.math.gate == Gate::softmax) return in.math.score == Score::fidelity ? s * s : s;
  if (in.math.score == Score::fidelity) return s * s - in.tau[h];
  return in.math.length_beta > 0 ? s - threshold(in, h, i) : s;
}

double argument(const AttentionInputs& in, std::int64_t h, std::int64_t i, double s) {
  const bool tau_outside = in.math.gate != Gate::softmax && in.math.score != Score::fidelity && !(in.math.length_beta > 0);
  return in.scale[h] * scaled_part(in, h, i, s) - (tau_outside ? in.tau[h] : 0.0);
}

double gate(const AttentionMath& math, double x) { return x > 0 ? std::pow(x, gate_power(math.gate)) : 0.0; }
double gate_derivative(const AttentionMath& math, double x) {
  const int p = gate_power(math.gate);
  return x > 0 ? p * std::pow(x, p - 1) : 0.0;
}

}  // namespace

double edge_argument(const AttentionInputs& in, std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) {
  return argument(in, h, i, dot(in.q, row(in.shape, b, h, i), in.k, row(in.shape, b, h, j), in.shape.head_size));
}

AttentionOutputs attention_forward(const AttentionInputs& in) {
  const auto [B, H, T, D] = in.shape;
  const bool softmax = in.math.gate == Gate::softmax;
  AttentionOutputs out;
  out.o.assign(B * H * T * D, 0.0);
  out.z.assign(B * H * T, 0.0);
  out.active_edges.assign(H, 0);
  out.visible_edges.assign(H, 0);
  out.empty_rows.assign(H, 0);
  out.nearest_kink = std::numeric_limits<double>::infinity();
  for (std::int64_t b = 0; b < B; ++b)
    for (std::int64_t h = 0; h < H; ++h)
      for (std::int64_t i = 0; i < T; ++i) {
        std::vector<std::int64_t> keys;
        std::vector<double> x;
        for (std::int64_t j = 0; j <= i; ++j)
          if (in.visible(b, h, i, j)) keys.push_back(j), x.push_back(edge_argument(in, b, h, i, j));
        std::uint64_t active = keys.size();
        std::vector<double> a(keys.size());
        double z = 1;
        if (softmax) {
          // z of a row without a visible key is 0, so that nothing infinite is stored.
          const double top = keys.empty() ? 0.0 : *std::max_element(x.begin(), x.end());
          double sum = 0;
          for (double value : x) sum += std::exp(value - top);
          z = keys.empty() ? 0.0 : top + std::log(sum);
          for (std::size_t n = 0; n < keys.size(); ++n) a[n] = std::exp(x[n] - z);
        } else {
          double sum = 0;
          active = 0;
          for (std::size_t n = 0; n < keys.size(); ++n) {
            a[n] = gate(in.math, x[n]);
            sum += a[n];
            active += x[n] > 0;
            out.nearest_kink = std::min(out.nearest_kink, std::abs(x[n]));
            if (!in.balance.empty()) out.nearest_kink = std::min(out.nearest_kink, std::abs(x[n] - kBalanceReach));
          }
          if (in.math.normalizer == Normalizer::sum) z = static_cast<double>(in.math.epsilon) + sum;
          if (in.math.normalizer == Normalizer::length) z = std::pow(std::max<double>(1, keys.size()), in.math.length_alpha);
        }
        for (std::size_t n = 0; n < keys.size(); ++n)
          for (std::int64_t d = 0; d < D; ++d)
            out.o[row(in.shape, b, h, i) + d] += a[n] / (softmax ? 1.0 : z) * in.v[row(in.shape, b, h, keys[n]) + d];
        out.z[(b * H + h) * T + i] = z;
        out.visible_edges[h] += keys.size();
        out.active_edges[h] += active;
        out.empty_rows[h] += active == 0;
      }
  return out;
}

AttentionGradients attention_backward(const AttentionInputs& in, const AttentionOutputs& out, const std::vector<double>& d_o) {
  const auto [B, H, T, D] = in.shape;
  const bool softmax = in.math.gate == Gate::softmax, fidelity = in.math.score == Score::fidelity;
  const bool has_tau = !softmax && !(in.math.length_beta > 0);
  AttentionGradients g;
  g.dq.assign(B * H * T * D, 0.0);
  g.dk = g.dv = g.dq;
  g.dscale.assign(H, 0.0);
  g.dtau.assign(H, 0.0);
  for (std::int64_t b = 0; b < B; ++b)
    for (std::int64_t h = 0; h < H; ++h)
      for (std::int64_t i = 0; i < T; ++i) {
        const auto at_i = row(in.shape, b, h, i);
        const double z = out.z[(b * H + h) * T + i], c = in.scale[h];
        const double delta = dot(d_o, at_i, out.o, at_i, D);
        for (std::int64_t j = 0; j <= i; ++j) {
          if (!in.visible(b, h, i, j)) continue;
          const auto at_j = row(in.shape, b, h, j);
          const double s = dot(in.q, at_i, in.k, at_j, D), x = argument(in, h, i, s), p = dot(d_o, at_i, in.v, at_j, D);
          double weight, dx;  // a_ij / z_i and the gradient of x_ij
          if (softmax) {
            weight = std::exp(x - z);
            dx = weight * (p - delta);
          } else {
            weight = gate(in.math, x) / z;
            dx = (p - (in.math.normalizer == Normalizer::sum ? delta : 0.0)) / z * gate_derivative(in.math, x);
            if (!in.balance.empty() && x > 0 && x < kBalanceReach) dx += in.balance[h];
          }
          const double ds = c * dx * (fidelity ? 2 * s : 1.0);
          for (std::int64_t d = 0; d < D; ++d) {
            g.dq[at_i + d] += ds * in.k[at_j + d];
            g.dk[at_j + d] += ds * in.q[at_i + d];
            g.dv[at_j + d] += weight * d_o[at_i + d];
          }
          g.dscale[h] += dx * scaled_part(in, h, i, s);
          if (has_tau) g.dtau[h] -= dx * (fidelity ? c : 1.0);
        }
      }
  return g;
}

AttentionTiles attention_tiles(const AttentionInputs& in, std::int64_t tile_query, std::int64_t tile_key) {
  const auto [B, H, T, D] = in.shape;
  const auto query_tiles = (T + tile_query - 1) / tile_query, key_tiles = (T + tile_key - 1) / tile_key, words = bitmap_words(key_tiles);
  const bool softmax = in.math.gate == Gate::softmax;
  AttentionTiles tiles;
  tiles.bitmap.assign(B * H * query_tiles * words, 0);
  tiles.active_tiles.assign(H, 0);
  tiles.visible_tiles.assign(H, 0);
  for (std::int64_t b = 0; b < B; ++b)
    for (std::int64_t h = 0; h < H; ++h)
      for (std::int64_t qt = 0; qt < query_tiles; ++qt)
        for (std::int64_t kt = 0; kt < key_tiles; ++kt) {
          bool visible = false, active = false;
          for (std::int64_t i = qt * tile_query; i < std::min(T, (qt + 1) * tile_query); ++i)
            for (std::int64_t j = kt * tile_key; j < std::min(i + 1, (kt + 1) * tile_key); ++j) {
              if (!in.visible(b, h, i, j)) continue;
              visible = true;
              active = active || softmax || edge_argument(in, b, h, i, j) > 0;
            }
          tiles.visible_tiles[h] += visible;
          tiles.active_tiles[h] += active;
          if (active) tiles.bitmap[((b * H + h) * query_tiles + qt) * words + kt / 32] |= 1u << (kt % 32);
        }
  return tiles;
}

}  // namespace tessera::reference
