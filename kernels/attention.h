#pragma once
// The attention operator: what it computes, what goes in, what comes out, for every backend. README.md and docs in
// this header are the user's definition; the CPU implementation (kernels/cpu/attention*.cpp) is the readable reference.
//
//   score     s_ij = <q_i, k_j>   (q, k arrive already unit length for cosine and fidelity: Ops::qk_transform_forward)
//             x_ij = c s_ij - tau_h                     dot (c = 1/sqrt(D)), cosine (c = scale[h])
//             x_ij = c (s_ij^2 - tau_h)                 fidelity (c = scale[h])
//             x_ij = c (s_ij - beta sqrt(2 ln(i+2)/D))  cosine with length_beta = beta > 0: the extreme-value threshold
//                                                       (arXiv 2601.12145) stands on the cosine itself, inside the scale
//   gate      a_ij = max(0, x_ij)^p                     p = 1, 2, 4; an edge is active when it is visible and x_ij > 0
//   output    o_i  = (1/z_i) sum_j a_ij v_j
//   norm      z_i  = 1 (none, rms) | n_i^alpha (length; n_i visible keys) | eps + sum_j a_ij (sum)
//   softmax   o_i  = sum_j softmax_j(c f(s_ij)) v_j, f as the score says; tau is not used; z_i = ln sum_j exp(c f(s_ij))
//             every visible edge is active
//   rms       the kernel computes as for none; Ops::head_norm_forward is a step of its own after it
//   self edge, sinks (sum): steps of their own as well, SelfEdge and Sinks in kernels/ops.h; the output gate comes after all of these: OutputGate
//
// A query without an active edge gets o_i = 0; one without a visible key has z_i = 1 (length) and 0 (softmax), never an infinity.
// Gradients: see AttentionBackward.
//
// Exactness: tiles without an active edge add nothing. visit = all computes them all the same; the bits of every output
// are equal for finite inputs, forward and backward. (A zero in an output is +0: x + 0.0f on the way out. Otherwise a sum that underflowed to -0
// would become +0 when an inactive tile is added, and the bits would tell.)

#include <cstdint>
#include <memory>

#include "kernels/tensor.h"
#include "kernels/tiles.h"

namespace tessera {

enum class Score { dot, cosine, fidelity };
enum class Gate { relu, relu2, relu4, softmax };
enum class Normalizer { none, length, sum, rms };
enum class Visit { all, active };

/// The exponent p of a relu gate; 0 for softmax.
constexpr int gate_power(Gate g) { return g == Gate::relu ? 1 : g == Gate::relu2 ? 2 : g == Gate::relu4 ? 4 : 0; }

struct AttentionMath {
  Score score = Score::cosine;
  Gate gate = Gate::relu2;
  Normalizer normalizer = Normalizer::sum;
  float length_alpha = 1.0f;  // exponent of n_i, normalizer length
  float epsilon = 1e-6f;      // eps of normalizer sum
  float length_beta = 0.0f;   // > 0: per-query threshold instead of tau_h (score cosine only)
};

/// A [B, H, T, D] tensor inside a larger one: element (b,h,t,d) at data + b*batch + h*head + t*token + d, in elements.
/// The packed projection [B, T, 3, H, D] is three of these with token = 3*H*D and head = D.
struct HeadsView {
  void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t batch = 0, head = 0, token = 0;
};

struct AttentionShape {
  std::int64_t batch = 0, heads = 0, tokens = 0, head_size = 0;
};

/// Columns of the counter tensor [heads, kAttentionCounters] u64. Forward passes add to them. A tile counts as visible when it holds a
/// visible edge (within tokens, within the document), as active when it holds an active one; an empty row is a query without an active edge.
enum AttentionCounter : int { kActiveEdges, kVisibleEdges, kActiveTiles, kVisibleTiles, kEmptyRows, kAttentionCounters };

/// Words of the active-tile bitmap a query tile: [B, H, query_tiles, bitmap_words] u32; bit b%32 of word b/32 is key tile b.
constexpr std::int64_t bitmap_words(std::int64_t key_tiles) { return (key_tiles + 31) / 32; }

/// Tile lists as a backend wants them (on a GPU: copied to the device). Made by Ops::upload_tiles, immutable, shareable.
class DeviceTiles {
 public:
  explicit DeviceTiles(std::shared_ptr<const TileMap> host) : host_(std::move(host)) {}
  virtual ~DeviceTiles() = default;
  const TileMap& host() const { return *host_; }

