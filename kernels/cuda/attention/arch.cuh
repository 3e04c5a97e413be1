#pragma once
// The machine: barriers, copies and matrix products as device functions, in two forms behind one shape.
//
//   portable (sm_80 and later)   cp.async into shared memory, ldmatrix, mma.sync.m16n8k16
//   Hopper   (sm_90a)            the tensor copy engine (TMA), wgmma.m64n64k16
//
// Both keep a tile (64 x 64 bf16, 8 KiB) in shared memory in the same form: rows of 128 bytes whose 16-byte chunks are
// permuted by chunk ^= row % 8 (what TMA and wgmma call the 128-byte swizzle), and both give a warp of a warpgroup rows
// 16w .. 16w+15 of a 64-row product, laid out over its lanes alike: thread (lane) holds rows lane/4 and lane/4 + 8 and
// columns 8j + 2 (lane%4) + {0, 1}. So everything between two products is written once.

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TESSERA_SM90A 1
#endif

namespace tessera::cuda_attention {

using bf16 = __nv_bfloat16;

constexpr int kTile = 64;         // queries and keys of a tile
constexpr int kTileBytes = 8192;  // 64 x 64 bf16
constexpr int kWarpgroup = 128;   // threads that own a 64-row product

/// Threads of a block of `groups` consumer warpgroups and a producer warp. Hopper's producer is a whole warpgroup, so that it can hand
/// registers over (one odd warp would cost as many: registers are dealt to the four quarters of a multiprocessor).
constexpr int threads_of(int groups, bool hopper) { return groups * kWarpgroup + (hopper ? kWarpgroup : 32); }

using Acc = float[8][4];      // a warp's share of a 64 x 64 fp32 product
using Frag = uint32_t[4][4];  // a warp's share of a 64 x 64 bf16 left operand: four steps of 16 columns

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Shared memory is addressed by its 32-bit address throughout, laid out by constants: through pointers the compiler works the address out anew
// at every use.

/// The same value, no longer known to the compiler: it stays in a register instead of being worked out again.
template <class T>
__device__ __forceinline__ T kept(T v) {
  if constexpr (sizeof(T) == 8)
    asm volatile("" : "+l"(v));
  else
    asm volatile("" : "+r"(v));
  return v;
}
__device__ __forceinline__ float kept_float(float v) {
  asm volatile("" : "+f"(v));
  return v;
}
/// Lane 0's value, known to be the same in the whole warp.
__device__ __forceinline__ int uniform(int v) { return __shfl_sync(0xffffffffu, v, 0); }

__device__ __forceinline__ int2 load_shared2(uint32_t at) {
  int2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at) : "memory");
  return v;
}
__device__ __forceinline__ float4 load_shared4(uint32_t at) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(at) : "memory");
  return v;
}
__device__ __forceinline__ void store_shared2(uint32_t at, int x, int y) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(at), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void store_shared4(uint32_t at, int x, int y, int z, int w) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}

/// In one piece: the compiler cuts such a store where registers do not lie well.
__device__ __forceinline__ void store_global4(void* to, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}
/// 1 / x up to an ulp, in an instruction.
__device__ __forceinline__ float fast_reciprocal(float x) {
  float r;
  asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// -- Barriers (mbarrier) ---------------------------------------------------------------------------------------------
__device__ __forceinline__ void barrier_init(uint32_t bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t bar) {
  asm volatile("{ .reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [%0]; }" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint32_t bar, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
#else
  __trap();
#endif
}
__device__ __forceinline__ bool barrier_test(uint32_t bar, uint32_t parity) {
  uint32_t done;
#if __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(bar), "r"(parity)
               : "memory");
#else
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done)
               : "r"(bar), "r"(parity)
               : "memory");
#endif
  return done;
}
__device__ __forceinline__ void barrier_wait(uint32_t bar, uint32_t parity) {
  while (!barrier_test(bar, parity)) {
  }
}
/// Arrives once every cp.async of this thread so far has landed.
__device__ __forceinline__ void barrier_arrive_after_copies(uint32_t bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}
template <int Registers>
__device__ __forceinline__ void more_registers() {
#ifdef TESSERA_SM90A
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}
template <int Registers>
__device__ __forceinline__ void fewer_registers() {
#ifdef TESSERA_SM90A
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}
/// Programmatic dependent launch (Hopper path only; kernels.h: Start::early). The calling thread waits until the kernel before is through and what it
/// wrote can be read. Returns at once in a kernel that started after the one before.
__device__ __forceinline__ void await_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/// The next kernel's blocks may start where there is room, once a thread of every block of this kernel has called this or the block has ended.
/// Nothing that this kernel writes is promised to them.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
/// Registers of a consumer thread: what 65,536 leave after a producer warpgroup of 24 or 32 each.
constexpr int consumer_registers(int groups) { return groups == 2 ? 240 : 160; }
constexpr int producer_registers(int groups) { return groups == 2 ? 24 : 32; }

