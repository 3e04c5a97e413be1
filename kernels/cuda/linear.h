#pragma once
// Matrix products through cuBLASLt: linear layers with bias and GELU in the product's epilogue, and the fused classifier.
//
// bf16 in, f32 sums. What is written in bf16 is rounded once, also where it is added to (add_dx); gradients of weights are added to f32 inside the
// product (beta = 1).
// Gradients of biases are a kernel of their own (add_column_sums): cuBLASLt's epilogues for them overwrite, and these are added to.
// The algorithm of a product is one of cuBLASLt's answers for its shape (batch-invariant: without its rows), taken by its attributes: nothing is
// timed, and addresses do not matter beyond their 16-byte alignment, so a shape has the same bits in every run on the same kind of GPU. Sums split
// over the inner extent are added in f32 in a fixed order.

#include <cublasLt.h>

#include <compare>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/cuda/layers.h"
#include "kernels/cuda/memory.h"

namespace tessera::cuda {

/// Which activations go into the epilogue of their product (the others are kernels of their own), and which of cuBLASLt's answers is taken. Runs take
/// the default; the rest is for measurements.
struct LinearPolicy {
  bool fuse_gelu_forward = true, fuse_gelu_backward = true;
  /// Answers to look at, best first as cuBLASLt estimates; 1: the first is taken. Linear::choose() says which.
  int answers = 8;
  /// Not negative: this of the answers to any product (0: the first), and no algorithm where there are not so many.
  int answer = -1;
  /// Forward products take one algorithm whatever the number of rows, and no split sums, so that a row of y has the same bits alone and among others
  /// (batch invariance). GELU is then a kernel of its own.
  bool batch_invariant = false;
};

class Linear {
 public:
  static constexpr std::int64_t kInvariantRows = 64;    // for which batch-invariant products take their algorithm,
  static constexpr std::size_t kInvariantAnswers = 16;  // of so many answers
  /// Generation asks for products of every length up to the context: so many are remembered before all are forgotten and asked for again.
  static constexpr std::size_t kMostPlans = 1024;
  static constexpr std::size_t kWorkspaceBytes = std::size_t{32} << 20;  // what NVIDIA recommends for Hopper

  explicit Linear(LinearPolicy policy = {});

  void forward(const Context& c, const LinearForward& a);
  void backward(const Context& c, const LinearBackward& a);  // scratch: norm_backward_scratch(M) with dbias

  /// to [n, m] = left [n, k] right [k, m], all row-major: to is f32 and added to, or bf16 and overwritten. A transposed operand is
  /// stored as [k, n] or [m, k].
  struct Operand {
    const void* data;
    bool transposed;
  };
  void multiply(const Context& c, std::int64_t n, std::int64_t m, std::int64_t k, Operand left, Operand right, void* to, DType type);

  /// The products remembered: shape, epilogue, and what cuBLASLt chose. One line each.
  std::vector<std::string> describe() const;

 private:
  enum class Epilogue : std::uint8_t { none, bias, gelu, gelu_bias, gelu_backward };
  struct Key {
    std::int64_t n, m, k;
    bool left_transposed, right_transposed, adds;
    Epilogue epilogue;
    auto operator<=>(const Key&) const = default;
  };
  struct Product {
    Key key;
    const void *left, *right;
    void* to;
    const void* bias = nullptr;
    void* argument = nullptr;  // of the gelu: written by gelu and gelu_bias, read by gelu_backward
    bool adds = false;         // to a bf16 matrix; nothing that an algorithm depends on
  };
  struct Plan {
    cublasLtMatmulDescOpaque_t operation{};
    cublasLtMatrixLayoutOpaque_t first{}, second{}, to{};
    cublasLtMatmulHeuristicResult_t choice{};
    bool found = false;
  };
  struct Destroy {
    void operator()(cublasLtHandle_t h) const { cublasLtDestroy(h); }
  };

  std::unique_ptr<Plan> make_plan(const Product& p);
  /// Fills choice and found of a plan that is complete otherwise.
  void choose(Plan& plan, cublasLtMatmulPreferenceOpaque_t& preference, const Key& key) const;
  void choose_for_any_rows(Plan& plan, cublasLtMatmulPreferenceOpaque_t& preference, Key key);
  std::optional<cublasLtMatmulHeuristicResult_t> serves(const Plan& plan, const cublasLtMatmulAlgo_t& algorithm,
                                                        const cublasLtMatrixLayoutOpaque_t& second, const cublasLtMatrixLayoutOpaque_t& to) const;
  bool for_any_rows(const Key& k) const;
  /// False, with nothing done, where cuBLASLt has no algorithm.
  bool try_run(const Context& c, const Product& p);
  /// Throws std::logic_error there.
  void run(const Context& c, const Product& p);

  LinearPolicy policy_;
  std::unique_ptr<cublasLtContext, Destroy> handle_;
  DeviceMemory workspace_;
  std::map<Key, std::unique_ptr<Plan>> plans_;
  std::map<Key, cublasLtMatmulAlgo_t> for_any_rows_;  // keys without a number of rows
};

/// kernels/ops.h's Classifier, for as many rows at a time as the workspace holds.
void classifier(const Context& c, Linear& linear, const Classifier& a);

}  // namespace tessera::cuda
