#pragma once
// What all attention kernels share: their arguments, the ring of stages between the producer warp and the two or three consumer
// warpgroups of a block, and the walk of a band's tile list.
//
// A block works on bands, one at a time: two or three neighbouring tiles (query tiles in the forward and dq kernels, key tiles in the dk, dv kernel),
// one consumer warpgroup each, and the union of their lists is walked in ascending order, so that all share each load. Tiles that are not to be
// visited - outside the list, behind the document's start, or without an active edge in the forward pass - are dropped by the producer warp, 32 list
// entries at a time: ballot and popcount compact the list on the fly, nothing is stored and the host never learns its length.

#include "kernels/cuda/attention/arch.cuh"
#include "kernels/tiles.h"

namespace tessera::cuda_attention {

constexpr int kAbsent = -2;  // a band's entry: not in this tile's list (TileEntry::kFull = -1: no mask needed)
constexpr int kEdge = -4;    // all visible but for the sequence's end or a document's start
constexpr int kHidden = -3;  // visit all, backward: a tile without an active edge is computed with every edge hidden, so that its zeros are exact

struct View {
  bf16* data;
  int64_t batch, head, token;
  __device__ __forceinline__ bf16* row(int b, int h, int64_t t) const { return data + b * batch + h * head + t * token; }
};

constexpr int kMaxGroups = 3;
struct __align__(16) Entry {
  int tile;              // of the other side; -1 ends a walk
  int mask[kMaxGroups];  // of each tile of the band
};

/// Lists of the bands of one direction.
struct BandLists {
  const int64_t* offsets;  // [patterns, bands + 1]
  const Entry* entries;
  const int* order;  // [patterns, bands]: longest list first
  int bands;         // of the whole map: the stride of offsets and order
  int before;        // how many places of band 0 stand before tile 0

