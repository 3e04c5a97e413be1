// Exchange `ring`: the keys and values of every rank travel round, from each rank to the next, and each rank adds what its queries see of them to
// sums that stay (AttentionForward::carry; Liu et al., arXiv 2310.01889). Two buffers: one is computed on while the other fills, so memory does not
// grow with the number of ranks. In the backward pass they travel again; the gradients of keys and values follow them a step behind, growing on their
// way, and come home after a whole round. A part's gradients come from the kernel in the compute type; sums over the parts are in fp32, and rounded
// once.

#include <algorithm>
#include <stdexcept>

#include "model/pattern.h"
#include "model/shared_attention_parts.h"

namespace tessera {
namespace {

constexpr std::int64_t kPiece = 128;  // rows of a piece where all rows move: a block of a GPU takes one

using Ticket = Communicator::Ticket;

/// The lists of rank `rank`'s queries over the keys of rank `part`, both numbered by their places there.
std::shared_ptr<const TileMap> lists_over(const SequenceSplit& split, const TileMap& map, int rank, int part) {
  const auto owners = split.owners();
  const auto &queries = split.blocks[static_cast<std::size_t>(rank)], &keys = split.blocks[static_cast<std::size_t>(part)];
  const std::int64_t query_tiles = split.block / map.tile_query, key_tiles = split.block / map.tile_key;  // of a block
  auto lists = std::make_shared<TileMap>();
  lists->tokens = split.tokens_of(rank);
  lists->keys = split.tokens_of(part);
  lists->tile_query = map.tile_query;
  lists->tile_key = map.tile_key;
  lists->query_tiles = (lists->tokens + map.tile_query - 1) / map.tile_query;
  lists->key_tiles = (lists->keys + map.tile_key - 1) / map.tile_key;
  lists->group_of_head = map.group_of_head;
  lists->masks = map.masks;
  lists->mask_words = map.mask_words;
  lists->mask0_is_causal = map.mask0_is_causal;
  for (const TileGroup& g : map.groups) {
    TileGroup mine;
    mine.query_offsets.push_back(0);
    for (std::int64_t a = 0; a < lists->query_tiles; ++a) {
      const auto tile = static_cast<std::size_t>(queries[static_cast<std::size_t>(a / query_tiles)] * query_tiles + a % query_tiles);
      for (auto i = g.query_offsets[tile]; i < g.query_offsets[tile + 1]; ++i) {
        const TileEntry e = g.query_entries[static_cast<std::size_t>(i)];
        const std::int64_t block = e.tile / key_tiles;
        if (owners[static_cast<std::size_t>(block)] != part) continue;
        const std::int64_t place = std::ranges::lower_bound(keys, static_cast<std::int32_t>(block)) - keys.begin();
        mine.query_entries.push_back({static_cast<std::int32_t>(place * key_tiles + e.tile % key_tiles), e.mask});
      }
      mine.query_offsets.push_back(std::ssize(mine.query_entries));
    }
    fill_key_lists(mine, lists->key_tiles);
    lists->groups.push_back(std::move(mine));
  }
  return lists;
}

class RingAttention final : public SharedAttention {
 public:
  RingAttention(const SequencePart& part, const SequenceSplit& split, const std::vector<std::shared_ptr<const TileMap>>& layers, const Shape& shape,
                MemoryPlan& plan)
      : part_(part), shape_(shape), plan_(plan), H_(shape.heads), D_(shape.head_size), tokens_(split.tokens_of(part.rank)) {
    for (int r = 0; r < part_.ranks; ++r) tokens_of_.push_back(split.tokens_of(r));
    for (const auto& map : layers) {
      auto found = std::ranges::find(plans_, map.get(), [](const LayerPlan& p) { return p.map.get(); });
      if (found == plans_.end()) {
        found = plans_.insert(plans_.end(), LayerPlan{map, {}, {}});
        std::int64_t words = 0;
        for (int r = 0; r < part_.ranks; ++r) {
          found->lists.push_back(lists_.of(lists_over(split, *map, part_.rank, r), {0, H_}));
          found->first_word.push_back(words);
          words += found->lists.back()->query_tiles * bitmap_words(found->lists.back()->key_tiles);
        }
        found->first_word.push_back(words);
      }
      layers_.push_back(static_cast<std::size_t>(found - plans_.begin()));
    }
    for (std::int64_t h = 0; h < H_; ++h)
      for (std::int64_t t = 0; t < tokens_; t += split.block) own_.add(h * tokens_ + t, t * 3 * H_ + h, std::min(split.block, tokens_ - t));
    if (shape_.training) {
      whole_.resize(tokens_of_.size());
      for (std::size_t r = 0; r < whole_.size(); ++r)
        for (std::int64_t n = 0, rows = H_ * tokens_of_[r]; n < rows; n += kPiece) whole_[r].add(n, n, std::min(kPiece, rows - n));
    }
    reserve(split);
  }