/// Of the 128 threads of consumer `warpgroup`: does any hold p?
__device__ __forceinline__ bool warpgroup_any(bool p, int warpgroup) {
  uint32_t any;
  asm volatile("{ .reg .pred a, b; setp.ne.u32 a, %1, 0; barrier.cta.red.or.pred b, %2, 128, a; selp.u32 %0, 1, 0, b; }"
               : "=r"(any)
               : "r"(static_cast<uint32_t>(p)), "r"(warpgroup + 1)
               : "memory");
  return __any_sync(0xffffffffu, any);  // known to be the same in the whole warp
}

// -- Copies into shared memory ---------------------------------------------------------------------------------------
__device__ __forceinline__ void copy_async16(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
/// Box of 64 columns x 64 rows at (column, row, head, batch) of a [B, H, T, D] tensor; rows past the end arrive as zeros.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, uint32_t bar, int column, int row, int head, int batch) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to), "l"(map),
               "r"(bar), "r"(column), "r"(row), "r"(head), "r"(batch)
               : "memory");
#else
  __trap();
#endif
}
/// Before shared memory that this thread has read goes back to the copy engine: its reads, which may still be under way, come first. Reads of
/// products (wgmma) need none, nor do reads whose values have been used.
__device__ __forceinline__ void reads_before_copies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t bar) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(bar)
               : "memory");
#else
  __trap();
#endif
}

// -- Matrix products -------------------------------------------------------------------------------------------------
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ float low_of(uint32_t v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high_of(uint32_t v) { return __uint_as_float(v & 0xffff0000u); }

/// A warp's left-operand fragment of its 16 rows of a tile.
__device__ __forceinline__ void load_fragment(Frag& a, uint32_t tile, int warp, int lane) {
  const int row = warp * 16 + (lane & 15);
#pragma unroll
  for (int kk = 0; kk < 4; ++kk) {
    const uint32_t at = tile + row * 128 + (((kk * 2 + (lane >> 4)) ^ (row & 7)) << 4);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[kk][0]), "=r"(a[kk][1]), "=r"(a[kk][2]), "=r"(a[kk][3])
                 : "r"(at)
                 : "memory");
  }
}

/// Two ones in bf16.
constexpr uint32_t kOnes = 0x3f803f80;
/// Shared memory that Product<true>::multiply_summing reads: all ones.
constexpr uint32_t kOnesBytes = 2048;
/// By the whole block, before the __syncthreads() behind which products read it.
__device__ __forceinline__ void fill_ones(uint32_t at) {
  for (uint32_t n = 8 * threadIdx.x; n < kOnesBytes; n += 8 * blockDim.x) store_shared2(at + n, kOnes, kOnes);
  reads_before_copies();  // what reads it is in the copy engine's proxy
}

template <bool Hopper>
struct Product;

/// c (+)= a b: `right` is a tile whose rows are the columns of the product (Transposed = false: k_j as rows gives q k^T) or
/// whose rows are the summed index (Transposed = true: v_j as rows gives a v).
template <>
struct Product<false> {
  template <bool Transposed, bool Clear = false>
  static __device__ __forceinline__ void multiply(Acc& c, const Frag& a, uint32_t right, int lane) {
    if constexpr (Clear) {
#pragma unroll
      for (int j = 0; j < 8; ++j) c[j][0] = c[j][1] = c[j][2] = c[j][3] = 0.f;
    }
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) {
#pragma unroll
      for (int nn = 0; nn < 4; ++nn) {
        uint32_t b[4];
        if constexpr (Transposed) {
          const int row = kk * 16 + (lane & 15);
          const uint32_t at = right + row * 128 + (((nn * 2 + (lane >> 4)) ^ (row & 7)) << 4);
          asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                       : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                       : "r"(at)
                       : "memory");
        } else {
          const int row = nn * 16 + (lane >> 4) * 8 + (lane & 7);
          const uint32_t at = right + row * 128 + (((kk * 2 + ((lane >> 3) & 1)) ^ (row & 7)) << 4);
          asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                       : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                       : "r"(at)
                       : "memory");
        }
        mma(c[2 * nn], a[kk], b[0], b[1]);
        mma(c[2 * nn + 1], a[kk], b[2], b[3]);
      }
    }
  }
  /// c += a b as multiply<true>, and sums += the sums of a's rows: [0] = [1] of row lane/4, [2] = [3] of row lane/4 + 8. They are a product with a
  /// column of ones.
  static __device__ __forceinline__ void multiply_summing(Acc& c, float (&sums)[4], const Frag& a, uint32_t right, uint32_t, int lane) {
    multiply<true>(c, a, right, lane);
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) mma(sums, a[kk], kOnes, kOnes);
  }
  /// The same with the left operand in shared memory (rows of its tile are rows of the product).
  template <bool Clear>
  static __device__ __forceinline__ void multiply_shared(Acc& c, uint32_t left, uint32_t right, int warp, int lane) {
    Frag a;
    load_fragment(a, left, warp, lane);
    multiply<false, Clear>(c, a, right, lane);
  }
  static __device__ __forceinline__ void begin() {}
  static __device__ __forceinline__ void commit() {}
  template <int Pending>
  static __device__ __forceinline__ void wait() {}
  static __device__ __forceinline__ void settle(Acc&) {}
  static __device__ __forceinline__ void settle(float (&)[4]) {}

 private:
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