  /// The tile at place `group` of a band of `groups`; one that is not there is below 0 or past the end.
  __device__ __forceinline__ int tile(int band, int group, int groups) const { return groups * band + group - before; }
};

/// What the 64 rows of a query tile contribute to their edges in the backward pass. The first three arrays stand in the order in which a lane of
/// the dk, dv kernel reads them, 16 bytes at a time: its columns 8j + 2 (lane % 4) + {0, 1} of two neighbouring j.
struct __align__(16) RowTile {
  float inverse_z[64];    // 1 / z_i, 0 where z_i = 0
  float minus_delta[64];  // -<do_i, o_i> for sum and softmax, else 0
  float offset[64];       // x = c f(s) + offset; divided by gate_bound
  int document_start[64];
  /// Where row r stands.
  static constexpr __host__ __device__ int place(int r) { return r / 16 * 16 + r % 8 / 2 * 4 + r / 8 % 2 * 2 + r % 2; }
};
static_assert(sizeof(RowTile) == 64 * 16);

/// The kernels' variants: three gates times three scores, softmax with a linear or a squared score, and three gates with length_beta.
template <int Variant>
struct Gates {
  static constexpr bool kSoftmax = Variant == 9 || Variant == 10, kLengthBeta = Variant > 10;
  static constexpr bool kFidelity = kSoftmax ? Variant == 10 : !kLengthBeta && Variant % 3 == 1;
  static constexpr bool kBounded = !kSoftmax && (kLengthBeta || Variant % 3 != 2);  // |<q, k>| <= 1: see gate_bound
  static constexpr int kPower = kSoftmax ? 1 : 1 << (kLengthBeta ? Variant - 11 : Variant / 3);
  static constexpr bool kRowOffsets = kSoftmax || kLengthBeta;                // else every row of a head has the same
  static constexpr bool kBalances = !kSoftmax && !kFidelity && !kLengthBeta;  // knows AttentionBackward::balance
};
constexpr int kVariants = 14;
constexpr int variant_of(int power, bool softmax, bool fidelity, bool bounded, bool length_beta) {
  const int gate = power == 1 ? 0 : power == 2 ? 1 : 2;
  return softmax ? 9 + fidelity : length_beta ? 11 + gate : 3 * gate + (fidelity ? 1 : bounded ? 0 : 2);
}

struct Args {
  CUtensorMap map_q, map_k, map_v, map_do;  // Hopper path only
  View q, k, v, o, d_o, dq, dk, dv;
  int batch, heads, tokens, keys;
  int query_tiles, key_tiles, words;
  int section;  // (batch, head) pairs whose blocks run together, for the L2 cache
  const float *scale, *threshold;
  const float* balance;       // [H] or null
  const int* document_start;  // [B, T] or null
  const int* positions;       // [T] or null
  float* z;
  uint32_t* active;              // [B, H, query_tiles, words]
  unsigned long long* counters;  // [H, 5] or null
  RowTile* rows;                 // [B, H, query_tiles]
  float* partial_scale;          // [B, H, query_tiles]
  float* partial_threshold;      // [B, H, query_tiles]
  BandLists by_query, by_key;    // bands of as many tiles as the launched kernel has consumers
  const int* group_of_head;
  const uint64_t* masks;         // [masks, 64]: bit k of row q
  const uint64_t* masks_by_key;  // [masks, 64]: bit q of row k
  bool mask0_is_causal, visit_all, fidelity, softmax, bounded;
  bool normalize_sum, normalize_length;
  int power;
  float epsilon, length_alpha, length_beta;
  // Forward pass over keys in parts.
  float* carry;  // [B, H, T, D + kCarryExtra] or null
  bool carry_first, carry_last;
};

/// x = scale f(s) + offset of query row i of a head with scale c and threshold tau; for softmax scale and offset are 0-based exponents of two
/// instead (offset: -z, backward).
__device__ __forceinline__ float row_offset(const Args& a, float c, float tau, int i, int head_size) {
  if (a.length_beta > 0) {
    const float position = static_cast<float>(a.positions ? a.positions[min(i, a.tokens - 1)] : i);
    return -c * a.length_beta * sqrtf(2.f * logf(position + 2.f) / static_cast<float>(head_size));
  }
  return a.fidelity ? -c * tau : -tau;
}

/// A power of two m above every x of a head when |<q, k>| <= 1.06 (unit vectors, rounded): then max(0, x) = m saturate(x / m), and
/// saturation is free with the multiply-add while a maximum is an instruction at half rate. Dividing by m changes no bit of the result. 1 where
/// scores have no bound.
__device__ __forceinline__ float gate_bound(const Args& a, float c, float tau, int head_size) {
  if (!a.bounded) return 1.f;
  const float top = 1.14f * fabsf(c) + fabsf(row_offset(a, c, tau, a.tokens - 1, head_size));
  return __int_as_float((min(max(__float_as_int(top) >> 23, 100), 250) + 1) << 23);
}
/// 1 / m for a power of two.
__device__ __forceinline__ float inverse_of(float bound) { return __int_as_float((254 << 23) - __float_as_int(bound)); }

struct Cursor {
  int stage = 0;
  uint32_t phase = 0;
  template <int Stages>
  __device__ __forceinline__ void next() {
    if (++stage == Stages) stage = 0, phase ^= 1;
  }
};

/// A band of a (batch, head) and the head's parameters.
struct Item {
  int band, b, h;                 // band -1: the block has no more
  float scale, threshold, bound;  // gate_bound
};

/// A band's tile of the other side.
struct Step {
  int tile;  // -1: the band ends here
  int mask;
};

/// Barriers and entries of the stages, in shared memory from `base`. An entry is (tile, mask) for each warpgroup. Beside them `Own` slots for a
/// band's own tiles, which are loaded once a band: two, so that the next band's arrive while this one is worked on.
template <int Groups, bool Hopper, int Stages, int Own>
struct Ring {
  uint32_t base;
  static constexpr int kStages = Stages, kOwn = Own;
  static constexpr uint32_t kBytes = 48 * (Stages + Own);
  __device__ __forceinline__ uint32_t full(int stage) const { return base + 8 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return base + 8 * (Stages + stage); }
  __device__ __forceinline__ uint32_t entry(int stage, int group) const { return base + 16 * Stages + 32 * stage + 8 * group; }
  __device__ __forceinline__ uint32_t own_full(int slot) const { return base + 48 * Stages + 48 * slot; }
  __device__ __forceinline__ uint32_t own_empty(int slot) const { return own_full(slot) + 8; }