  Sizes sizes() const override {
    Sizes s;
    const std::int64_t B = shape_.sequences;
    s.z = B * H_ * tokens_;
    for (const LayerPlan& p : plans_) {
      s.active_tiles = std::max(s.active_tiles, B * H_ * p.first_word.back());
      s.workspace = std::max(s.workspace, attention_backward_workspace({B, H_, tokens_, D_}, p.map->tile_query));
    }
    return s;
  }

  std::vector<Stretch> z_heads() const override { return {{0, H_}}; }

  void bind(Ops& ops, const SequenceGroup& group) override {
    check_group(part_, group);
    ops_ = &ops;
    group_ = group;
    lists_.upload(ops);
    own_.upload(ops, plan_);
    for (const PieceTable& table : whole_) table.upload(ops, plan_);
    for (std::size_t r = 0; r < first_rows_.size(); ++r) ops.upload(plan_[first_rows_[r]], first_row_from_[r].data());
    if (shape_.positions) ops.upload(plan_[positions_slot_], positions_.data());
  }

  void begin(const Tensor& document_start) override { document_start_ = document_start; }

  void forward(int layer, const AttentionForward& own) override {
    const LayerPlan& p = plan_of(layer, own);
    take_up(own);
    for (int step = 0; step < part_.ranks; ++step) {
      const bool more = step + 1 < part_.ranks;
      const Ticket next = more ? pass_on(step, own.shape.batch) : 0;
      AttentionForward a = call(p, step, own);
      a.carry = plan_[carry_].slice(0, own.shape.batch * H_ * tokens_ * (D_ + kCarryExtra));
      a.carry_first = step == 0;
      a.carry_last = !more;
      ops_->attention_forward(a);
      if (more) group_.comm->wait(next);
    }
  }

  void backward(int layer, const AttentionBackward& own) override {
    const AttentionForward& f = own.forward;
    const LayerPlan& p = plan_of(layer, f);
    const std::int64_t B = f.shape.batch;
    take_up(f);
    Ticket sums = 0;
    for (int step = 0; step < part_.ranks; ++step) {
      const bool more = step + 1 < part_.ranks;
      const Ticket next = more ? pass_on(step, B) : 0;
      const std::int64_t tokens = tokens_at(step);
      AttentionBackward a = own;
      a.forward = call(p, step, f);
      a.dq = part_view(d_queries_, 0, tokens_, B);
      a.dk = part_view(d_keys_, 0, tokens, B);
      a.dv = part_view(d_keys_, 1, tokens, B);
      ops_->attention_backward(a);
      if (step > 0) group_.comm->wait(sums);
      const MemoryPlan::Slot mine = d_sums_[step % 2];
      add_up(part_view(d_query_sums_, 0, tokens_, B), a.dq, part_.rank, B, step > 0);
      add_up(part_view(mine, 0, tokens, B), a.dk, part_at(step), B, step > 0);
      add_up(part_view(mine, 1, tokens, B), a.dv, part_at(step), B, step > 0);
      sums = exchange(message(mine, tokens, B), message(d_sums_[(step + 1) % 2], tokens_at(step + 1), B));
      if (more) group_.comm->wait(next);
    }
    group_.comm->wait(sums);
    const auto finish = [&](const HeadsView& to, const HeadsView& from) {
      ops_->move_rows({rows_of(to, D_), rows_of(from, D_), table(), true, false, B, D_});
    };
    finish(own.dq, part_view(d_query_sums_, 0, tokens_, B));
    finish(own.dk, part_view(d_sums_[part_.ranks % 2], 0, tokens_, B));
    finish(own.dv, part_view(d_sums_[part_.ranks % 2], 1, tokens_, B));
  }

