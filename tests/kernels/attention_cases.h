#pragma once
// Attention cases for backend tests: random inputs, tile lists made by brute force from a visibility function (independent of
// model/pattern.cpp), and the reference's answers.

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "attention_reference.h"
#include "kernels/tiles.h"

namespace tessera::reference {

/// A static pattern: whether head h's query i sees key j. Asked for any i, j >= 0; causality is added by who uses it.
using Pattern = std::function<bool(std::int64_t h, std::int64_t i, std::int64_t j)>;

/// The tile lists of a pattern, edge by edge: O(tokens^2) calls.
std::shared_ptr<const TileMap> brute_force_tiles(const Pattern& pattern, int heads, std::int64_t tokens, int tile_query, int tile_key);

struct AttentionCase {
  AttentionShape shape{.batch = 2, .heads = 2, .tokens = 45, .head_size = 16};
  AttentionMath math;
  Pattern pattern = [](auto, auto, auto) { return true; };
  int tile_query = 16, tile_key = 16;
  std::int64_t map_tokens = 0;               // 0: shape.tokens
  std::vector<std::int32_t> document_start;  // [B, T], or empty
  double tau = 0.1;                          // of head 0; others a little more
  double balance = 0;                        // of head 0; of the others with changing sign. 0: none
  std::uint64_t seed = 1;
  double least_kink = 5e-6;  // inputs are redrawn until no |x| is smaller, so that fp32 and double agree on which edges are active
};

/// A case that fp32 can be held to: a large epsilon bounds how much a row with a tiny sum can magnify the rounding of its scores. With balances where
/// there can be any.
AttentionCase case_of(Score score, Gate gate, Normalizer normalizer, float beta = 0);

struct NamedPattern {
  const char* name;
  Pattern visible;
};
inline const NamedPattern kPatterns[] = {
    {"causal", [](auto, auto, auto) { return true; }},
    {"window", [](auto, auto i, auto j) { return i - j < 11; }},
    {"strided", [](auto, auto i, auto j) { return (i - j) % 7 < 2; }},
    {"global_or_far", [](auto h, auto i, auto j) { return j < 3 || (h == 1 && i - j > 20); }},
    {"no_self", [](auto, auto i, auto j) { return i - j >= 5 && j % 3 != 1; }},                        // rows without a visible key
    {"block", [](auto h, auto i, auto j) { return ((i / 8) * 31 + (j / 8) * 17 + h * 5) % 3 == 0; }},  // whole tiles gone
};

/// Inputs as floats and the reference's results for exactly these floats. q, k, v, d_o are [B, H, T, D].
struct AttentionProblem {
  AttentionInputs in;
  std::vector<float> q, k, v, d_o, scale, tau, balance;
  std::vector<std::int32_t> document_start;
  std::shared_ptr<const TileMap> tiles;
  AttentionOutputs out;
  AttentionGradients gradients;
  AttentionTiles active;
};

/// Random inputs: unit vectors for cosine and fidelity, normal ones for dot.
AttentionProblem make_problem(const AttentionCase& c);

/// The reference's answers, anew, after in/q/k/v/... were changed by hand (the floats count).
void solve(AttentionProblem& p, const AttentionCase& c);

/// Random documents: [B, T], lengths from 1 to `longest`.
std::vector<std::int32_t> random_documents(const AttentionShape& s, std::int64_t longest, std::uint64_t seed);

/// Names of enum values, for test names and messages.
std::string name_of(const AttentionMath& math);

/// max |a - b| / max(|b|, 1), the size of the inputs: how far `a` is from the reference `b`. What is not finite counts as infinitely far.
double relative_error(const std::vector<float>& a, const std::vector<double>& b);

}  // namespace tessera::reference
