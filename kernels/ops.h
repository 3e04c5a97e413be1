#pragma once
// The operation set: everything a device does for the model and the optimizer. The model is written once against this
// interface and never asks which device it runs on. kernels/cpu implements it readably (fp32, OpenMP, BLAS), kernels/cuda fast.
//
// Element types. A device computes in one type (compute_type in kernels/device.h): f32 on the CPU, bf16 with f32 sums on a GPU. Of that type are
// activations, their gradients, and what multiplies them as a matrix or is added by a linear layer: LinearForward::w and bias, the classifier's w
// and workspace, wte, wpe. Everything else is as stated: norm gains and biases, head gains, scales and thresholds, statistics (mean, rstd,
// inverse_norm, z, losses) and every gradient of a parameter are f32.
//
// Conventions. N = rows (batch x tokens), C = width, H heads of D, V vocabulary rows. Matrices are row-major.
// "added to": the operation accumulates into the output; all other outputs are overwritten. Operations on one Ops run in the
// order of the calls; on a GPU they return before they are done (synchronize() or download() wait), on the CPU they are done on return.
// Every reduction has a fixed order that depends on shapes only: the same call gives the same bits, whatever the number of threads.
// Wrong shapes or element types throw std::logic_error: they are bugs of the caller, never of the user.

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "kernels/attention.h"
#include "kernels/device.h"
#include "kernels/tensor.h"

