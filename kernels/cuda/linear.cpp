#include "kernels/cuda/linear.h"

#include <fmt/format.h>

#include <algorithm>
#include <stdexcept>

#include "kernels/cuda/check.h"

namespace tessera::cuda {
namespace {

constexpr std::int64_t kServed[] = {1, 8, 4099, 32768};  // rows that a batch-invariant algorithm is tried for
constexpr std::uint32_t kAlignment = 16;                 // bytes, of every operand: checked here, promised to cuBLASLt

void check(cublasStatus_t s, const char* what) {
  if (s != CUBLAS_STATUS_SUCCESS) throw std::runtime_error(fmt::format("cuBLASLt, {}: {}", what, cublasLtGetStatusString(s)));
}

template <class T>
void set(cublasLtMatmulDescOpaque_t& operation, cublasLtMatmulDescAttributes_t attribute, T value) {
  check(cublasLtMatmulDescSetAttribute(&operation, attribute, &value, sizeof value), "describing a product");
}

template <class T>
void set(cublasLtMatmulPreferenceOpaque_t& preference, cublasLtMatmulPreferenceAttributes_t attribute, T value) {
  check(cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof value), "stating preferences");
}

template <class T>
T get(const cublasLtMatmulAlgo_t& algorithm, cublasLtMatmulAlgoConfigAttributes_t attribute) {
  T value{};
  std::size_t written = 0;
  cublasLtMatmulAlgoConfigGetAttribute(&algorithm, attribute, &value, sizeof value, &written);
  return value;
}

bool has_clusters(const cublasLtMatmulAlgo_t& algorithm) {
  return get<std::uint16_t>(algorithm, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID) > CUBLASLT_CLUSTER_SHAPE_1x1x1;
}

/// cuBLASLt's matrices are column-major: what it sees of a row-major [rows, columns] is [columns, rows].
cublasLtMatrixLayoutOpaque_t layout(DType type, std::int64_t rows, std::int64_t columns) {
  cublasLtMatrixLayoutOpaque_t l;
  check(cublasLtMatrixLayoutInit(&l, type == DType::f32 ? CUDA_R_32F : CUDA_R_16BF, static_cast<std::uint64_t>(columns),
                                 static_cast<std::uint64_t>(rows), columns),
        "describing a matrix");
  return l;
}

}  // namespace

Linear::Linear(LinearPolicy policy) : policy_(policy), workspace_(allocate_device(kWorkspaceBytes)) {
  if (policy_.batch_invariant) policy_.fuse_gelu_forward = false;
  cublasLtHandle_t handle = nullptr;
  check(cublasLtCreate(&handle), "starting");
  handle_.reset(handle);
}