#define TESSERA_ACC(c)                                                                                                                       \
  "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]),     \
      "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), \
      "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), \
      "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])
#define TESSERA_ACC_OUT(c)                                                                                                                   \
  "=f"(c[0][0]), "=f"(c[0][1]), "=f"(c[0][2]), "=f"(c[0][3]), "=f"(c[1][0]), "=f"(c[1][1]), "=f"(c[1][2]), "=f"(c[1][3]), "=f"(c[2][0]),     \
      "=f"(c[2][1]), "=f"(c[2][2]), "=f"(c[2][3]), "=f"(c[3][0]), "=f"(c[3][1]), "=f"(c[3][2]), "=f"(c[3][3]), "=f"(c[4][0]), "=f"(c[4][1]), \
      "=f"(c[4][2]), "=f"(c[4][3]), "=f"(c[5][0]), "=f"(c[5][1]), "=f"(c[5][2]), "=f"(c[5][3]), "=f"(c[6][0]), "=f"(c[6][1]), "=f"(c[6][2]), \
      "=f"(c[6][3]), "=f"(c[7][0]), "=f"(c[7][1]), "=f"(c[7][2]), "=f"(c[7][3])
#define TESSERA_ACC_NAMES                                                                                                               \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, " \
  "%28, %29, %30, %31}"
#define TESSERA_ACC_NAMES_72                                                                                                            \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, " \
  "%28, %29, %30, %31, %32, %33, %34, %35}"

/// Asynchronous: begin() before the first of a set, commit() after it, wait<n>() until at most the n latest sets are under way.
/// Operands in registers and shared memory stay untouched until then.
template <>
struct Product<true> {
  // Matrix descriptor: address / 16, leading and stride offsets / 16, 128-byte swizzle. Groups of 8 rows are 1024 bytes apart
  // whether rows are the summed index or not; a tile is one swizzle atom wide, so the leading offset is used by multiply_summing alone.
  // The address sits in the low word, so that a step along the summed index is one 32-bit addition.
  static __device__ __forceinline__ uint32_t descriptor(uint32_t address) { return ((address & 0x3ffff) >> 4) | (1u << 16); }
  static __device__ __forceinline__ uint64_t whole(uint32_t low) {
    constexpr uint32_t kHigh = (1024 >> 4) | (1u << 30);
    return static_cast<uint64_t>(kHigh) << 32 | low;
  }
  // A product that starts from zero names its accumulators as outputs alone: were they inputs too, moving old values in would
  // make the compiler wait for everything under way.
  template <bool Transposed, bool Clear = false>
  static __device__ __forceinline__ void multiply(Acc& c, const Frag& a, uint32_t right, int) {
#ifdef TESSERA_SM90A
    const uint32_t base = descriptor(right);
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) {
      const uint64_t b = whole(base + kk * (Transposed ? 2048 >> 4 : 32 >> 4));
      if (Clear && kk == 0) {
        asm volatile("{ .reg .pred p; setp.ne.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " TESSERA_ACC_NAMES
                     ", {%32, %33, %34, %35}, %36, p, 1, 1, %37; }"
                     : TESSERA_ACC_OUT(c)
                     : "r"(a[kk][0]), "r"(a[kk][1]), "r"(a[kk][2]), "r"(a[kk][3]), "l"(b), "n"(Transposed ? 1 : 0));
      } else {
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " TESSERA_ACC_NAMES ", {%32, %33, %34, %35}, %36, 1, 1, 1, %37;"
                     : TESSERA_ACC(c)
                     : "r"(a[kk][0]), "r"(a[kk][1]), "r"(a[kk][2]), "r"(a[kk][3]), "l"(b), "n"(Transposed ? 1 : 0));
      }
    }
