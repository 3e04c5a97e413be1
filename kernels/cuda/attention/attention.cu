// The host's side of the operator: checks the descriptors, describes the tensors to the copy engine, launches.

#include "kernels/cuda/attention/attention.h"

#include <limits>
#include <stdexcept>
#include <string>

#include "kernels/cuda/attention/host.h"
#include "kernels/cuda/attention/kernels.h"
#include "kernels/cuda/check.h"

namespace tessera {
namespace cuda_attention {
namespace {

void check(cudaError_t e, const char* what) {
  if (e != cudaSuccess) throw std::runtime_error(std::string("CUDA attention: ") + what + ": " + cudaGetErrorString(e));
}
void require(bool ok, const std::string& what) {
  if (!ok) throw std::logic_error("CUDA attention: " + what);
}

View view_of(const HeadsView& v, const char* name) {
  cuda::check_heads("CUDA attention", name, v);
  return {static_cast<bf16*>(v.data), v.batch, v.head, v.token};
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);
EncodeTiled encode_tiled() {
  static const EncodeTiled found = [] {
    void* p = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &p, 12000, cudaEnableDefault, &result), "looking up cuTensorMapEncodeTiled");
    if (result != cudaDriverEntryPointSuccess)
      throw std::runtime_error("CUDA attention: the driver has no cuTensorMapEncodeTiled; it needs CUDA 12 or later");
    return reinterpret_cast<EncodeTiled>(p);
  }();
  return found;
}

}  // namespace

CUtensorMap tensor_map(const View& v, const AttentionShape& s, std::int64_t rows) {
  CUtensorMap map;
  const cuuint64_t extents[4] = {static_cast<cuuint64_t>(s.head_size), static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(s.heads),
                                 static_cast<cuuint64_t>(s.batch)};
  const auto bytes = [&](std::int64_t extent, std::int64_t stride) {  // a stride along an extent of one is never used, and must still be valid
    return static_cast<cuuint64_t>(extent > 1 ? stride : s.head_size) * sizeof(bf16);
  };
  const cuuint64_t strides[3] = {bytes(rows, v.token), bytes(s.heads, v.head), bytes(s.batch, v.batch)};
  const cuuint32_t box[4] = {64, 64, 1, 1}, step[4] = {1, 1, 1, 1};
  const CUresult r = encode_tiled()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, v.data, extents, strides, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                    CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  require(r == CUDA_SUCCESS, "cuTensorMapEncodeTiled returned " + std::to_string(static_cast<int>(r)));
  return map;
}

bool choose_path(CudaAttentionPath path) {
  static const bool has_hopper = runs_hopper_code();
  if (path == CudaAttentionPath::hopper && !has_hopper) throw std::runtime_error("CUDA attention: this GPU or build has no Hopper path (sm_90a)");
  return path == CudaAttentionPath::portable ? false : has_hopper;
}

void set_math(Args& a, const AttentionMath& math) {
  a.fidelity = math.score == Score::fidelity, a.softmax = math.gate == Gate::softmax, a.power = gate_power(math.gate);
  a.bounded = !a.softmax && math.score != Score::dot;
  a.normalize_sum = !a.softmax && math.normalizer == Normalizer::sum;
  a.normalize_length = !a.softmax && math.normalizer == Normalizer::length;
  a.epsilon = math.epsilon, a.length_alpha = math.length_alpha, a.length_beta = a.softmax ? 0.f : math.length_beta;
}

int section_of(std::int64_t keys, std::int64_t head_size, std::int64_t heads) {
  constexpr std::int64_t kSectionBytes = 24 << 20;  // 50 MB of L2 on an H100, 60 on an H200
  const std::int64_t fit = std::max<std::int64_t>(1, kSectionBytes / (keys * head_size * 4));
  const std::int64_t sections =
      (heads + fit - 1) / fit;  // about as large as each other, so that none ends the walk of the heads with a few long lists
  return static_cast<int>((heads + sections - 1) / sections);
}

