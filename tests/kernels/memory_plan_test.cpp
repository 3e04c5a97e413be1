#include "kernels/memory_plan.h"

#include <gtest/gtest.h>

#include <map>

#include "kernels/ops.h"

namespace tessera {
namespace {

/// The CPU's memory with a limit, or with an allocator that fails on the second call, and a record of what is allocated. A plan calls nothing else.
class PlanOps final : public Ops {
 public:
  explicit PlanOps(std::size_t available, bool refuse = false) : available_(available), refuse_(refuse) {}
  const std::map<void*, std::size_t>& live() const { return live_; }

  DeviceKind kind() const override { return DeviceKind::cpu; }
  std::string device_name() const override { return "test device"; }
  std::size_t memory_available() const override { return available_; }
  double peak_flops() const override { return 0; }
  void* allocate(std::size_t bytes) override {
    if (refuse_ && !live_.empty()) throw std::bad_alloc();
    void* p = cpu_->allocate(bytes);
    std::fill_n(static_cast<char*>(p), bytes, '\x55');
    live_[p] = bytes;
    return p;
  }
  void deallocate(void* p) noexcept override {
    live_.erase(p);
    cpu_->deallocate(p);
  }
  void zero(const Tensor& t) override { cpu_->zero(t); }

  void upload(const Tensor&, const void*) override { unused(); }
  void download(void*, const Tensor&) override { unused(); }
  void copy(const Tensor&, const Tensor&) override { unused(); }
  void synchronize() override { unused(); }
  void embedding_forward(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&) override { unused(); }
  void embedding_backward(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&) override { unused(); }
  void norm_forward(const NormForward&) override { unused(); }
  void norm_backward(const NormBackward&) override { unused(); }
  void linear_forward(const LinearForward&) override { unused(); }
  void linear_backward(const LinearBackward&) override { unused(); }
  void qk_transform_forward(const QkTransform&) override { unused(); }
  void qk_transform_backward(const QkTransform&, const Tensor&) override { unused(); }
  void head_norm_forward(const HeadNorm&) override { unused(); }
  void head_norm_backward(const HeadNormBackward&) override { unused(); }
  void output_gate_forward(const OutputGate&) override { unused(); }
  void output_gate_backward(const OutputGateBackward&) override { unused(); }
  void classifier(const Classifier&) override { unused(); }
  void gelu(const Tensor&, const Tensor&) override { unused(); }
  void add(const Tensor&, const Tensor&, const Tensor&) override { unused(); }
  std::unique_ptr<DeviceTiles> upload_tiles(std::shared_ptr<const TileMap>) override { return nullptr; }
  void attention_forward(const AttentionForward&) override { unused(); }
  void attention_backward(const AttentionBackward&) override { unused(); }
  void self_edge_forward(const SelfEdge&) override { unused(); }
  void self_edge_backward(const SelfEdgeBackward&) override { unused(); }
  void sinks_forward(const Sinks&) override { unused(); }
  void sinks_backward(const SinksBackward&) override { unused(); }
  void move_rows(const MoveRows&) override { unused(); }
  void look_up(const Tensor&, const Tensor&, const Tensor&) override { unused(); }
  void cache_append(const CacheAppend&) override { unused(); }
  void attention_decode(const AttentionDecode&) override { unused(); }
  void add_sum(const Tensor&, const Tensor&) override { unused(); }
  void add_sum_of_squares(const Tensor&, const Tensor&) override { unused(); }
  void adamw(const AdamW&) override { unused(); }
  void update_thresholds(const ThresholdUpdate&) override { unused(); }