  __device__ __forceinline__ void init() const {
    if (threadIdx.x == 0) {
      // Portable: 32 lanes arrive by their copies, and lane 0 once more for what the warp stored itself.
      for (int s = 0; s < Stages; ++s) barrier_init(full(s), Hopper ? 1 : 33), barrier_init(empty(s), Groups * 128);
      for (int s = 0; s < Own; ++s) barrier_init(own_full(s), Hopper ? 1 : 33), barrier_init(own_empty(s), Groups * 128);
#if __CUDA_ARCH__ >= 900
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");  // the copy engine sees the barriers too
#endif
    }
    __syncthreads();
  }
  __device__ __forceinline__ void put(int stage, const Entry& e) const {
#pragma unroll
    for (int g = 0; g < Groups; ++g) store_shared2(entry(stage, g), e.tile, e.mask[g]);
  }
  /// Waits until a stage is full. The same in the whole warp.
  __device__ __forceinline__ Step step(const Cursor& at, int group) const {
    barrier_wait(full(at.stage), at.phase);
    const int2 e = load_shared2(entry(at.stage, group));
    return {uniform(e.x), uniform(e.y)};
  }
  __device__ __forceinline__ void put_item(int slot, const Item& i) const {
    store_shared4(own_full(slot) + 16, i.band, i.b, i.h, __float_as_int(i.bound));
    store_shared2(own_full(slot) + 32, __float_as_int(i.scale), __float_as_int(i.threshold));
  }
  /// Waits until a band's own tiles are there.
  __device__ __forceinline__ Item item(const Cursor& own) const {
    barrier_wait(own_full(own.stage), own.phase);
    const float4 v = load_shared4(own_full(own.stage) + 16);
    const int2 head = load_shared2(own_full(own.stage) + 32);
    return {uniform(__float_as_int(v.x)), uniform(__float_as_int(v.y)), uniform(__float_as_int(v.z)),
            __int_as_float(head.x),       __int_as_float(head.y),       v.w};
  }
  /// A consumer warp is done with a stage, with a slot. Every lane arrives for what it read itself: one arrival a warp after __syncwarp would do,
  /// and measures the same, but compute-sanitizer's racecheck does not follow that order from lane to lane.
  __device__ __forceinline__ void release(int stage) const { barrier_arrive(empty(stage)); }
  __device__ __forceinline__ void release_own(int slot) const { barrier_arrive(own_empty(slot)); }
};

/// Loads rows [row, row + 64) of one [T, D] matrix into D/64 tiles, by the whole producer warp.
template <bool Hopper, int D>
__device__ __forceinline__ void load_rows(uint32_t to, const View& view, const CUtensorMap* map, uint32_t bar, int row, int b, int h, int tokens,
                                          int lane) {
  if constexpr (Hopper) {
    if (lane == 0) {
#pragma unroll
      for (int d = 0; d < D / 64; ++d) copy_box(to + d * kTileBytes, map, bar, d * 64, row, h, b);
    }
  } else {
    for (int c = lane; c < 64 * D / 8; c += 32) {
      const int r = c / (D / 8), chunk = c % (D / 8);
      const bool valid = row + r < tokens;
      copy_async16(to + (chunk / 8) * kTileBytes + r * 128 + (((chunk % 8) ^ (r & 7)) << 4), view.row(b, h, valid ? row + r : 0) + chunk * 8, valid);
    }
  }
}

/// Opens a set of loads of `bytes` on `bar`; close_loads ends it.
template <bool Hopper>
__device__ __forceinline__ void open_loads(uint32_t bar, uint32_t bytes, int lane) {
  if constexpr (Hopper) {
    if (lane == 0) barrier_expect(bar, bytes);
  }
}
template <bool Hopper>
__device__ __forceinline__ void close_loads(uint32_t bar, int lane) {
  if constexpr (!Hopper) {
    barrier_arrive_after_copies(bar);
    if (lane == 0) barrier_arrive(bar);
  }
}

/// The producer warp's walk: keep(entry) drops what is not to be visited by setting masks to kAbsent; load(stage, tile) issues the loads of a
/// visited tile, `bytes` in all. Ends with an entry of tile -1.
template <int Groups, bool Hopper, int Stages, int Own, class Keep, class Load>
__device__ __forceinline__ void produce(const Ring<Groups, Hopper, Stages, Own>& ring, Cursor& at, const BandLists& lists, int64_t list,
                                        uint32_t bytes, int lane, Keep keep, Load load) {
  const int64_t begin = lists.offsets[list], end = lists.offsets[list + 1];
#pragma unroll 1
  for (int64_t base = begin; base < end; base += 32) {
    Entry mine{0, {kAbsent, kAbsent, kAbsent}};
    if (base + lane < end) {
      *reinterpret_cast<int4*>(&mine) = __ldg(reinterpret_cast<const int4*>(lists.entries + base + lane));
      keep(mine);
    }
    bool wanted = false;
#pragma unroll
    for (int g = 0; g < Groups; ++g) wanted |= mine.mask[g] != kAbsent;
    uint32_t live = __ballot_sync(0xffffffffu, wanted);
    while (live) {
      const int from = __ffs(live) - 1;
      live &= live - 1;
      barrier_wait(ring.empty(at.stage), at.phase);
      Entry entry;
      const int tile = entry.tile = __shfl_sync(0xffffffffu, mine.tile, from);
#pragma unroll
      for (int g = 0; g < Groups; ++g) entry.mask[g] = __shfl_sync(0xffffffffu, mine.mask[g], from);
      if (lane == 0) ring.put(at.stage, entry);  // by the lane that arrives below
      open_loads<Hopper>(ring.full(at.stage), bytes, lane);
      load(at.stage, tile);
      close_loads<Hopper>(ring.full(at.stage), lane);
      at.next<Stages>();
    }
  }
  barrier_wait(ring.empty(at.stage), at.phase);
  if (lane == 0) ring.put(at.stage, Entry{-1, {kAbsent, kAbsent, kAbsent}});
  open_loads<Hopper>(ring.full(at.stage), 0, lane);
  close_loads<Hopper>(ring.full(at.stage), lane);
  at.next<Stages>();
}

/// Which keys bound a query tile's documents: from `first` its first row sees keys, from `full` every row does.
struct DocumentBounds {
  int first = 0, full = 0;
};
__device__ __forceinline__ DocumentBounds document_bounds(const Args& a, int b, int query_tile) {
  if (!a.document_start) return {};
  const int* starts = a.document_start + static_cast<int64_t>(b) * a.tokens;
  const int row = max(query_tile, 0) * kTile;
  return {starts[min(row, a.tokens - 1)], starts[min(row + 63, a.tokens - 1)]};
}
/// A full tile that the sequence's end or a document's start cuts still needs a mask.
__device__ __forceinline__ int cut_mask(const Args& a, int mask, int query_tile, int key_tile, DocumentBounds d) {
  const bool cut = key_tile * kTile < d.full || (query_tile + 1) * kTile > a.tokens || (key_tile + 1) * kTile > a.keys;
  return mask == TileEntry::kFull && cut ? kEdge : mask;
}

/// The order of the items: sections of heads that fit the L2 cache, in each the longest lists first (by the list's order, or by number: under a
/// causal pattern late query tiles and early key tiles have the long lists).
///
/// Either every item has a block, and the hardware's own scheduling balances uneven lists. Or (short lists) there are as many blocks as fit the GPU
/// and each takes items in turn, its producer running ahead into the next band while the consumers finish this one; then items are dealt there and
/// back - 0 1 2 | 5 4 3 | 6 7 8 - so that who got the longest of a round gets the shortest of the next. That evens out as long as lengths change
/// little from one round to the next, and the lists of the last rounds are short. So every other section begins with its shortest lists, and the
/// shortest of all sections come last of all. What an item computes is the same.
struct Schedule {
  static constexpr int kLastRounds = 2;  // those that deal the shortest lists of all heads
  int bands, heads, total, last;         // heads: of all sequences; last: how many bands of a head stand behind the sections
  bool descending;
  __device__ __forceinline__ Schedule(const Args& a, const BandLists& lists, int tiles, int groups, bool descending)
      : bands((tiles + lists.before + groups - 1) / groups), heads(a.batch * a.heads), total(bands * heads), last(0), descending(descending) {
    const int blocks = gridDim.x;
    if (blocks < total) last = min(bands, (kLastRounds * blocks + heads - 1) / heads);
  }