namespace {

Args arguments(const AttentionForward& f, bool hopper) {
  const AttentionShape& s = f.shape;
  require(s.batch >= 1 && s.heads >= 1 && s.tokens >= 1, "an empty shape");
  require(s.head_size == 64 || s.head_size == 128, "head size " + std::to_string(s.head_size) + "; the kernels have 64 and 128");
  const auto* tiles = dynamic_cast<const CudaTiles*>(f.tiles);
  require(tiles != nullptr, "tiles must come from upload_tiles_cuda");
  const TileMap& map = tiles->host();
  require(f.keys >= 0 && (map.keys == 0 || f.keys > 0), "lists over fetched keys want the number of those");
  require(f.key_count() <= std::numeric_limits<std::int32_t>::max(), "more keys than an i32 can count");
  require(s.tokens <= map.tokens && f.key_count() <= map.key_count(), "more tokens than the tile map serves");
  require(static_cast<std::int64_t>(map.group_of_head.size()) == s.heads, "the tile map is made for another number of heads");
  require(f.math.length_beta <= 0 || f.math.score == Score::cosine, "length_beta goes with score cosine");
  const std::int64_t rows = s.batch * s.heads * s.tokens;

  Args a{};
  a.q = view_of(f.q, "q"), a.k = view_of(f.k, "k"), a.v = view_of(f.v, "v"), a.o = view_of(f.o, "o");
  a.batch = static_cast<int>(s.batch), a.heads = static_cast<int>(s.heads), a.tokens = static_cast<int>(s.tokens);
  a.keys = static_cast<int>(f.key_count());
  a.query_tiles = (a.tokens + 63) / 64, a.key_tiles = (a.keys + 63) / 64;
  a.words = static_cast<int>(bitmap_words(a.key_tiles));
  a.section = section_of(f.key_count(), s.head_size, s.batch * s.heads);
  a.scale = f.scale.as<float>(), a.threshold = f.threshold.as<float>(), a.z = f.z.as<float>(), a.active = f.active_tiles.as<std::uint32_t>();
  require(f.scale.numel() >= s.heads && f.threshold.numel() >= s.heads && f.scale && f.threshold, "scale and threshold need one value a head");
  require(f.z && f.z.numel() >= rows, "z is too small");
  require(f.active_tiles && f.active_tiles.numel() >= s.batch * s.heads * a.query_tiles * a.words, "active_tiles is too small");
  if (f.document_start) {
    require(f.document_start.numel() >= s.batch * s.tokens, "document_start is too small");
    a.document_start = f.document_start.as<std::int32_t>();
  }
  if (f.positions) {
    require(f.positions.numel() >= s.tokens, "positions is too small");
    a.positions = f.positions.as<std::int32_t>();
  }
  a.carry_first = a.carry_last = true;
  if (f.carry) {
    a.carry = f.carry.as<float>(), a.carry_first = f.carry_first, a.carry_last = f.carry_last;
    require(f.carry.numel() >= rows * (s.head_size + kCarryExtra), "carry is too small");
    require(reinterpret_cast<std::uintptr_t>(a.carry) % 8 == 0, "carry must be 8-byte aligned");
  }
  if (f.counters) {
    require(f.counters.numel() >= s.heads * kAttentionCounters, "counters is too small");
    a.counters = reinterpret_cast<unsigned long long*>(f.counters.as<std::uint64_t>());
  }
  a.group_of_head = tiles->group_of_head(), a.masks = tiles->masks(), a.masks_by_key = tiles->masks_by_key();
  a.by_key = tiles->by_key().lists();
  a.mask0_is_causal = map.mask0_is_causal, a.visit_all = f.visit == Visit::all;
  set_math(a, f.math);
  if (hopper) a.map_q = tensor_map(a.q, s, s.tokens), a.map_k = tensor_map(a.k, s, a.keys), a.map_v = tensor_map(a.v, s, a.keys);
  return a;
}

/// Below this mean length of a band's list, starting and ending bands counts for more than an even distribution over the GPU.
constexpr double kShortList = 48;

bool persistent(CudaAttentionSchedule schedule, const Bands& bands, int tiles) {
  return schedule == CudaAttentionSchedule::automatic ? bands.mean_length(tiles) < kShortList : schedule == CudaAttentionSchedule::persistent;
}

template <int D>
void forward(Args& a, const CudaTiles& tiles, bool hopper, CudaAttentionSchedule schedule, cudaStream_t stream) {
  const Bands& bands = tiles.by_query(forward_groups<D>(hopper));
  a.by_query = bands.lists();
  const auto launch = a.carry ? launch_forward_part<D> : launch_forward<D>;
  check(launch(a, hopper, persistent(schedule, bands, a.key_tiles), stream), "forward kernel");
}

template <int D>
void backward(Args& a, const CudaTiles& tiles, bool hopper, CudaAttentionSchedule schedule, cudaStream_t stream) {
  const Bands& bands = tiles.by_query(backward_q_groups<D>(hopper));
  a.by_query = bands.lists();
  check(launch_row_info(a, D, stream), "row kernel");
  check(launch_backward_kv<D>(a, hopper, persistent(schedule, tiles.by_key(), a.query_tiles), stream), "dk, dv kernel");
  check(launch_backward_q<D>(a, hopper, persistent(schedule, bands, a.key_tiles), stream), "dq kernel");
}

}  // namespace
}  // namespace cuda_attention