 private:
  std::shared_ptr<const TileMap> host_;
};

/// Values of a query beside its D sums in AttentionForward::carry.
constexpr std::int64_t kCarryExtra = 8;

struct AttentionForward {
  AttentionShape shape;  // shape.tokens may be anything from 1 to tiles->host().tokens
  /// Rows of k, v, dk, dv, which are [B, H, keys, D]; 0: as many as shape.tokens, which counts queries. They differ where a rank has some of a
  /// sequence's queries and has fetched the keys that those may see (TileMap::keys).
  std::int64_t keys = 0;
  std::int64_t key_count() const { return keys > 0 ? keys : shape.tokens; }
  AttentionMath math;
  Visit visit = Visit::active;
  const DeviceTiles* tiles = nullptr;
  HeadsView q, k, v;      // in
  HeadsView o;            // out: every element of [B,H,T,D] is written
  Tensor scale;           // in [H] f32: c_h (for dot filled with 1/sqrt(D) by the caller)
  Tensor threshold;       // in [H] f32: tau_h
  Tensor document_start;  // in, optional [B, T] i32: the first row of k that belongs to the query's document; rows before it are not visible
  Tensor positions;       // in, optional [T] i32: index i of each query in its sequence, ascending, for length_beta; without it query t is token t
  Tensor z;               // out [B, H, T] f32 (1 for none and rms; sum: of the weights as the product with v takes them, on a GPU in bf16)
  Tensor active_tiles;    // out [B, H, query_tiles(tokens), bitmap_words(key_tiles(keys))] u32, whole words written
  Tensor counters;        // in/out, optional [H, kAttentionCounters] u64
  /// Optional: the keys come in parts, a call each, in any order, and what a query has summed up goes from call to call: [B, H, T, D + kCarryExtra]
  /// f32, the sum of a v (softmax: of exp(x - top) v), and then the sum of a, top and the edges seen, as the backend wants them: nothing but the next
  /// part's call reads them. Read unless carry_first; the call with carry_last writes o and z and counts empty rows, the others write the carry. No
  /// other call's o and z are touched. Parts in ascending order of their keys, cut between tiles, give o and z the bits of one call.
  Tensor carry;
  bool carry_first = true, carry_last = true;
};

/// Active edges with x below it are those whose scores move a threshold that keeps a number of edges: see ThresholdUpdate in kernels/ops.h. In units
/// of x, whose spread is about 1 at first: c / sqrt(D) for cosines of random vectors, so 1 with c = 8 and D = 64, and 1 for dot products over
/// sqrt(D).
inline constexpr float kBalanceReach = 1.0f;

/// Gradients, with do_i the gradient of o_i (for rms: of the un-normed sum):
///   da_ij = <do_i, v_j> / z_i                    none, length, rms
///   da_ij = (<do_i, v_j> - <do_i, o_i>) / z_i    sum
///   dx_ij = da_ij p max(0, x_ij)^(p-1) + m_h [x_ij < kBalanceReach]   0 on inactive edges; m_h: balance, 0 without it
///   softmax: dx_ij = a_ij (<do_i, v_j> - <do_i, o_i>), a_ij = exp(c f(s_ij) - z_i)
///   dv_j += (a_ij / z_i) do_i;   dthreshold_h -= sum dx_ij (times c_h for fidelity)
///   dq_i += c g_ij k_j, dk_j += c g_ij q_i, g_ij = dx_ij (fidelity: 2 s_ij dx_ij)
///   dscale_h += sum dx_ij s_ij | dx_ij (s_ij^2 - tau_h) | dx_ij (s_ij - tau_i) with length_beta
/// dk, dv are summed by key tile over query tiles in ascending order, dq by query tile over key tiles in ascending order.
struct AttentionBackward {
  AttentionForward forward;  // the same arguments as the forward call, its outputs now inputs; counters not used
  HeadsView d_o;             // in
  HeadsView dq, dk, dv;      // out: every element is written
  Tensor dscale;             // in/out, optional [H] f32, added to
  Tensor dthreshold;         // in/out, optional [H] f32, added to; nothing with length_beta or softmax
  /// In, optional [H] f32: m_h. It is no part of the gradient of the output but of that of a threshold that keeps a number of edges (ThresholdUpdate
  /// in kernels/ops.h), and in dscale and dthreshold like the rest of dx. Not with fidelity, softmax or length_beta.
  Tensor balance;
  Tensor workspace;  // f32, at least attention_backward_workspace(...) elements
};

/// Where generation keeps the keys and values of the tokens so far: data [sequences, heads, 2, capacity, head_size] of the compute type, keys (after
/// Ops::qk_transform_forward) and then values of a head; row p is token p. A head's keys lie together: a query reads them as one stream. Filled by
/// CacheAppend from token 0 on; rows without a token may hold anything.
struct KeyValueCache {
  Tensor data;
  std::int64_t sequences = 0, heads = 0, capacity = 0, head_size = 0;
};

/// Keys and values of T new tokens of each of B sequences go into the cache; what is there from position + T on has no meaning any more.
struct CacheAppend {
  KeyValueCache cache;  // in/out
  Tensor qkv;           // in [B, T, 3, H, D]: the packed projection after Ops::qk_transform_forward; k and v are read
  Tensor sequences;     // in [B] i32: whose cache, each another one
  Tensor positions;     // in [B] i32: place of the first of the T tokens
};

/// Attention of one token of each of B sequences, its newest, over the cached keys and values of tokens 0 .. positions[b] (its own included): the row
/// that AttentionForward gives to the query at that position, as the definition above has it, with the same lists: the row of the pattern for query p
/// is row p % tile_query of query tile p / tile_query, whatever the length of the sequence.
struct AttentionDecode {
  KeyValueCache cache;  // in; capacity at most tiles->host().tokens
  AttentionMath math;
  const DeviceTiles* tiles = nullptr;
  Tensor qkv;             // in [B, 3, H, D]: the packed projection of the new tokens after Ops::qk_transform_forward; q is read
  Tensor sequences;       // in [B] i32: whose cache, each another one
  Tensor positions;       // in [B] i32: each sequence is at its own length
  Tensor document_start;  // in, optional [B] i32: first token of the document that holds the new token; not with a GPU's batch-invariant operations
  Tensor scale;           // in [H] f32
  Tensor threshold;       // in [H] f32
  Tensor o;               // out [B, H, D]
  Tensor z;               // out, optional [B, H] f32
  Tensor workspace;       // f32, attention_decode_workspace(cache) elements, 16-byte aligned; the CPU wants none
};

/// Most parts that a GPU cuts a decoding query's list into, so that a single sequence keeps it busy.
inline constexpr std::int64_t kDecodeParts = 64;

/// Elements of f32 workspace that decoding every sequence of a cache wants on a GPU, in either way. In parts: of each a sum of D values, and three
/// numbers. By the forward kernel, of every head: kDecodeRows rows (a band of its query tiles, at most) of q and o in bf16, of z, and of the bitmap;
/// its list, scale and threshold.
inline constexpr std::int64_t kDecodeRows = 192;
constexpr std::int64_t attention_decode_workspace(const KeyValueCache& c) {
  const std::int64_t in_parts = kDecodeParts * (c.head_size + 3),
                     by_forward = kDecodeRows * (c.head_size + 1) + kDecodeRows / 64 * ((c.capacity + 2047) / 2048) + 8;
  return c.sequences * c.heads * (in_parts > by_forward ? in_parts : by_forward);
}

/// Elements of f32 workspace a backward call wants: four values a row of every query tile (on the GPU 1/z, delta, the offset of x and the
/// document's start, 64 of each in turn) and two partial sums a query tile.
constexpr std::int64_t attention_backward_workspace(const AttentionShape& s, std::int32_t tile_query) {
  const std::int64_t tiles = s.batch * s.heads * ((s.tokens + tile_query - 1) / tile_query);
  return tiles * (4 * tile_query + 2);
}

}  // namespace tessera