  /// work(n) for each of the block's items. Lanes that an item's end parted - the last rows are stored under a condition - are one warp again when
  /// the next begins, as its ldmatrix and wgmma want.
  template <class Work>
  __device__ __forceinline__ void for_each(Work work) const {
    // The first blocks have an item in a last round that is not full: where a kernel starts early, they start before the others.
    const int blocks = gridDim.x, rounds = (total + blocks - 1) / blocks;
    int n = rounds % 2 ? blockIdx.x : blocks - 1 - blockIdx.x;
#pragma unroll 1
    for (int first = 0; first < total; first += blocks) {
      if (n < total) work(n);
      __syncwarp();
      n = 2 * (first + blocks) - 1 - n;
    }
  }
  /// Item n and the number of its tile list.
  __device__ __forceinline__ Item item(const Args& a, const BandLists& lists, int head_size, int n, int64_t& list) const {
    const int ranks = bands - last, behind = n - ranks * heads;
    int rank, bh;
    if (behind >= 0) {
      rank = ranks + behind / heads, bh = behind % heads;
    } else {
      const int per_section = min(a.section, heads) * ranks, section = n / per_section, within = n % per_section;
      const int first = section * a.section, in_section = min(a.section, heads - first);
      rank = within / in_section, bh = first + within % in_section;
      if (last > 0 && ((heads - 1) / a.section - section) % 2 != 0) rank = ranks - 1 - rank;  // the last section begins with its longest
    }
    Item i;
    i.b = bh / a.heads, i.h = bh % a.heads;
    i.scale = a.scale[i.h], i.threshold = a.threshold[i.h], i.bound = gate_bound(a, i.scale, i.threshold, head_size);
    const int64_t group = a.group_of_head[i.h];
    i.band = bands == lists.bands ? lists.order[group * lists.bands + rank] : descending ? bands - 1 - rank : rank;
    list = group * (lists.bands + 1) + i.band;
    return i;
  }
};

/// The producer warp's part: own(item, at, bar) loads a band's own tiles, own_bytes in all; walk(item, at, list) calls produce. Ends with an item of
/// band -1.
template <int D, int Groups, bool Hopper, int Stages, int Own, class LoadOwn, class Walk>
__device__ __forceinline__ void produce_items(const Args& a, const Schedule& schedule, const BandLists& lists,
                                              const Ring<Groups, Hopper, Stages, Own>& ring, uint32_t own_bytes, int lane, LoadOwn load_own,
                                              Walk walk) {
  Cursor at, own;
  at.phase = own.phase = 1;  // the first round finds everything empty
  schedule.for_each([&](int n) {
    int64_t list;
    const Item item = schedule.item(a, lists, D, n, list);
    const uint32_t full = ring.own_full(own.stage);
    barrier_wait(ring.own_empty(own.stage), own.phase);
    if (lane == 0) ring.put_item(own.stage, item);  // by the lane that arrives below
    open_loads<Hopper>(full, own_bytes, lane);
    load_own(item, own.stage, full);
    close_loads<Hopper>(full, lane);
    own.next<Own>();
    walk(item, at, list);
  });
  const uint32_t full = ring.own_full(own.stage);
  barrier_wait(ring.own_empty(own.stage), own.phase);
  if (lane == 0) ring.put_item(own.stage, Item{-1, 0, 0, 0.f, 0.f, 1.f});
  open_loads<Hopper>(full, 0, lane);
  close_loads<Hopper>(full, lane);
}

/// A consumer's part: work(item) for each band, which frees the band's slot and moves `own` on. The ring says where the items end: counting them
/// would take registers that products need. __syncwarp: see Schedule::for_each.
template <int Groups, bool Hopper, int Stages, int Own, class Work>
__device__ __forceinline__ void consume_items(const Ring<Groups, Hopper, Stages, Own>& ring, const Cursor& own, Work work) {
#pragma unroll 1
  for (;;) {
    const Item item = ring.item(own);
    if (item.band < 0) return;
    work(item);
    __syncwarp();
  }
}

/// Writes a warpgroup's 64 x 64 product, rows scaled, as bf16: rows i0 and i0 + 8 of this thread, columns from `column`.
__device__ __forceinline__ void store_product(const Acc& c, const View& view, int b, int h, int row, int tokens, int column, int lane, float scale0,
                                              float scale8) {
  // The four lanes of a row exchange quarters, so that each stores 16 bytes: a 4 x 4 transpose of words in two steps.
  const int quarter = kept(lane & 3);
  const bool odd = quarter & 1, upper = quarter & 2;
  bf16* const first = kept(view.row(b, h, row) + column + quarter * 8);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float scale = half ? scale8 : scale0;
    bf16* const to = half ? first + 8 * view.token : first;
    const bool inside = row + 8 * half < tokens;
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      uint32_t w[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) w[j] = pack(c[group * 4 + j][2 * half] * scale, c[group * 4 + j][2 * half + 1] * scale);
      {  // exchange with lane ^ 1
        const uint32_t s0 = odd ? w[0] : w[1], s1 = odd ? w[2] : w[3];
        const uint32_t r0 = __shfl_xor_sync(0xffffffffu, s0, 1), r1 = __shfl_xor_sync(0xffffffffu, s1, 1);
        w[0] = odd ? r0 : w[0], w[2] = odd ? r1 : w[2];
        w[1] = odd ? w[1] : r0, w[3] = odd ? w[3] : r1;
      }
      {  // exchange with lane ^ 2
        const uint32_t s0 = upper ? w[0] : w[2], s1 = upper ? w[1] : w[3];
        const uint32_t r0 = __shfl_xor_sync(0xffffffffu, s0, 2), r1 = __shfl_xor_sync(0xffffffffu, s1, 2);
        w[0] = upper ? r0 : w[0], w[1] = upper ? r1 : w[1];
        w[2] = upper ? w[2] : r0, w[3] = upper ? w[3] : r1;
      }
      if (inside) store_global4(to + group * 32, w[0], w[1], w[2], w[3]);
    }
  }
}

__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}
__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}

}  // namespace tessera::cuda_attention