 private:
  static void unused() { FAIL() << "a memory plan does not call this"; }
  std::size_t available_;
  bool refuse_;
  std::map<void*, std::size_t> live_;
  std::unique_ptr<Ops> cpu_ = make_cpu_ops();
};

constexpr std::size_t kPlenty = std::size_t{1} << 40;

TEST(MemoryPlan, CountsBeforeItAllocates) {
  PlanOps ops(kPlenty);
  MemoryPlan plan;
  const auto a = plan.reserve(MemoryCategory::parameters, "a", DType::f32, {3, 5});
  const auto b = plan.reserve(MemoryCategory::activations, "b", DType::f64, {100});
  const auto c = plan.reserve(MemoryCategory::parameters, "c", DType::bf16, {129});
  EXPECT_EQ(plan.bytes(MemoryCategory::parameters), 256u + 512u);
  EXPECT_EQ(plan.bytes(MemoryCategory::activations), 1024u);
  EXPECT_EQ(plan.bytes(MemoryCategory::workspace), 0u);
  EXPECT_EQ(plan.total_bytes(), 256u + 512u + 1024u);
  ASSERT_EQ(plan.blocks().size(), 3u);
  EXPECT_EQ(plan.blocks()[2].name, "c");
  EXPECT_EQ(plan.blocks()[2].offset, 256u);
  EXPECT_FALSE(plan.allocated());
  EXPECT_THROW(plan[a], std::logic_error);

  plan.allocate(ops);
  EXPECT_TRUE(plan.allocated());
  EXPECT_EQ(ops.live().size(), 2u);
  std::size_t allocated = 0;
  for (const auto& [p, bytes] : ops.live()) allocated += bytes;
  EXPECT_EQ(allocated, plan.total_bytes());  // the prediction is the fact

  EXPECT_EQ(plan[a].shape, (Shape{3, 5}));
  EXPECT_EQ(plan[b].dtype, DType::f64);
  EXPECT_EQ(static_cast<char*>(plan[c].data) - static_cast<char*>(plan[a].data), 256);
  for (const auto slot : {a, b, c}) {
    const Tensor t = plan[slot];
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(t.data) % MemoryPlan::kAlignment, 0u);
    for (std::size_t i = 0; i < t.bytes(); ++i) ASSERT_EQ(static_cast<char*>(t.data)[i], 0);
  }
}

TEST(MemoryPlan, GivesEverythingBack) {
  PlanOps ops(kPlenty);
  {
    MemoryPlan plan;
    plan.reserve(MemoryCategory::gradients, "a", DType::f32, {1000});
    plan.allocate(ops);
    EXPECT_EQ(ops.live().size(), 1u);
  }
  EXPECT_TRUE(ops.live().empty());
}

TEST(MemoryPlan, TakesNoMoreThanItsShare) {
  PlanOps ops(kPlenty);
  MemoryPlan plan;
  plan.reserve(MemoryCategory::gradients, "a", DType::f32, {1024});
  EXPECT_THROW(plan.allocate(ops, 4095), std::runtime_error);
  EXPECT_TRUE(ops.live().empty());
  plan.allocate(ops, 4096);
  EXPECT_TRUE(plan.allocated());
}

// What others allocate counts towards the limit and is allocated by nobody here.
TEST(MemoryPlan, CountsWhatOthersAllocate) {
  PlanOps ops(kPlenty);
  MemoryPlan plan;
  const auto a = plan.reserve(MemoryCategory::workspace, "a", DType::f32, {64});
  plan.account(MemoryCategory::workspace, "lists", 1000);
  plan.account(MemoryCategory::communication, "library", 5000);
  plan.account(MemoryCategory::workspace, "nothing", 0);
  const auto b = plan.reserve(MemoryCategory::workspace, "b", DType::f32, {64});
  EXPECT_EQ(plan.bytes(MemoryCategory::workspace), 1512u);
  EXPECT_EQ(plan.bytes(MemoryCategory::communication), 5000u);
  EXPECT_EQ(plan.total_bytes(), 6512u);
  EXPECT_THROW(plan.allocate(ops, 6511), std::runtime_error);
  EXPECT_TRUE(ops.live().empty());
  plan.allocate(ops, 6512);
  ASSERT_EQ(ops.live().size(), 1u);
  EXPECT_EQ(ops.live().begin()->second, 512u);
  EXPECT_EQ(static_cast<char*>(plan[b].data) - static_cast<char*>(plan[a].data), 256);
  EXPECT_THROW(plan.account(MemoryCategory::workspace, "late", 1), std::logic_error);

  MemoryPlan large;
  large.account(MemoryCategory::workspace, "half", std::size_t{1} << 62);
  EXPECT_THROW(large.account(MemoryCategory::gradients, "other half", std::size_t{1} << 62), std::invalid_argument);
  EXPECT_THROW(large.reserve(MemoryCategory::gradients, "other half", DType::f32, {1LL << 60}), std::invalid_argument);
  EXPECT_THROW(large.account(MemoryCategory::gradients, "more than all", ~std::size_t{0}), std::invalid_argument);
}

TEST(MemoryPlan, TooLittleMemoryIsAnErrorThatListsEveryCategory) {
  for (const bool refuse : {false, true}) {  // the device says so, or it finds out
    PlanOps ops(refuse ? kPlenty : 5000, refuse);
    MemoryPlan plan;
    plan.reserve(MemoryCategory::parameters, "a", DType::f32, {1024});
    plan.reserve(MemoryCategory::optimizer, "b", DType::f32, {2048});
    try {
      plan.allocate(ops);
      FAIL() << "no error";
    } catch (const std::runtime_error& e) {
      const std::string text = e.what();
      for (const char* part :
           {"test device", "12288", "4096", "8192", "parameters", "gradients", "optimizer", "activations", "workspace", "communication"}) {
        EXPECT_NE(text.find(part), std::string::npos) << part << " in " << text;
      }
    }
    EXPECT_FALSE(plan.allocated());
    EXPECT_TRUE(ops.live().empty());
  }
}

TEST(MemoryPlan, MisuseIsRefused) {
  PlanOps ops(kPlenty);
  MemoryPlan plan;
  EXPECT_THROW(plan.reserve(MemoryCategory::workspace, "negative", DType::f32, {-1}), std::logic_error);
  EXPECT_THROW(plan.reserve(MemoryCategory::workspace, "huge", DType::f32, {1LL << 40, 1LL << 40}), std::invalid_argument);
  const auto reserve = [&] { plan.reserve(MemoryCategory::workspace, "large", DType::f32, {1LL << 60}); };
  EXPECT_NO_THROW(reserve());
  EXPECT_THROW(reserve(), std::invalid_argument);  // each fits, the sum does not
  MemoryPlan good;
  const auto empty = good.reserve(MemoryCategory::workspace, "empty", DType::f32, {0, 5});
  good.allocate(ops);
  EXPECT_FALSE(good[empty]);
  EXPECT_THROW(good.reserve(MemoryCategory::workspace, "late", DType::f32, {1}), std::logic_error);
  EXPECT_THROW(good.allocate(ops), std::logic_error);
  EXPECT_THROW(good[7], std::logic_error);
  EXPECT_THROW(good[-1], std::logic_error);
}

}  // namespace
}  // namespace tessera