#else
    __trap();
#endif
  }
  /// See Product<false>. The right operand has 72 columns: after the 64 of `right`, leading offset away, eight of the ones at `ones`, which are
  /// behind it. Those are the same for each step along the summed index.
  static __device__ __forceinline__ void multiply_summing(Acc& c, float (&sums)[4], const Frag& a, uint32_t right, uint32_t ones, int) {
#ifdef TESSERA_SM90A
    const uint32_t base = ((right & 0x3ffff) >> 4) | ((ones - right) >> 4 << 16);
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) {
      const uint64_t b = whole(base + kk * ((2048 >> 4) - (2048 >> 4 << 16)));
      asm volatile("wgmma.mma_async.sync.aligned.m64n72k16.f32.bf16.bf16 " TESSERA_ACC_NAMES_72 ", {%36, %37, %38, %39}, %40, 1, 1, 1, 1;"
                   : TESSERA_ACC(c), "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                   : "r"(a[kk][0]), "r"(a[kk][1]), "r"(a[kk][2]), "r"(a[kk][3]), "l"(b));
    }
#else
    __trap();
#endif
  }
  template <bool Clear>
  static __device__ __forceinline__ void multiply_shared(Acc& c, uint32_t left, uint32_t right, int, int) {
#ifdef TESSERA_SM90A
    const uint32_t a = descriptor(left), b = descriptor(right);
#pragma unroll
    for (int kk = 0; kk < 4; ++kk) {
      if (Clear && kk == 0) {
        asm volatile("{ .reg .pred p; setp.ne.b32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " TESSERA_ACC_NAMES
                     ", %32, %33, p, 1, 1, 0, 0; }"
                     : TESSERA_ACC_OUT(c)
                     : "l"(whole(a)), "l"(whole(b)));
      } else {
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " TESSERA_ACC_NAMES ", %32, %33, 1, 1, 1, 0, 0;"
                     : TESSERA_ACC(c)
                     : "l"(whole(a + kk * 2)), "l"(whole(b + kk * 2)));
      }
    }
#else
    __trap();
#endif
  }
  static __device__ __forceinline__ void begin() {
#ifdef TESSERA_SM90A
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
  }
  static __device__ __forceinline__ void commit() {
#ifdef TESSERA_SM90A
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
  }
  template <int Pending>
  static __device__ __forceinline__ void wait() {
#ifdef TESSERA_SM90A
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
#endif
  }
  /// After wait: keeps the compiler from reading the accumulator earlier.
  static __device__ __forceinline__ void settle(Acc& c) { asm volatile("" : TESSERA_ACC(c)::"memory"); }
  static __device__ __forceinline__ void settle(float (&sums)[4]) {
    asm volatile("" : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])::"memory");
  }
};

__device__ __forceinline__ void clear(Acc& c) {
#pragma unroll
  for (int j = 0; j < 8; ++j) c[j][0] = c[j][1] = c[j][2] = c[j][3] = 0.f;
}

/// A warpgroup's own 64 rows in shared memory, left operand of q k^T and its like: c = sum over the D/64 parts of own rows times right rows.
template <bool Hopper, int Parts>
struct Left {
  uint32_t rows;
  __device__ __forceinline__ void multiply(Acc& c, uint32_t right, int warp, int lane) const {
    Product<Hopper>::template multiply_shared<true>(c, rows, right, warp, lane);
#pragma unroll
    for (int d = 1; d < Parts; ++d) Product<Hopper>::template multiply_shared<false>(c, rows + d * kTileBytes, right + d * kTileBytes, warp, lane);
  }
};

/// c[d] += a b, and sums += the sums of a's rows (Product::multiply_summing); kOnesBytes of ones lie behind b.
template <bool Hopper, int Parts>
__device__ __forceinline__ void accumulate_summing(Acc (&c)[Parts], float (&sums)[4], const Frag& a, uint32_t right, uint32_t ones, int lane) {
#pragma unroll
  for (int d = 0; d + 1 < Parts; ++d) Product<Hopper>::template multiply<true>(c[d], a, right + d * kTileBytes, lane);
  Product<Hopper>::multiply_summing(c[Parts - 1], sums, a, right + (Parts - 1) * kTileBytes, ones, lane);
}

/// c[d] += a b, a in registers, b's rows the summed index.
template <bool Hopper, int Parts>
__device__ __forceinline__ void accumulate(Acc (&c)[Parts], const Frag& a, uint32_t right, int lane) {
#pragma unroll
  for (int d = 0; d < Parts; ++d) Product<Hopper>::template multiply<true>(c[d], a, right + d * kTileBytes, lane);
}

}  // namespace tessera::cuda_attention