namespace tessera {

enum class NormKind { layernorm, rmsnorm };
enum class Activation { none, gelu };  // gelu: the tanh form of GPT-2 (Hendrycks & Gimpel, arXiv 1606.08415)

struct NormForward {
  NormKind kind = NormKind::rmsnorm;
  Tensor x{};             // in [N, C]
  Tensor residual{};      // in, optional [N, C]: the input of the norm is x + residual
  Tensor residual_out{};  // out [N, C], with `residual`: x + residual (may be the same memory as residual)
  Tensor gain{};          // in [C]
  Tensor bias{};          // in, optional [C] (layernorm)
  Tensor y{};             // out [N, C]
  Tensor mean{};          // out [N] f32 (layernorm)
  Tensor rstd{};          // out [N] f32: 1/sqrt(var + eps), rmsnorm: 1/sqrt(mean square + eps)
  float epsilon = 1e-5f;
};

struct NormBackward {
  NormKind kind = NormKind::rmsnorm;
  Tensor dy{};            // in [N, C]
  Tensor x{};             // in [N, C]: what was normalised (residual_out, or x)
  Tensor gain{};          // in [C]
  Tensor mean{}, rstd{};  // in [N] f32
  Tensor dx{};            // added to [N, C]
  Tensor dgain{};         // added to [C] f32
  Tensor dbias{};         // added to, optional [C] f32
};

/// On the CPU a linear layer of at most so many rows gives a row the same bits whatever the others are and how many. The text that a prompt gets
/// does not depend on its batch because generation takes no more at once.
inline constexpr std::int64_t kFewRows = 16;

struct LinearForward {  // y = act(x w^T + bias)
  Tensor x{};           // in [N, K]
  Tensor w{};           // in [M, K]
  Tensor bias{};        // in, optional [M]
  Tensor y{};           // out [N, M]
  Activation activation = Activation::none;
  Tensor pre_activation{};  // out [N, M], with gelu: the argument of the activation
};

struct LinearBackward {
  Tensor dy{};             // in [N, M]: gradient of x w^T + bias (after the activation's own backward)
  Tensor x{};              // in [N, K]
  Tensor w{};              // in [M, K]
  Tensor dx{};             // out, optional [N, K]: dy w, times gelu'(gelu_argument) where that is given
  bool add_dx = false;     // dx is added to instead, summed in f32 and rounded once: for an input of two layers. Not with gelu_argument
  Tensor gelu_argument{};  // in, optional [N, K]: pre_activation of the layer that made x
  Tensor dw{};             // added to, optional [M, K] f32
  Tensor dbias{};          // added to, optional [M] f32
};

struct QkTransform {
  // On the packed projection [N, 3, H, D] in place: q and k are (unit) divided by their length and (rotary) rotated by position.
  Tensor qkv{};  // in/out [N, 3*H*D]
  std::int64_t heads = 0;
  bool unit = false;
  Tensor inverse_norm{};  // with unit: [N, 2, H] f32 (q then k): out of forward, in to backward. 1/|q|, and 0 where |q| < 1e-6: such a
                          // vector becomes zero, with a zero gradient
  Tensor rotary{};        // optional [P, D/2, 2] f32: cos, sin of position * base^(-2i/D); pairs are (d, d + D/2) (GPT-NeoX order)
  Tensor positions{};     // with rotary: [N] i32
};

struct HeadNorm {  // o = rms norm over each head's D elements, times gain
  Tensor x{};      // in [N, H, D]
  Tensor gain{};   // in [H, D]
  Tensor y{};      // out [N, H, D]
  Tensor rstd{};   // [N, H] f32: out of forward, in to backward
  float epsilon = 1e-5f;
};
struct HeadNormBackward {
  Tensor dy{}, x{}, gain{}, rstd{};  // in
  Tensor dx{};                       // out [N, H, D]
  Tensor dgain{};                    // added to [H, D] f32
};

struct OutputGate {
  // y = 2 sigmoid(u) o, element by element: a gate on the attention's output (Qiu et al., arXiv 2505.06708, without the factor, which makes it the
  // identity at u = 0).
  Tensor u{};  // in [N, C]
  Tensor o{};  // in [N, C]
  Tensor y{};  // out [N, C]; may be the same memory as o, or as u
};
struct OutputGateBackward {
  // With s = sigmoid(u): d_o = 2 s dy, du = 2 s (1 - s) o dy. An output may be the same memory as an input; no two outputs may.
  Tensor dy{}, u{}, o{};  // in [N, C]
  Tensor d_o{};           // out [N, C]
  Tensor du{};            // out [N, C]
  Tensor y{};             // out, optional [N, C]: that of the forward pass again, to the same bits
};

struct SelfEdge {
  // After attention_forward with normalizer sum: an edge from each token to itself beside the gated ones (which may hold (i, i) too), with a learned
  // bias b_h in place of a threshold. In place on o and z:
  //   x_i  = c_h f(<q_i, k_i>) + b_h     f(s) = s (dot, cosine), s^2 (fidelity)
  //   s_i  = max(0, x_i)^p               p as the gate says
  //   z'_i = z_i + s_i,  o'_i = (z_i o_i + s_i v_i) / z'_i
  // Where x_i <= 0 o and z keep their bits. Where x_i > 0 it is one active edge more, beside (i, i) if the gate admits that too; the bitmap does not
  // know of it, and a query with this edge alone still counts as empty (kEmptyRows).
  AttentionShape shape{};    // its heads are those of this call, which may be some of a tensor's (views from the first of them on)
  Score score = Score::dot;  // q, k are what attention_forward reads
  Gate gate = Gate::relu2;   // not softmax
  HeadsView q{}, k{}, v{};   // in
  HeadsView o{};             // in/out
  Tensor scale{}, bias{};    // in [H] f32: c_h, b_h
  Tensor z{};                // in/out [B, H, T] f32
  Tensor counters{};         // optional [H, kAttentionCounters] u64: forward adds open edges to kActiveEdges
};

struct SelfEdgeBackward {
  // After attention_backward, which was given o' and z' as o and z: its gradients are then those of the gated edges.
  //   da_i = (<do_i, v_i> - <do_i, o'_i>) / z'_i,  dx_i = da_i p max(0, x_i)^(p-1)
  //   dv_i += (s_i / z'_i) do_i,  dq_i += c f'(<q_i, k_i>) dx_i k_i,  dk_i += c f'(<q_i, k_i>) dx_i q_i
  //   dscale_h += sum dx_i f(<q_i, k_i>),  dbias_h += sum dx_i
  SelfEdge forward{};          // the same arguments; o and z are o' and z', now inputs
  HeadsView d_o{};             // in
  HeadsView dq{}, dk{}, dv{};  // added to
  Tensor dscale{};             // added to, optional [H] f32
  Tensor dbias{};              // added to [H] f32
};

inline constexpr std::int64_t kMostSinks = 8;  // of a head

struct Sinks {
  // After attention_forward with normalizer sum, before or after SelfEdge: S learned keys and values a head, which every query sees whatever its
  // pattern and its document (the learnable sink token of Xiao et al., arXiv 2309.17453, for each head). In place on o and z:
  //   x_is = c_h f(<q_i, k_hs>) + b_hs   f(s) = s (dot, cosine), s^2 (fidelity); k_hs is as long as it is, also where keys of tokens have length 1
  //   w_is = max(0, x_is)^p              p as the gate says
  //   z'_i = z_i + sum_s w_is,  o'_i = (z_i o_i + sum_s w_is v_hs) / z'_i
  // Where no x_is > 0, o and z keep their bits. A sink is no token: counters and the bitmap know nothing of its edges.
  AttentionShape shape{};    // its heads are those of this call, which may be some of a tensor's (views from the first of them on)
  Score score = Score::dot;  // q is what attention_forward reads
  Gate gate = Gate::relu2;   // not softmax
  HeadsView q{};             // in
  HeadsView o{};             // in/out
  Tensor scale{};            // in [H] f32: c_h
  Tensor keys{}, values{};   // in [H, S, D] f32, S from 1 to kMostSinks
  Tensor bias{};             // in [H, S] f32: b_hs
  Tensor z{};                // in/out [B, H, T] f32
};

struct SinksBackward {
  // After attention_backward, which was given o and z as all that adds to them left them (o', z'): its gradients are then those of its own edges.
  //   da_is = (<do_i, v_hs> - <do_i, o'_i>) / z'_i,  dx_is = da_is p max(0, x_is)^(p-1)
  //   dq_i += c sum_s f'(<q_i, k_hs>) dx_is k_hs,  dk_hs += c sum_i f'(<q_i, k_hs>) dx_is q_i,  dv_hs += sum_i (w_is / z'_i) do_i
  //   dscale_h += sum dx_is f(<q_i, k_hs>),  db_hs += sum_i dx_is
  Sinks forward{};            // the same arguments; o and z are o' and z', now inputs
  HeadsView d_o{};            // in
  HeadsView dq{};             // added to
  Tensor dscale{};            // added to, optional [H] f32
  Tensor dkeys{}, dvalues{};  // added to [H, S, D] f32
  Tensor dbias{};             // added to [H, S] f32
};

struct Classifier {
  // Fused linear + cross-entropy: loss_n = ln sum_v exp(x_n.w_v) - x_n.w_t(n), over v < vocabulary. Logits live only in
  // chunks of rows (workspace), never for the whole batch.
  Tensor x{};                   // in [N, C]
  Tensor w{};                   // in [V, C]; rows >= vocabulary are padding and take no part
  std::int64_t vocabulary = 0;  // <= V
  Tensor targets{};             // in [N] i32; -1: the row counts for nothing (loss 0, gradient 0)
  Tensor losses{};              // out [N] f32, nats
  Tensor predictions{};         // out, optional [N] i32: argmax over the vocabulary (lowest index wins a tie)
  Tensor dx{};                  // out, optional [N, C]: gradient_scale * sum_n dloss_n/dx
  Tensor dw{};                  // added to, with dx [V, C] f32
  float gradient_scale = 1.0f;  // 1 / tokens of the whole step
  Tensor workspace{};           // [chunk_rows, V]: sets the chunk
};

struct AdamW {               // Loshchilov & Hutter, arXiv 1711.05101; on this rank's shard of the flat parameters
  Tensor parameter{};        // in/out [n] f32 (master)
  Tensor gradient{};         // in [n] f32
  Tensor m{}, v{};           // in/out [n] f32
  std::int64_t decayed = 0;  // the first `decayed` elements of the shard take weight decay
  float lr = 0, beta1 = 0.9f, beta2 = 0.95f, epsilon = 1e-8f, weight_decay = 0;
  std::int64_t update = 1;  // 1-based number of this update, for bias correction
  Tensor weights{};         // out, optional [n] of the compute type: the updated parameters, rounded to nearest even
  Tensor gradient_sumsq{};  // in [1] f64: squared global norm of the whole gradient
  float clip = 0;           // > 0: the gradient is scaled by min(1, clip / norm)
  // A gradient_sumsq that is not finite makes the whole call do nothing.
};

struct ThresholdUpdate {
  // tau_h += rate * clamp(ln(measured / wanted), -1, 1), then clamped to [low, high]; measured = active edges / causal edges of
  // the step. A head with no active edge counts as clamp -1.
  //
  // A threshold that keeps a share of the edges follows the scores: raised together, they change nothing. It is a quantile of them, which moves with
  // the scores near it: d tau_h / d (c s_ij) = K_ij / sum K, K a kernel at the threshold. It is one-sided here, as inactive edges have no gradient to
  // join: 1 on active edges with x below kBalanceReach (kernels/attention.h), else 0. The gradient through it is -K_ij (sum dx) / (sum K), which
  // makes the sum over a head's edges zero. It is added as m_h K_ij (AttentionBackward::balance), m_h being found by small steps, as one step's edges
  // say little: m_h -= balance_rate * (sum dx) / active edges, dx with m_h in it: some active edges / (balance_rate * sum K) steps to follow, and
  // nothing to follow where no active edge is near. Self edges, which have no tau, count among the active edges and add nothing to the sum.
  //
  // Where tau_h does not keep up (measured beyond a factor e of wanted) m_h may not drive the scores further away: with too few active edges it is
  // at most 0, since a positive one lowers scores, with too many at least 0 (never the case while more than 1/e of the causal edges is wanted).
  Tensor threshold{};       // in/out [R] f32, R = layers x heads
  Tensor counters{};        // in [R, kAttentionCounters] u64, of the whole step over all ranks
  double causal_edges = 0;  // of the whole step over all ranks, a row (layer and head)
  double wanted_density = 0;
  float rate = 0, low = 0, high = 0;
  Tensor balance{};   // in/out, optional [R] f32: m_h. No step without an active edge, or with a gradient that is not finite
  Tensor gradient{};  // in, with balance [R] f32: -sum dx of the whole step over all ranks (AttentionBackward::dthreshold)
  float balance_rate = 0;
};

/// Rows of D elements that lie apart: row r of piece p of sequence b at data + start[p]*unit + b*batch + r*row, in elements.
struct RowsView {
  void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t unit = 0, batch = 0, row = 0;
};

struct MoveRows {
  // Pieces of consecutive rows, such as key tiles of a head, from one place to another: rows[p] rows of piece p of each sequence. In one call no
  // row of `to` is named twice. What no piece names stays as it is.
  RowsView to{}, from{};       // f32; on a GPU each f32 or bf16
  Tensor pieces{};             // in [n, 3] u64: start in `to`, start in `from`, rows
  bool reversed = false;       // the first two columns the other way round: the table of a move also serves the way back
  bool add = false;            // to += from, instead of to = from; summed in f32, rounded once to the type of `to`
  std::int64_t sequences = 0;  // B
  std::int64_t size = 0;       // D
};

/// A sequence of operations that runs again as one (a CUDA graph): the same memory, the same scalar arguments.
class RecordedWork {
 public:
  virtual ~RecordedWork() = default;
  virtual void replay() = 0;
};

class Ops {
 public:
  virtual ~Ops() = default;