 private:
  struct LayerPlan {
    std::shared_ptr<const TileMap> map;                 // of the whole sequence
    std::vector<std::shared_ptr<const TileMap>> lists;  // [ranks]: over the keys of each
    std::vector<std::int64_t> first_word;               // [ranks + 1]: of the bitmaps of one head
  };

  void reserve(const SequenceSplit& split) {
    constexpr auto kind = MemoryCategory::communication;
    const DType type = compute_type(shape_.device);
    const std::int64_t B = shape_.sequences, most = *std::ranges::max_element(tokens_of_);
    const auto rows = [&](const char* name, DType t) { return plan_.reserve(kind, name, t, {2, B, H_ * most, D_}); };
    own_.reserve(plan_, "own rows: table");
    for (auto& slot : kv_) slot = rows("keys and values on their way", type);
    carry_ = plan_.reserve(kind, "sums of queries", DType::f32, {B, H_, tokens_, D_ + kCarryExtra});
    if (shape_.training) {
      for (PieceTable& table : whole_) table.reserve(plan_, "rows of a part: table");
      d_keys_ = rows("gradients of keys and values from one rank", type);
      for (auto& slot : d_sums_) slot = rows("gradients of keys and values on their way", DType::f32);
      d_queries_ = plan_.reserve(kind, "gradients of queries from one part", type, {B, H_, tokens_, D_});
      d_query_sums_ = plan_.reserve(kind, "gradients of queries: sums", DType::f32, {B, H_, tokens_, D_});
    }
    if (shape_.positions) {
      positions_ = split.positions(part_.rank);
      positions_slot_ = plan_.reserve(kind, "positions of queries", DType::i32, {tokens_});
    }
    if (shape_.document_mask) {
      mapped_start_ = plan_.reserve(kind, "document_start in a part", DType::i32, {B, tokens_});
      for (int r = 0; r < part_.ranks; ++r) {
        std::vector<std::int32_t> rows_before(static_cast<std::size_t>(split.tokens + 1));
        for (const std::int32_t t : split.positions(r)) rows_before[static_cast<std::size_t>(t) + 1] = 1;
        for (std::size_t t = 1; t < rows_before.size(); ++t) rows_before[t] += rows_before[t - 1];
        first_row_from_.push_back(std::move(rows_before));
        first_rows_.push_back(plan_.reserve(kind, "first row of a token in a part", DType::i32, {split.tokens + 1}));
      }
    }
    lists_.account(shape_.device, plan_);
  }

  const LayerPlan& plan_of(int layer, const AttentionForward& own) const {
    check_call(ops_ != nullptr, own, shape_, tokens_);
    return plans_[layers_.at(static_cast<std::size_t>(layer))];
  }

  /// Whose keys are here at a step.
  int part_at(int step) const { return (part_.rank - step % part_.ranks + part_.ranks) % part_.ranks; }
  std::int64_t tokens_at(int step) const { return tokens_of_[static_cast<std::size_t>(part_at(step))]; }
  Tensor table() const { return own_(plan_, {0, own_.count()}); }

  /// Gradients of rank r's rows, [B, H, tokens, D], begin fp32 sums or are added to them.
  void add_up(const HeadsView& sums, const HeadsView& gradients, int r, std::int64_t B, bool add) const {
    const PieceTable& rows = whole_[static_cast<std::size_t>(r)];
    ops_->move_rows({rows_of(sums, D_), rows_of(gradients, D_), rows(plan_, {0, rows.count()}), false, add, B, D_});
  }

  /// Keys (0) or values (1) of a part: [B, H, tokens, D].
  HeadsView part_view(MemoryPlan::Slot slot, std::int64_t part, std::int64_t tokens, std::int64_t B) const {
    const std::int64_t head = tokens * D_, batch = H_ * head;
    const Tensor t = plan_[slot];
    return {element(t, part * B * batch), t.dtype, batch, head, D_};
  }
  Tensor message(MemoryPlan::Slot slot, std::int64_t tokens, std::int64_t B) const { return plan_[slot].slice(0, 2 * B * H_ * tokens * D_); }