// The transposed product to' = right' left' is asked for, whose column-major matrices are the row-major ones as they lie in memory.
std::unique_ptr<Linear::Plan> Linear::make_plan(const Product& p) {
  const Key& k = p.key;
  auto made = std::make_unique<Plan>();
  Plan& plan = *made;
  check(cublasLtMatmulDescInit(&plan.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), "describing a product");
  set(plan.operation, CUBLASLT_MATMUL_DESC_TRANSA, static_cast<std::int32_t>(k.right_transposed ? CUBLAS_OP_T : CUBLAS_OP_N));
  set(plan.operation, CUBLASLT_MATMUL_DESC_TRANSB, static_cast<std::int32_t>(k.left_transposed ? CUBLAS_OP_T : CUBLAS_OP_N));
  plan.first = k.right_transposed ? layout(DType::bf16, k.m, k.k) : layout(DType::bf16, k.k, k.m);
  plan.second = k.left_transposed ? layout(DType::bf16, k.k, k.n) : layout(DType::bf16, k.n, k.k);
  plan.to = layout(k.adds ? DType::f32 : DType::bf16, k.n, k.m);

  constexpr cublasLtEpilogue_t kEpilogues[] = {CUBLASLT_EPILOGUE_DEFAULT, CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_GELU_AUX,
                                               CUBLASLT_EPILOGUE_GELU_AUX_BIAS, CUBLASLT_EPILOGUE_DGELU};
  set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE, static_cast<std::uint32_t>(kEpilogues[static_cast<int>(k.epilogue)]));
  // cuBLASLt reads an alignment off these two addresses: the least that a call may bring. Each call then sets its own.
  void* const least_aligned = static_cast<char*>(workspace_.get()) + kAlignment;
  if (p.bias) set(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, least_aligned);
  if (p.argument) {
    if (k.m % 8 != 0) return made;  // the epilogue's demand on the matrix's stride
    set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, least_aligned);
    set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, k.m);
  }

  cublasLtMatmulPreferenceOpaque_t preference;
  check(cublasLtMatmulPreferenceInit(&preference), "stating preferences");
  set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<std::uint64_t>(kWorkspaceBytes));
  // A split sum goes through f32 partial sums in the workspace, added up by a second kernel: always in the same order.
  set(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, static_cast<std::uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  for (const auto operand : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                             CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
    set(preference, operand, kAlignment);

  if (for_any_rows(k))
    choose_for_any_rows(plan, preference, k);
  else
    choose(plan, preference, k);
  return made;
}

// Of the answers for kInvariantRows rows that do not split sums and serve few and many rows, the one that fills the GPU most: a few rows are bound by
// how many multiprocessors read the matrix. Every element is then one sum over the inner extent, a piece of the tile's depth at a time, whichever
// tile it falls into.
void Linear::choose_for_any_rows(Plan& plan, cublasLtMatmulPreferenceOpaque_t& preference, Key key) {
  key.n = 0;
  auto at = for_any_rows_.find(key);
  if (at == for_any_rows_.end()) {
    set(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, static_cast<std::uint32_t>(CUBLASLT_REDUCTION_SCHEME_NONE));
    cublasLtMatrixLayoutOpaque_t rows = layout(DType::bf16, kInvariantRows, key.k), to = layout(DType::bf16, kInvariantRows, key.m);
    std::vector<cublasLtMatmulHeuristicResult_t> answers(kInvariantAnswers);
    int found = 0;
    const cublasStatus_t s = cublasLtMatmulAlgoGetHeuristic(handle_.get(), &plan.operation, &plan.first, &rows, &to, &to, &preference,
                                                            static_cast<int>(answers.size()), answers.data(), &found);
    if (s != CUBLAS_STATUS_NOT_SUPPORTED && s != CUBLAS_STATUS_INVALID_VALUE) check(s, "choosing an algorithm");
    answers.resize(s == CUBLAS_STATUS_SUCCESS ? static_cast<std::size_t>(found) : 0);
    std::erase_if(answers, [](const auto& a) {
      return a.state != CUBLAS_STATUS_SUCCESS || get<std::int32_t>(a.algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM) > 1 ||
             get<std::uint32_t>(a.algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME) != CUBLASLT_REDUCTION_SCHEME_NONE;
    });
    std::erase_if(answers, [&](const auto& a) {
      return !std::all_of(std::begin(kServed), std::end(kServed), [&](std::int64_t n) {
        const cublasLtMatrixLayoutOpaque_t x = layout(DType::bf16, n, key.k), y = layout(DType::bf16, n, key.m);
        return serves(plan, a.algo, x, y).has_value();
      });
    });
    const auto most = std::max_element(answers.begin(), answers.end(), [](const auto& a, const auto& b) { return a.wavesCount < b.wavesCount; });
    if (most == answers.end()) return;
    at = for_any_rows_.emplace(key, most->algo).first;
  }
  const auto here = serves(plan, at->second, plan.second, plan.to);
  plan.found = here.has_value();
  if (here) plan.choice = *here;
  plan.choice.algo = at->second;
}

/// What an algorithm needs for a product with `second` into `to`, if it does that.
std::optional<cublasLtMatmulHeuristicResult_t> Linear::serves(const Plan& plan, const cublasLtMatmulAlgo_t& algorithm,
                                                              const cublasLtMatrixLayoutOpaque_t& second,
                                                              const cublasLtMatrixLayoutOpaque_t& to) const {
  auto operation = plan.operation;  // cuBLASLt takes what it does not change by pointers to what it may
  auto first = plan.first, between = second, into = to;
  cublasLtMatmulHeuristicResult_t result{};
  const cublasStatus_t s = cublasLtMatmulAlgoCheck(handle_.get(), &operation, &first, &between, &into, &into, &algorithm, &result);
  if (s != CUBLAS_STATUS_SUCCESS || result.workspaceSize > kWorkspaceBytes) return std::nullopt;
  return result;
}

bool Linear::for_any_rows(const Key& k) const {
  return policy_.batch_invariant && k.right_transposed && !k.left_transposed && !k.adds && k.epilogue <= Epilogue::bias;
}

// Of the answers that run in clusters of blocks, which are those written for Hopper or later:
//   short inner extent, many rows and columns   the one with the tile below. What is written then weighs as much as what is multiplied, and smaller
//                                               tiles write while others multiply; cuBLASLt ranks larger ones first. Measured on an H200 with 32,768
//                                               and 65,536 rows (tests/bench/RESULTS.md): 1.08 to 1.18 times the first answer's speed
//   any other with an activation in it          the first
// and where there is none, the first answer of all, as for all other products.
void Linear::choose(Plan& plan, cublasLtMatmulPreferenceOpaque_t& preference, const Key& key) const {
  const bool gelu = key.epilogue == Epilogue::gelu || key.epilogue == Epilogue::gelu_bias,
             activation = gelu || key.epilogue == Epilogue::gelu_backward;
  const bool wide = !key.adds && key.epilogue != Epilogue::gelu_backward && key.k <= 2048 && key.n >= 16384 && key.m >= 2048 && key.m <= 16384;
  const std::uint32_t tile = gelu ? CUBLASLT_MATMUL_TILE_128x128 : CUBLASLT_MATMUL_TILE_128x160;
  const bool first_of_all = policy_.answer < 0 && !wide && !activation;
  std::vector<cublasLtMatmulHeuristicResult_t> answers(static_cast<std::size_t>(first_of_all ? 1 : std::max(1, policy_.answers)));
  int found = 0;
  const cublasStatus_t s = cublasLtMatmulAlgoGetHeuristic(handle_.get(), &plan.operation, &plan.first, &plan.second, &plan.to, &plan.to, &preference,
                                                          static_cast<int>(answers.size()), answers.data(), &found);
  // An unsupported combination is an answer, in either of these forms; anything else is a failure.
  if (s != CUBLAS_STATUS_NOT_SUPPORTED && s != CUBLAS_STATUS_INVALID_VALUE) check(s, "choosing an algorithm");
  answers.resize(s == CUBLAS_STATUS_SUCCESS ? static_cast<std::size_t>(found) : 0);
  if (policy_.answer >= 0) {
    answers.erase(answers.begin(), answers.begin() + std::min<std::ptrdiff_t>(policy_.answer, std::ssize(answers)));
  } else if (!first_of_all) {
    const auto clustered = [&](const auto& a) {
      return a.state == CUBLAS_STATUS_SUCCESS && has_clusters(a.algo) && (!wide || get<std::uint32_t>(a.algo, CUBLASLT_ALGO_CONFIG_TILE_ID) == tile);
    };
    if (const auto at = std::find_if(answers.begin(), answers.end(), clustered); at != answers.end()) answers.erase(answers.begin(), at);
  }
  if (answers.empty()) return;
  plan.choice = answers.front();
  plan.found = plan.choice.state == CUBLAS_STATUS_SUCCESS;
}

bool Linear::try_run(const Context& c, const Product& p) {
  auto at = plans_.find(p.key);
  if (at == plans_.end()) {
    if (plans_.size() >= kMostPlans) plans_.clear();
    at = plans_.emplace(p.key, make_plan(p)).first;
  }
  Plan& plan = *at->second;
  if (!plan.found) return false;
  if (p.bias) set(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias);
  if (p.argument) set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, p.argument);
  const float one = 1, beta = p.key.adds || p.adds ? 1 : 0;
  check(cublasLtMatmul(handle_.get(), &plan.operation, &one, p.right, &plan.first, p.left, &plan.second, &beta, p.to, &plan.to, p.to, &plan.to,
                       &plan.choice.algo, workspace_.get(), kWorkspaceBytes, c.stream),
        "running a product");
  return true;
}

