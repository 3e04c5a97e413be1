#pragma once
// Launchers of the CUDA operations: what kernels/ops.h defines, on one stream. Each checks its descriptor (std::logic_error), launches, and
// throws std::runtime_error for what CUDA reports. None allocates, waits, or uses atomics on values; every sum has a fixed order.

#include <cuda_runtime_api.h>

#include <cstddef>

#include "kernels/ops.h"

namespace tessera::cuda {

/// What a launcher may use. `scratch` is free at the start of each operation; operations follow each other on `stream`.
struct Context {
  cudaStream_t stream = nullptr;
  int multiprocessors = 0;
  void* scratch = nullptr;  // 256-byte aligned
  std::size_t scratch_bytes = 0;
};

// norm.cu
void norm_forward(const Context& c, const NormForward& a);
void norm_backward(const Context& c, const NormBackward& a);  // scratch: norm_backward_scratch(width)
void head_norm_forward(const Context& c, const HeadNorm& a);
void head_norm_backward(const Context& c, const HeadNormBackward& a);  // scratch: norm_backward_scratch(heads x head size)
/// Blocks of norms, self edges and sinks that leave partial sums, at most, a tile of heads: two on each of an H100's 132 SMs. The same on every GPU.
inline constexpr int kPartialBlocks = 264;
std::size_t norm_backward_scratch(std::int64_t width);  // two partial sums a column and block
/// to [columns] += the sum over partials [count, columns], in a fixed order; with `second`, that of the count x columns behind them goes there.
void add_partial_sums(const Context& c, const float* partials, int count, int columns, float* to, float* second);

// qk_transform.cu
void qk_transform_forward(const Context& c, const QkTransform& a);
void qk_transform_backward(const Context& c, const QkTransform& transformed, const Tensor& gradients);

// self_edge.cu
void self_edge_forward(const Context& c, const SelfEdge& a);
void self_edge_backward(const Context& c, const SelfEdgeBackward& a);  // scratch: norm_backward_scratch(heads)

// sinks.cu
void sinks_forward(const Context& c, const Sinks& a);
void sinks_backward(const Context& c, const SinksBackward& a);  // scratch: norm_backward_scratch(heads x sinks x (head size + 1))

// embedding.cu
void embedding_forward(const Context& c, const Tensor& out, const Tensor& tokens, const Tensor& positions, const Tensor& wte, const Tensor& wpe);
void embedding_backward(const Context& c, const Tensor& dout, const Tensor& tokens, const Tensor& positions, const Tensor& dwte, const Tensor& dwpe);
std::size_t embedding_backward_scratch(std::int64_t rows);

// elementwise.cu
void convert(const Context& c, const Tensor& to, const Tensor& from);  // f32 and bf16, either way or the same
void add(const Context& c, const Tensor& to, const Tensor& a, const Tensor& b);
void gelu_forward(const Context& c, const Tensor& y, const Tensor& x);
void gelu_backward(const Context& c, const Tensor& dx, const Tensor& x);  // dx *= gelu'(x), both bf16
void output_gate_forward(const Context& c, const OutputGate& a);
void output_gate_backward(const Context& c, const OutputGateBackward& a);
void add_column_sums(const Context& c, const Tensor& to,
                     const Tensor& x);  // to [M] f32 += sum over rows of x [N, M] bf16; scratch: norm_backward_scratch(M)

// rows.cu
void move_rows(const Context& c, const MoveRows& a);
void look_up(const Context& c, const Tensor& out, const Tensor& table, const Tensor& index);

// optimizer.cu
void add_sum(const Context& c, const Tensor& out, const Tensor& x);             // scratch: 64 KiB
void add_sum_of_squares(const Context& c, const Tensor& out, const Tensor& x);  // scratch: 64 KiB
void adamw(const Context& c, const AdamW& a);
void update_thresholds(const Context& c, const ThresholdUpdate& a);

// classifier.cu: the part between the two matrix products
/// From logits [rows, V] bf16: losses and predictions (optional); with `gradient`, the logits become gradient_scale * dloss/dlogits.
/// Columns >= vocabulary are padding: their logits are ignored, their gradient is 0. A target of -1: loss and gradient 0.
void cross_entropy(const Context& c, const Tensor& logits, std::int64_t vocabulary, const Tensor& targets, const Tensor& losses,
                   const Tensor& predictions, bool gradient, float gradient_scale);

}  // namespace tessera::cuda
