#pragma once
// The attention operator written down naively in double precision, edge by edge, as kernels/attention.h defines it: what every
// backend is tested against. O(T^2 D) time, no tiles, no tricks. Its own gradients are checked against finite differences in
// attention_reference_test.cpp.

#include <cstdint>
#include <functional>
#include <vector>

#include "kernels/attention.h"

namespace tessera::reference {

/// Whether key j is visible to query i of head h in sequence b. Asked for j <= i only: causality is built in.
using Visible = std::function<bool(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j)>;

/// Whether AttentionBackward::balance goes with it.
inline bool has_balances(const AttentionMath& m) { return m.gate != Gate::softmax && m.score != Score::fidelity && !(m.length_beta > 0); }

struct AttentionInputs {
  AttentionShape shape;
  AttentionMath math;
  std::vector<double> q, k, v;     // [B, H, T, D]; q, k as the kernel gets them (unit length already where the score wants it)
  std::vector<double> scale, tau;  // [H]
  Visible visible;
  std::vector<double> balance{};  // [H], AttentionBackward::balance, or empty
};

struct AttentionOutputs {
  std::vector<double> o;                                               // [B, H, T, D]
  std::vector<double> z;                                               // [B, H, T]
  std::vector<std::uint64_t> active_edges, visible_edges, empty_rows;  // [H], summed over B
  /// Smallest |x| of a visible edge, or with balances |x - kBalanceReach| (infinity without an edge, and for softmax): how safe edge counts and
  /// gradients are from rounding.
  double nearest_kink = 0;
};

struct AttentionGradients {
  std::vector<double> dq, dk, dv;    // [B, H, T, D]
  std::vector<double> dscale, dtau;  // [H]; dtau is zero with length_beta and softmax
};

/// Tiles with an active and with a visible edge, in the layout of AttentionForward::active_tiles.
struct AttentionTiles {
  std::vector<std::uint32_t> bitmap;                       // [B, H, query tiles, bitmap_words(key tiles)]
  std::vector<std::uint64_t> active_tiles, visible_tiles;  // [H], summed over B
};

/// x_ij, the gate's argument (softmax: the exponent c f(s_ij)).
double edge_argument(const AttentionInputs& in, std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j);

AttentionOutputs attention_forward(const AttentionInputs& in);
AttentionGradients attention_backward(const AttentionInputs& in, const AttentionOutputs& out, const std::vector<double>& d_o);
AttentionTiles attention_tiles(const AttentionInputs& in, std::int64_t tile_query, std::int64_t tile_key);

}  // namespace tessera::reference