  /// This rank's own keys and values, where the round begins.
  void take_up(const AttentionForward& own) const {
    const std::int64_t B = own.shape.batch;
    for (const auto& [part, from] : {std::pair{0, own.k}, {1, own.v}})
      ops_->move_rows({rows_of(part_view(kv_[0], part, tokens_, B), D_), rows_of(from, D_), table(), false, false, B, D_});
  }

  /// To the next rank, and as much as comes from the one before.
  Ticket exchange(const Tensor& to_next, const Tensor& from_previous) const {
    const int next = group_.members[static_cast<std::size_t>((part_.rank + 1) % part_.ranks)];
    const int previous = group_.members[static_cast<std::size_t>((part_.rank + part_.ranks - 1) % part_.ranks)];
    const Communicator::Part send{next, 0, to_next.numel()}, receive{previous, 0, from_previous.numel()};
    return group_.comm->begin_exchange(to_next, {&send, 1}, from_previous, {&receive, 1});
  }
  Ticket pass_on(int step, std::int64_t B) const {
    return exchange(message(kv_[step % 2], tokens_at(step), B), message(kv_[(step + 1) % 2], tokens_at(step + 1), B));
  }

  /// This rank's queries over the keys that are here at a step.
  AttentionForward call(const LayerPlan& p, int step, const AttentionForward& own) const {
    const auto part = static_cast<std::size_t>(part_at(step));
    const TileMap& lists = *p.lists[part];
    const std::int64_t B = own.shape.batch, words = bitmap_words(lists.key_tiles);
    AttentionForward a = own;
    a.keys = tokens_of_[part];
    a.tiles = lists_.on_device(&lists);
    a.k = part_view(kv_[step % 2], 0, a.keys, B);
    a.v = part_view(kv_[step % 2], 1, a.keys, B);
    if (shape_.document_mask) {
      a.document_start = plan_[mapped_start_].slice(0, B * tokens_).view({B, tokens_});
      ops_->look_up(a.document_start, plan_[first_rows_[part]], document_start_);
    }
    if (shape_.positions) a.positions = plan_[positions_slot_];
    a.z = own.z.slice(0, B * H_ * tokens_).view({B, H_, tokens_});
    a.active_tiles = own.active_tiles.slice(B * H_ * p.first_word[part], B * H_ * lists.query_tiles * words).view({B, H_, lists.query_tiles, words});
    return a;
  }

  const SequencePart part_;
  const Shape shape_;
  MemoryPlan& plan_;
  const std::int64_t H_, D_, tokens_;
  std::vector<std::int64_t> tokens_of_;
  std::vector<LayerPlan> plans_;     // one for all layers with the same map
  std::vector<std::size_t> layers_;  // the plan of each layer
  HeadLists lists_;
  PieceTable own_;                                         // left: rows of [B, H, tokens, D]; right: of the packed projection, in units of D
  std::vector<std::vector<std::int32_t>> first_row_from_;  // [ranks][tokens + 1]: the first row of a part whose token is this one or a later one
  std::vector<MemoryPlan::Slot> first_rows_;
  std::vector<std::int32_t> positions_;
  std::vector<PieceTable> whole_;  // [ranks]: all rows of [H, tokens, D], the same on both sides
  MemoryPlan::Slot kv_[2] = {-1, -1}, d_sums_[2] = {-1, -1}, d_keys_ = -1, d_queries_ = -1, d_query_sums_ = -1, carry_ = -1, mapped_start_ = -1,
                   positions_slot_ = -1;
  Tensor document_start_;
  Ops* ops_ = nullptr;
  SequenceGroup group_;
};

}  // namespace

std::unique_ptr<SharedAttention> make_ring_attention(const SequencePart& part, const SequenceSplit& split,
                                                     const std::vector<std::shared_ptr<const TileMap>>& layers, const SharedAttention::Shape& shape,
                                                     MemoryPlan& plan) {
  return std::make_unique<RingAttention>(part, split, layers, shape, plan);
}

}  // namespace tessera