using namespace cuda_attention;

bool cuda_attention_has_hopper_path() { return runs_hopper_code(); }

void cuda_attention_forward(const AttentionForward& f, cudaStream_t stream, const CudaAttentionOptions& options) {
  const bool hopper = choose_path(options.path);
  Args a = arguments(f, hopper);
  const auto& tiles = static_cast<const CudaTiles&>(*f.tiles);
  f.shape.head_size == 64 ? forward<64>(a, tiles, hopper, options.schedule, stream) : forward<128>(a, tiles, hopper, options.schedule, stream);
}

void cuda_attention_backward(const AttentionBackward& g, cudaStream_t stream, const CudaAttentionOptions& options) {
  const bool hopper = choose_path(options.path);
  const AttentionForward& f = g.forward;
  Args a = arguments(f, hopper);
  a.counters = nullptr;
  a.d_o = view_of(g.d_o, "d_o"), a.dq = view_of(g.dq, "dq"), a.dk = view_of(g.dk, "dk"), a.dv = view_of(g.dv, "dv");
  if (g.balance) {
    require(g.balance.numel() >= f.shape.heads, "balance needs one value a head");
    require(!a.softmax && !a.fidelity && a.length_beta <= 0, "balance is for relu gates over dot and cosine with a threshold a head");
    a.balance = g.balance.as<float>();
  }
  if (hopper) a.map_do = tensor_map(a.d_o, f.shape, f.shape.tokens);
  require(g.workspace && g.workspace.numel() >= attention_backward_workspace(f.shape, 64), "the workspace is too small");
  float* workspace = g.workspace.as<float>();
  require(reinterpret_cast<std::uintptr_t>(workspace) % 16 == 0, "the workspace must be 16-byte aligned");
  const std::int64_t tiles_total = f.shape.batch * f.shape.heads * a.query_tiles;
  a.rows = reinterpret_cast<RowTile*>(workspace);
  a.partial_scale = workspace + tiles_total * 64 * 4;
  a.partial_threshold = a.partial_scale + tiles_total;

  const auto& tiles = static_cast<const CudaTiles&>(*f.tiles);
  f.shape.head_size == 64 ? backward<64>(a, tiles, hopper, options.schedule, stream) : backward<128>(a, tiles, hopper, options.schedule, stream);

  float* dscale = g.dscale ? g.dscale.as<float>() : nullptr;
  float* dthreshold = g.dthreshold && !a.softmax && a.length_beta <= 0 ? g.dthreshold.as<float>() : nullptr;
  if (dscale || dthreshold) check(launch_head_sums(a, dscale, dthreshold, stream), "head sums kernel");
}

}  // namespace tessera
