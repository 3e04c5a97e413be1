// The CUDA operation set as a whole: memory, transfers, recorded work.

#include <atomic>
#include <chrono>
#include <new>
#include <thread>

#include "ops_cuda.h"

namespace tessera {
namespace {

using namespace cuda_test;

// -- without a GPU ----------------------------------------------------------------------------------------------------

TEST(CudaOps, SaysWhyThereIsNoGpu) {
  EXPECT_EQ(cuda_problem().empty(), has_gpu()) << cuda_problem();
  EXPECT_EQ(cuda_device_count() > 0, has_gpu());
  EXPECT_THROW(make_cuda_ops(1000), std::invalid_argument);
  EXPECT_THROW(make_cuda_ops(-1), std::invalid_argument);
  if (has_gpu()) return;
  try {
    make_cuda_ops(0);
    FAIL() << "made operations without a GPU";
  } catch (const std::invalid_argument& e) {
    EXPECT_NE(std::string(e.what()).find(cuda_problem()), std::string::npos) << e.what();
  }
}

TEST(CudaOps, AnotherDevicesOperationsHaveNoStream) {
  const std::unique_ptr<Ops> cpu = make_cpu_ops(1);
  EXPECT_THROW(cuda_stream(*cpu), std::logic_error);
  EXPECT_THROW(cuda_memory_used(*cpu), std::logic_error);
}

TEST(CudaOps, ThePlannedScratchServesEveryOperation) {
  for (const std::int64_t width : {8, 64, 1024, 4096, 16384}) {
    for (const std::int64_t rows : {1, 1000, 65536, 1 << 20}) {
      const std::size_t planned = scratch_bytes(DeviceKind::cuda, rows, width);
      EXPECT_GE(planned, cuda::norm_backward_scratch(width)) << width;
      EXPECT_GE(planned, cuda::embedding_backward_scratch(rows)) << rows;
      EXPECT_GE(planned, std::size_t{64} << 10);
    }
  }
}

// -- memory and transfers ---------------------------------------------------------------------------------------------

TEST(CudaOps, DescribesItsDevice) {
  TESSERA_NEEDS_GPU();
  EXPECT_EQ(gpu().kind(), DeviceKind::cuda);
  EXPECT_EQ(gpu().device_name().rfind("cuda 0 (", 0), 0u) << gpu().device_name();
  EXPECT_GE(gpu().peak_flops(), 0);
  EXPECT_GT(gpu().memory_available(), 0u);
}

TEST(CudaOps, AllocatesWhatItSaysAndRefusesMore) {
  TESSERA_NEEDS_GPU();
  EXPECT_THROW(gpu().allocate(std::size_t{1} << 50), std::bad_alloc);
  const std::size_t before = cuda_memory_used(gpu());
  constexpr std::size_t kBytes = std::size_t{256} << 20;
  void* p = gpu().allocate(kBytes);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(p) % 256, 0u);
  EXPECT_GE(cuda_memory_used(gpu()), before + kBytes);
  gpu().deallocate(p);
  EXPECT_LT(cuda_memory_used(gpu()), before + kBytes);
  gpu().synchronize();  // the refusal left no error behind
}

TEST(CudaOps, PrepareTakesThePlannedScratch) {
  TESSERA_NEEDS_GPU();
  const std::unique_ptr<Ops> ops = make_cuda_ops(0);
  const std::size_t before = cuda_memory_used(*ops), planned = scratch_bytes(DeviceKind::cuda, 1 << 20, 16384);
  constexpr std::size_t kGranularity = 4 << 20;
  ops->prepare(1 << 20, 16384);
  EXPECT_NEAR(static_cast<double>(cuda_memory_used(*ops) - before), static_cast<double>(planned), kGranularity);
  ops->prepare(1000, 64);  // less: nothing to do
  EXPECT_NEAR(static_cast<double>(cuda_memory_used(*ops) - before), static_cast<double>(planned), kGranularity);
}

TEST(CudaOps, UploadsLeaveTheHostsMemoryFree) {
  TESSERA_NEEDS_GPU();
  for (const std::int64_t count : {1, 3, 65536, 65537, 6'000'001}) {  // the last is larger than what may be on its way
    std::vector<std::int32_t> host(count), back(count);
    for (std::int64_t i = 0; i < count; ++i) host[i] = static_cast<std::int32_t>(i * 2654435761u);
    const std::vector<std::int32_t> wanted = host;
    const OnDevice t(DType::i32, {count});
    gpu().upload(t, host.data());
    std::fill(host.begin(), host.end(), -1);
    gpu().download(back.data(), t);
    EXPECT_TRUE(back == wanted) << count;
    t.bytes();  // nothing behind it was written
  }
}

TEST(CudaOps, UploadsDoNotWaitForEarlierWork) {
  TESSERA_NEEDS_GPU();
  constexpr int kUploads = 48;
  const OnDevice t(DType::i32, {kUploads});
  struct Gate {
    std::atomic<bool> open = false, timed_out = false;
  } gate;
  const auto hold = [](void* p) {
    auto* g = static_cast<Gate*>(p);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (!g->open && std::chrono::steady_clock::now() < deadline) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    g->timed_out = !g->open;
  };
  TESSERA_CUDA_CHECK(cudaLaunchHostFunc(cuda_stream(gpu()), hold, &gate));
  for (std::int32_t i = 0; i < kUploads; ++i) gpu().upload(t.tensor().slice(i, 1), &i);
  gate.open = true;
  std::vector<std::int32_t> back(kUploads), wanted(kUploads);
  gpu().download(back.data(), t);
  for (int i = 0; i < kUploads; ++i) wanted[i] = i;
  EXPECT_EQ(back, wanted);
  EXPECT_FALSE(gate.timed_out);
}

TEST(CudaOps, CopiesConvertAndZeroClears) {
  TESSERA_NEEDS_GPU();
  constexpr std::int64_t kCount = 100'003;
  const Doubles values = random_f32(kCount, 1, 100);
  const OnDevice from(DType::f32, {kCount}, values), narrow(DType::bf16, {kCount}), wide(DType::f32, {kCount}), same(DType::f32, {kCount});
  gpu().copy(narrow, from);
  gpu().copy(wide, narrow);
  gpu().copy(same, from);
  EXPECT_TRUE(narrow.doubles() == bf16(values));
  EXPECT_TRUE(wide.doubles() == bf16(values));
  EXPECT_TRUE(same.doubles() == values);
  gpu().copy(narrow.tensor().slice(3, 1001), from.tensor().slice(5, 1001));  // off every boundary
  Doubles shifted = bf16(values);
  for (int i = 0; i < 1001; ++i) shifted[3 + i] = bf16(values[5 + i]);
  EXPECT_TRUE(narrow.doubles() == shifted);
  gpu().zero(wide.tensor().slice(7, 50'000));
  Doubles cleared = bf16(values);
  std::fill(cleared.begin() + 7, cleared.begin() + 50'007, 0.0);
  EXPECT_TRUE(wide.doubles() == cleared);
  EXPECT_THROW(gpu().copy(wide, narrow.tensor().slice(0, 5)), std::logic_error);
  EXPECT_THROW(gpu().copy(wide, OnDevice(DType::i32, {kCount})), std::logic_error);
}

// -- recorded work ----------------------------------------------------------------------------------------------------

TEST(CudaOps, RecordedWorkRunsWhenReplayed) {
  TESSERA_NEEDS_GPU();
  constexpr std::int64_t kRows = 200, kWidth = 64;
  const Doubles x = random_i32(kRows * kWidth, -3, 3, 1), dy = random_i32(kRows * kWidth, -3, 3, 2);  // whole numbers: every sum is exact
  const OnDevice dev_x(DType::bf16, {kRows, kWidth}, x), dev_dy(DType::bf16, {kRows, kWidth}, dy);
  const OnDevice dw(DType::f32, {kWidth, kWidth}, Doubles(kWidth * kWidth, 0)), dbias(DType::f32, {kWidth}, Doubles(kWidth, 0));
  gpu().prepare(kRows, kWidth);
  const auto work = gpu().record([&] { gpu().linear_backward({.dy = dev_dy, .x = dev_x, .dw = dw, .dbias = dbias}); });
  ASSERT_NE(work, nullptr);
  EXPECT_EQ(dbias.doubles(), Doubles(kWidth, 0)) << "recording ran the work";
  for (int i = 0; i < 2; ++i) work->replay();
  gpu().prepare(1 << 22, 1 << 16);  // outgrows the scratch memory that the recording knows
  work->replay();
  Doubles wanted_dw(kWidth * kWidth, 0), wanted_dbias(kWidth, 0);
  for (std::int64_t n = 0; n < kRows; ++n) {
    for (std::int64_t i = 0; i < kWidth; ++i) {
      wanted_dbias[i] += 3 * dy[n * kWidth + i];
      for (std::int64_t j = 0; j < kWidth; ++j) wanted_dw[i * kWidth + j] += 3 * dy[n * kWidth + i] * x[n * kWidth + j];
    }
  }
  EXPECT_EQ(dw.doubles(), wanted_dw);
  EXPECT_EQ(dbias.doubles(), wanted_dbias);
}

TEST(CudaOps, ARecordingThatFailsLeavesNothingBehind) {
  TESSERA_NEEDS_GPU();
  const OnDevice a(DType::bf16, {64}, Doubles(64, 1)), b(DType::bf16, {64}, Doubles(64, 2)), sum(DType::bf16, {64});
  struct Unusual {};
  EXPECT_THROW(gpu().record([&] {
    gpu().add(sum, a, b);
    throw Unusual{};
  }),
               Unusual);
  std::int32_t host = 0;
  const OnDevice number(DType::i32, {1});
  EXPECT_THROW(gpu().record([&] { gpu().upload(number, &host); }), std::logic_error);
  EXPECT_THROW(gpu().record([&] { gpu().download(&host, number); }), std::logic_error);
  EXPECT_THROW(gpu().record([&] { gpu().synchronize(); }), std::logic_error);
  EXPECT_THROW(gpu().record([&] { gpu().allocate(64); }), std::logic_error);
  EXPECT_THROW(gpu().record([&] { gpu().record([] {}); }), std::logic_error);
  EXPECT_THROW(gpu().record([&] { gpu().prepare(1 << 24, 1 << 17); }), std::logic_error);
  gpu().add(sum, a, b);
  EXPECT_EQ(sum.doubles(), Doubles(64, 3));
}

}  // namespace
}  // namespace tessera
