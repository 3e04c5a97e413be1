#pragma once
// The CPU's operations by theme; ops.cpp gathers them, with attention.h, into the Ops interface. Arguments, shapes and definitions stand in
// kernels/ops.h. Every function throws std::logic_error for arguments of wrong shape or type, before it writes anything.

#include <filesystem>

#include "kernels/ops.h"

namespace tessera::cpu {

// embedding.cpp
void embedding_forward(const Tensor& out, const Tensor& tokens, const Tensor& positions, const Tensor& wte, const Tensor& wpe);
void embedding_backward(const Tensor& dout, const Tensor& tokens, const Tensor& positions, const Tensor& dwte, const Tensor& dwpe);

// norm.cpp
void norm_forward(const NormForward& a);
void norm_backward(const NormBackward& a);
void head_norm_forward(const HeadNorm& a);
void head_norm_backward(const HeadNormBackward& a);

// linear.cpp
void linear_forward(const LinearForward& a);
void linear_backward(const LinearBackward& a);
void gelu(const Tensor& y, const Tensor& x);

// qk_transform.cpp
void qk_transform_forward(const QkTransform& a);
void qk_transform_backward(const QkTransform& transformed, const Tensor& gradients);

// output_gate.cpp
void output_gate_forward(const OutputGate& a);
void output_gate_backward(const OutputGateBackward& a);

// self_edge.cpp
void self_edge_forward(const SelfEdge& a);
void self_edge_backward(const SelfEdgeBackward& a);

// sinks.cpp
void sinks_forward(const Sinks& a);
void sinks_backward(const SinksBackward& a);

// classifier.cpp
void classifier(const Classifier& a);

// optimizer.cpp
void add_sum(const Tensor& out, const Tensor& x);
void add_sum_of_squares(const Tensor& out, const Tensor& x);
void adamw(const AdamW& a);
void update_thresholds(const ThresholdUpdate& a);

// rows.cpp
void move_rows(const MoveRows& a);
void look_up(const Tensor& out, const Tensor& table, const Tensor& index);

// memory.cpp
/// Aligned to MemoryPlan::kAlignment; throws std::bad_alloc.
void* allocate(std::size_t bytes);
void deallocate(void* p) noexcept;
void copy(const Tensor& to, const Tensor& from);
void zero(const Tensor& t);
/// Bytes that this process may still get: the system's MemAvailable, or what is left below a control group's limit (v2 or v1) if that is
/// less. `root` is where /proc and /sys are found.
std::size_t memory_available(const std::filesystem::path& root = "/");

}  // namespace tessera::cpu