void Linear::run(const Context& c, const Product& p) {
  if (try_run(c, p)) return;
  if (for_any_rows(p.key) && p.key.m % 8 == 0 && p.key.k % 8 == 0)
    throw std::runtime_error(
        fmt::format("cuBLASLt has no algorithm without split sums that serves any number of rows of a product [{}, {}] x [{}, {}] here: "
                    "generation with the bits of the whole text's pass is not to be had on this GPU; take --fast",
                    p.key.n, p.key.k, p.key.k, p.key.m));
  throw std::logic_error(
      fmt::format("cuBLASLt has no algorithm for a product [{}, {}] x [{}, {}]: every extent but the rows of a batch must be a "
                  "multiple of 8",
                  p.key.n, p.key.k, p.key.k, p.key.m));
}

void Linear::multiply(const Context& c, std::int64_t n, std::int64_t m, std::int64_t k, Operand left, Operand right, void* to, DType type) {
  run(c, {.key = {n, m, k, left.transposed, right.transposed, type == DType::f32, Epilogue::none}, .left = left.data, .right = right.data, .to = to});
}

void Linear::forward(const Context& c, const LinearForward& a) {
  constexpr const char* kOp = "linear_forward";
  require(a.w.shape.rank == 2 && a.w.numel() > 0, kOp, "w must be a matrix");
  const std::int64_t m = a.w.shape[0], k = a.w.shape[1], n = a.x.numel() / k;
  require(n > 0, kOp, "x must have rows");
  Product p{.key = {n, m, k, false, true, false, a.bias ? Epilogue::bias : Epilogue::none},
            .left = bf16_elements(kOp, "x", a.x, n * k),
            .right = bf16_elements(kOp, "w", a.w, m * k),
            .to = bf16_elements(kOp, "y", a.y, n * m)};
  if (a.bias) p.bias = bf16_elements(kOp, "bias", a.bias, m);
  if (a.activation == Activation::none) return run(c, p);

  void* argument = bf16_elements(kOp, "pre_activation", a.pre_activation, n * m);
  if (policy_.fuse_gelu_forward) {
    Product fused = p;
    fused.key.epilogue = a.bias ? Epilogue::gelu_bias : Epilogue::gelu;
    fused.argument = argument;
    if (try_run(c, fused)) return;
  }
  p.to = argument;
  run(c, p);
  gelu_forward(c, a.y, a.pre_activation);
}