  virtual DeviceKind kind() const = 0;
  virtual std::string device_name() const = 0;       // for logs: "cpu (2 threads, OpenBLAS 0.3.21)"
  virtual std::size_t memory_available() const = 0;  // bytes that allocate() may expect to get
  virtual double peak_flops() const = 0;             // dense FLOP/s of the precision in use where known, else 0

  // -- memory
  virtual void* allocate(std::size_t bytes) = 0;  // throws std::bad_alloc
  virtual void deallocate(void* p) noexcept = 0;
  virtual void upload(const Tensor& to, const void* host) = 0;  // to.bytes() bytes
  virtual void download(void* host, const Tensor& from) = 0;    // waits
  virtual void copy(const Tensor& to, const Tensor& from) = 0;  // same number of elements; converts f32 <-> bf16
  virtual void zero(const Tensor& t) = 0;
  virtual void synchronize() = 0;
  /// Allocates the scratch memory (scratch_bytes in kernels/device.h) of operations on at most `rows` rows of a model of this width. Without it, or
  /// beyond it, the first operation that needs more does so, and waits.
  virtual void prepare(std::int64_t /*rows*/, std::int64_t /*width*/) {}
  /// Records the operations that `work` calls on this Ops, without running them. nullptr where the device does not record: then nothing was called.
  /// `work` must neither wait (download, synchronize) nor upload.
  virtual std::unique_ptr<RecordedWork> record(const std::function<void()>& /*work*/) { return nullptr; }