void Linear::backward(const Context& c, const LinearBackward& a) {
  constexpr const char* kOp = "linear_backward";
  const Tensor& shaped = a.dw ? a.dw : a.w;
  require(shaped.shape.rank == 2 && shaped.numel() > 0, kOp, "w (or dw) must be a matrix");
  const std::int64_t m = shaped.shape[0], k = shaped.shape[1], n = a.dy.numel() / m;
  require(n > 0, kOp, "dy must have rows");
  const void* dy = bf16_elements(kOp, "dy", a.dy, n * m);

  if (a.dx) {
    require(!a.add_dx || !a.gelu_argument, kOp, "gelu_argument with add_dx");
    const Product p{.key = {n, k, m, false, false, false, Epilogue::none},
                    .left = dy,
                    .right = bf16_elements(kOp, "w", a.w, m * k),
                    .to = bf16_elements(kOp, "dx", a.dx, n * k),
                    .adds = a.add_dx};
    if (a.gelu_argument) {
      Product fused = p;
      fused.key.epilogue = Epilogue::gelu_backward;
      fused.argument = bf16_elements(kOp, "gelu_argument", a.gelu_argument, n * k);
      if (!policy_.fuse_gelu_backward || !try_run(c, fused)) {
        run(c, p);
        gelu_backward(c, a.dx, a.gelu_argument);
      }
    } else {
      run(c, p);
    }
  }
  if (a.dw) {
    multiply(c, m, k, n, {dy, true}, {bf16_elements(kOp, "x", a.x, n * k), false}, elements<float>(kOp, "dw", a.dw, m * k), DType::f32);
  }
  if (a.dbias) add_column_sums(c, a.dbias, a.dy.view({n, m}));
}

std::vector<std::string> Linear::describe() const {
  constexpr const char* kNames[] = {"", " + bias", " gelu", " + bias gelu", " x gelu'"};
  std::vector<std::string> lines;
  for (const auto& [key, plan] : plans_) {
    std::string line = fmt::format("[{}, {}]{} x [{}, {}]{} -> {}{}: ", key.n, key.k, key.left_transposed ? "^T" : "", key.k, key.m,
                                   key.right_transposed ? "^T" : "", key.adds ? "f32, added" : "bf16", kNames[static_cast<int>(key.epilogue)]);
    if (plan->found) {
      const cublasLtMatmulAlgo_t& algo = plan->choice.algo;
      line += fmt::format("algorithm {}, tile {}, stages {}, cluster {}, split {} (scheme {}), {:.1f} MiB workspace, {:.2f} waves",
                          get<std::int32_t>(algo, CUBLASLT_ALGO_CONFIG_ID), get<std::uint32_t>(algo, CUBLASLT_ALGO_CONFIG_TILE_ID),
                          get<std::uint32_t>(algo, CUBLASLT_ALGO_CONFIG_STAGES_ID), get<std::uint16_t>(algo, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID),
                          get<std::int32_t>(algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM), get<std::uint32_t>(algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME),
                          static_cast<double>(plan->choice.workspaceSize) / (1 << 20), plan->choice.wavesCount);
    } else {
      line += "no algorithm";
    }
    lines.push_back(std::move(line));
  }
  return lines;
}

}  // namespace tessera::cuda