  // -- layers
  /// out[n] = wte[tokens[n]] + (wpe ? wpe[positions[n]] : 0).  out [N, C], tokens and positions [N] i32.
  virtual void embedding_forward(const Tensor& out, const Tensor& tokens, const Tensor& positions, const Tensor& wte, const Tensor& wpe) = 0;
  /// dwte [V, C] and dwpe [P, C] (optional), f32, added to.
  virtual void embedding_backward(const Tensor& dout, const Tensor& tokens, const Tensor& positions, const Tensor& dwte, const Tensor& dwpe) = 0;
  virtual void norm_forward(const NormForward& a) = 0;
  virtual void norm_backward(const NormBackward& a) = 0;
  virtual void linear_forward(const LinearForward& a) = 0;
  virtual void linear_backward(const LinearBackward& a) = 0;
  virtual void qk_transform_forward(const QkTransform& a) = 0;
  /// `transformed` is the packed tensor after the forward; gradients [N, 3*H*D] of it become, in place, gradients of what it was made
  /// from. Unit: dq = (dq' - q' <q', dq'>) / |q|.
  virtual void qk_transform_backward(const QkTransform& transformed, const Tensor& gradients) = 0;
  virtual void head_norm_forward(const HeadNorm& a) = 0;
  virtual void head_norm_backward(const HeadNormBackward& a) = 0;
  virtual void output_gate_forward(const OutputGate& a) = 0;
  virtual void output_gate_backward(const OutputGateBackward& a) = 0;
  virtual void classifier(const Classifier& a) = 0;
  /// y = gelu(x). On a GPU linear_forward's own gelu may read the product before it is rounded to pre_activation: the same function, not the same
  /// bits.
  virtual void gelu(const Tensor& y, const Tensor& x) = 0;
  /// to[i] = a[i] + b[i]
  virtual void add(const Tensor& to, const Tensor& a, const Tensor& b) = 0;

  // -- attention
  virtual std::unique_ptr<DeviceTiles> upload_tiles(std::shared_ptr<const TileMap> tiles) = 0;
  virtual void attention_forward(const AttentionForward& a) = 0;
  virtual void attention_backward(const AttentionBackward& a) = 0;
  virtual void self_edge_forward(const SelfEdge& a) = 0;
  virtual void self_edge_backward(const SelfEdgeBackward& a) = 0;
  virtual void sinks_forward(const Sinks& a) = 0;
  virtual void sinks_backward(const SinksBackward& a) = 0;

  // -- sequences over several ranks
  virtual void move_rows(const MoveRows& a) = 0;
  /// out[n] = table[index[n]], all i32; 0 <= index[n] < table.numel().
  virtual void look_up(const Tensor& out, const Tensor& table, const Tensor& index) = 0;

  // -- generation with cached keys and values
  virtual void cache_append(const CacheAppend& a) = 0;
  /// On the CPU, and with a GPU's batch-invariant operations, bit for bit the row that attention_forward gives. Else the same up to the rounding of
  /// bf16: this rounds no weight.
  virtual void attention_decode(const AttentionDecode& a) = 0;

  // -- optimizer
  /// out [1] f64 += sum of x[i] over f32 x.
  virtual void add_sum(const Tensor& out, const Tensor& x) = 0;
  /// out [1] f64 += sum of x[i]^2 over f32 x.
  virtual void add_sum_of_squares(const Tensor& out, const Tensor& x) = 0;
  virtual void adamw(const AdamW& a) = 0;
  virtual void update_thresholds(const ThresholdUpdate& a) = 0;
};

/// The CPU backend. threads = 0: OMP_NUM_THREADS or all cores.
std::unique_ptr<Ops> make_cpu_ops(int threads = 0);

}  // namespace tessera
