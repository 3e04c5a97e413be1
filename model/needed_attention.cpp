// Exchange `needed`: each rank fetches the key tiles that its queries may see into a compact buffer in ascending order, and the kernels run on it
// with lists of their own (NeededKeys). For the backward pass they are fetched again: no more than one turn of one layer is ever held. Gradients of
// fetched keys and values return to their owners in the compute type; an owner adds them to its own share in fp32, in the order of the ranks, and
// rounds the sum once.
//
//   forward    pack, fetch | unpack, begin the next fetch, attention | ...
//   backward   pack, fetch | unpack, begin the next fetch, attention, take the returns of the turn before, begin to return | ...

#include <algorithm>
#include <stdexcept>

#include "model/shared_attention_parts.h"

namespace tessera {
namespace {

using Ticket = Communicator::Ticket;

class NeededAttention final : public SharedAttention {
 public:
  NeededAttention(const SequencePart& part, const SequenceSplit& split, const std::vector<std::shared_ptr<const TileMap>>& layers, const Shape& shape,
                  MemoryPlan& plan)
      : part_(part), shape_(shape), plan_(plan), H_(shape.heads), D_(shape.head_size), tokens_(split.tokens_of(part.rank)) {
    for (const auto& map : layers) {
      auto found = std::ranges::find(plans_, map.get(), [](const LayerPlan& p) { return p.map.get(); });
      if (found == plans_.end()) found = plans_.insert(plans_.end(), make_layer(map, split));
      layers_.push_back(static_cast<std::size_t>(found - plans_.begin()));
    }
    reserve(split);
  }

  Sizes sizes() const override {
    Sizes s;
    s.z = shape_.sequences * H_ * tokens_;
    for (const LayerPlan& p : plans_) {
      s.active_tiles = std::max(s.active_tiles, shape_.sequences * H_ * p.query_tiles * p.words);
      for (const Stage& stage : p.stages)
        s.workspace = std::max(s.workspace, attention_backward_workspace({shape_.sequences, stage.heads.count, tokens_, D_}, p.map->tile_query));
    }
    return s;
  }

  std::vector<Stretch> z_heads() const override { return head_stages(H_, part_.stages); }

  void bind(Ops& ops, const SequenceGroup& group) override {
    check_group(part_, group);
    ops_ = &ops;
    group_ = group;
    lists_.upload(ops);
    for (const LayerPlan& p : plans_) {
      for (const PieceTable* table : {&p.send, &p.receive, &p.own}) table->upload(ops, plan_);
      if (shape_.training)
        for (const PieceTable* table : {&p.returned, &p.kept, &p.sums}) table->upload(ops, plan_);
      if (shape_.document_mask) ops.upload(plan_[p.first_rows], p.first_row_from.data());
    }
    if (shape_.positions) ops.upload(plan_[positions_slot_], positions_.data());
  }

  void begin(const Tensor& document_start) override {
    if (!shape_.document_mask) return;
    for (const LayerPlan& p : plans_)
      ops_->look_up(plan_[p.document_start].slice(0, document_start.numel()), plan_[p.first_rows], document_start.view({document_start.numel()}));
  }

  void forward(int layer, const AttentionForward& own) override {
    const LayerPlan& p = plan_of(layer, own);
    Ticket fetched = fetch(p.stages[0], own, p);
    for (std::size_t s = 0; s < p.stages.size(); ++s) {
      unpack(p.stages[s], own, p, fetched);
      if (s + 1 < p.stages.size()) fetched = fetch(p.stages[s + 1], own, p);
      ops_->attention_forward(call(p.stages[s], own, p));
    }
  }

  void backward(int layer, const AttentionBackward& own) override {
    const LayerPlan& p = plan_of(layer, own.forward);
    Ticket fetched = fetch(p.stages[0], own.forward, p), returned = 0;
    for (std::size_t s = 0; s < p.stages.size(); ++s) {
      const Stage& stage = p.stages[s];
      unpack(stage, own.forward, p, fetched);
      if (s + 1 < p.stages.size()) fetched = fetch(p.stages[s + 1], own.forward, p);
      AttentionBackward a = own;
      a.forward = call(stage, own.forward, p);
      a.d_o = from_head(own.d_o, stage.heads.first);
      a.dq = from_head(own.dq, stage.heads.first);
      a.dk = compact(d_keys_, 0, stage, p, own.forward.shape.batch);
      a.dv = compact(d_keys_, 1, stage, p, own.forward.shape.batch);
      a.dscale = heads_slice(own.dscale, stage.heads);
      a.dthreshold = heads_slice(own.dthreshold, stage.heads);
      a.balance = heads_slice(own.balance, stage.heads);
      ops_->attention_backward(a);
      if (s > 0) take_returns(p.stages[s - 1], own, p, returned);
      returned = give_back(stage, own, p);
    }
    take_returns(p.stages.back(), own, p, returned);
  }

 private:
  /// A turn of heads. In `send` and `own` the left column counts rows of the packed or compact buffer and the right one of the packed projection (in
  /// units of D); in `receive` left is compact and right is packed. `returned` and `kept` are `send` and `own` with rows of the sums, [heads of the
  /// turn, T], on the right; `sums` has those on the left and the packed projection on the right.
  struct Stage {
    Stretch heads;
    std::shared_ptr<const TileMap> lists;
    Stretch send, receive, own, sums;                   // of the tables
    std::vector<Stretch> send_to;                       // [ranks]: of `send`
    std::vector<std::int64_t> send_rows, receive_rows;  // [ranks]
    std::int64_t send_total = 0, receive_total = 0;
  };
  struct LayerPlan {
    std::shared_ptr<const TileMap> map;  // of the whole sequence
    std::int64_t keys = 0, query_tiles = 0, words = 0;
    std::vector<Stage> stages;
    PieceTable send, receive, own, returned, kept, sums;
    std::vector<std::int32_t>
        first_row_from;  // [tokens of the sequence + 1]: the first row of the compact buffer whose key is this one or a later one
    MemoryPlan::Slot first_rows = -1, document_start = -1;
  };

  LayerPlan make_layer(const std::shared_ptr<const TileMap>& map, const SequenceSplit& split) {
    const auto needed = plan_needed(split, *map);
    const auto me = static_cast<std::size_t>(part_.rank);
    const NeededKeys& mine = needed[me];
    LayerPlan p;
    p.map = map;
    p.keys = mine.keys;
    p.query_tiles = mine.lists->query_tiles;
    p.words = bitmap_words(mine.lists->key_tiles);

    std::vector<std::int64_t> place(static_cast<std::size_t>(split.block_count()), -1);  // of a block among this rank's
    for (std::size_t n = 0; n < split.blocks[me].size(); ++n) place[static_cast<std::size_t>(split.blocks[me][n])] = static_cast<std::int64_t>(n);
    const auto rows = [&](HeadTile t) { return std::min<std::int64_t>(map->tile_key, split.tokens - std::int64_t{t.tile} * map->tile_key); };
    const auto token = [&](HeadTile t) {  // among this rank's
      const std::int64_t first = std::int64_t{t.tile} * map->tile_key;
      return place[static_cast<std::size_t>(first / split.block)] * split.block + first % split.block;
    };
    const auto projection_row = [&](HeadTile t) { return token(t) * 3 * H_ + t.head; };
    const auto compact_row = [&](HeadTile t, Stretch heads) {
      return (t.head - heads.first) * p.keys + (std::ranges::lower_bound(mine.tiles, t.tile) - mine.tiles.begin()) * map->tile_key;
    };

    for (const Stretch heads : head_stages(H_, part_.stages)) {
      Stage s;
      s.heads = heads;
      s.lists = lists_.of(mine.lists, heads);
      const auto of_stage = [&](const std::vector<HeadTile>& tiles) {
        return std::ranges::subrange(std::ranges::lower_bound(tiles, heads.first, {}, &HeadTile::head),
                                     std::ranges::lower_bound(tiles, heads.first + heads.count, {}, &HeadTile::head));
      };
      s.send.first = p.send.count();
      s.receive.first = p.receive.count();
      s.own.first = p.own.count();
      s.sums.first = p.sums.count();
      const auto sum_row = [&](HeadTile t) { return (t.head - heads.first) * tokens_ + token(t); };
      for (int r = 0; r < part_.ranks; ++r) {
        const std::int64_t sent = s.send_total, received = s.receive_total, first = p.send.count();
        if (r != part_.rank) {
          for (const HeadTile t : of_stage(needed[static_cast<std::size_t>(r)].receive[me])) {
            p.send.add(s.send_total, projection_row(t), rows(t));
            p.returned.add(s.send_total, sum_row(t), rows(t));
            s.send_total += rows(t);
          }
          for (const HeadTile t : of_stage(mine.receive[static_cast<std::size_t>(r)])) {
            p.receive.add(compact_row(t, heads), s.receive_total, rows(t));
            s.receive_total += rows(t);
          }
        }
        s.send_to.push_back({first, p.send.count() - first});
        s.send_rows.push_back(s.send_total - sent);
        s.receive_rows.push_back(s.receive_total - received);
      }
      for (const HeadTile t : of_stage(mine.own)) {
        p.own.add(compact_row(t, heads), projection_row(t), rows(t));
        p.kept.add(compact_row(t, heads), sum_row(t), rows(t));
      }
      for (std::int64_t h = heads.first; h < heads.first + heads.count; ++h)
        for (std::int64_t t = 0; t < tokens_; t += split.block)
          p.sums.add((h - heads.first) * tokens_ + t, t * 3 * H_ + h, std::min(split.block, tokens_ - t));
      s.send.count = p.send.count() - s.send.first;
      s.receive.count = p.receive.count() - s.receive.first;
      s.own.count = p.own.count() - s.own.first;
      s.sums.count = p.sums.count() - s.sums.first;
      p.stages.push_back(std::move(s));
    }

    if (shape_.document_mask) {
      std::int64_t row = 0;
      std::size_t next = 0;  // tile of the compact buffer
      for (std::int64_t t = 0; t <= split.tokens; ++t) {
        p.first_row_from.push_back(static_cast<std::int32_t>(row));
        if (next == mine.tiles.size() || t / map->tile_key != mine.tiles[next]) continue;
        ++row;
        if ((t + 1) % map->tile_key == 0) ++next;
      }
    }
    return p;
  }

  void reserve(const SequenceSplit& split) {
    constexpr auto kind = MemoryCategory::communication;
    const DType type = compute_type(shape_.device);
    const std::int64_t B = shape_.sequences;
    std::int64_t keys = 0, sent = 0, received = 0, heads = 0;
    for (LayerPlan& p : plans_) {
      p.send.reserve(plan_, "keys to send: table");
      p.receive.reserve(plan_, "keys to receive: table");
      p.own.reserve(plan_, "own keys: table");
      if (shape_.training) {
        p.returned.reserve(plan_, "gradients returned: table");
        p.kept.reserve(plan_, "own gradients: table");
        p.sums.reserve(plan_, "sums of gradients: table");
      }
      if (shape_.document_mask) {
        p.first_rows = plan_.reserve(kind, "fetched keys: first row of a token", DType::i32, {split.tokens + 1});
        p.document_start = plan_.reserve(kind, "fetched keys: document_start", DType::i32, {B, tokens_});
      }
      for (const Stage& s : p.stages) {
        keys = std::max(keys, s.heads.count * p.keys);
        sent = std::max(sent, s.send_total);
        received = std::max(received, s.receive_total);
        heads = std::max(heads, s.heads.count);
      }
    }
    if (shape_.positions) {
      positions_ = split.positions(part_.rank);
      positions_slot_ = plan_.reserve(kind, "positions of queries", DType::i32, {tokens_});
    }
    const auto rows = [&](const char* name, std::int64_t count, DType t) { return plan_.reserve(kind, name, t, {2, B, count, D_}); };
    keys_ = rows("fetched keys and values", keys, type);
    send_ = rows("keys and values to send", sent, type);
    receive_ = rows("keys and values received", received, type);
    if (shape_.training) {
      d_keys_ = rows("gradients of fetched keys and values", keys, type);
      return_ = rows("gradients to return", received, type);
      returned_ = rows("gradients returned", sent, type);
      sums_ = rows("sums of gradients", heads * tokens_, DType::f32);
    }
    lists_.account(shape_.device, plan_);
  }

  const LayerPlan& plan_of(int layer, const AttentionForward& own) const {
    check_call(ops_ != nullptr, own, shape_, tokens_);
    return plans_[layers_.at(static_cast<std::size_t>(layer))];
  }

  /// Part 0 (k) or 1 (v) of the compact buffer: [B, heads of the turn, keys, D].
  HeadsView compact(MemoryPlan::Slot slot, std::int64_t part, const Stage& s, const LayerPlan& p, std::int64_t B) const {
    const std::int64_t head = p.keys * D_, batch = s.heads.count * head;
    const Tensor t = plan_[slot];
    return {element(t, part * B * batch), t.dtype, batch, head, D_};
  }
  Tensor packed(MemoryPlan::Slot slot, std::int64_t rows, std::int64_t B) const { return plan_[slot].slice(0, rows * 2 * B * D_); }

  /// Keys and values, or gradients of them, between two places.
  void move(const PieceTable& table, Stretch pieces, std::int64_t B, const RowsView& to, const RowsView& from, bool reversed,
            bool add = false) const {
    if (pieces.count > 0) ops_->move_rows({to, from, table(plan_, pieces), reversed, add, B, D_});
  }

  Ticket fetch(const Stage& s, const AttentionForward& own, const LayerPlan& p) const {
    const std::int64_t B = own.shape.batch;
    const Tensor send = packed(send_, s.send_total, B), receive = packed(receive_, s.receive_total, B);
    move(p.send, s.send, B, packed_rows(send, 0, 2, B, D_), rows_of(own.k, D_), false);
    move(p.send, s.send, B, packed_rows(send, 1, 2, B, D_), rows_of(own.v, D_), false);
    return group_.comm->begin_exchange(send, parts_of(group_, s.send_rows, 2 * B * D_), receive, parts_of(group_, s.receive_rows, 2 * B * D_));
  }

  void unpack(const Stage& s, const AttentionForward& own, const LayerPlan& p, Ticket fetched) const {
    const std::int64_t B = own.shape.batch;
    const RowsView k = rows_of(compact(keys_, 0, s, p, B), D_), v = rows_of(compact(keys_, 1, s, p, B), D_);
    move(p.own, s.own, B, k, rows_of(own.k, D_), false);
    move(p.own, s.own, B, v, rows_of(own.v, D_), false);
    group_.comm->wait(fetched);
    const Tensor received = packed(receive_, s.receive_total, B);
    move(p.receive, s.receive, B, k, packed_rows(received, 0, 2, B, D_), false);
    move(p.receive, s.receive, B, v, packed_rows(received, 1, 2, B, D_), false);
  }

  /// The attention of a turn over the compact buffer.
  AttentionForward call(const Stage& s, const AttentionForward& own, const LayerPlan& p) const {
    const std::int64_t B = own.shape.batch, first = B * s.heads.first, count = B * s.heads.count;
    AttentionForward a = own;
    a.shape.heads = s.heads.count;
    a.keys = p.keys;
    a.tiles = lists_.on_device(s.lists.get());
    a.q = from_head(own.q, s.heads.first);
    a.k = compact(keys_, 0, s, p, B);
    a.v = compact(keys_, 1, s, p, B);
    a.o = from_head(own.o, s.heads.first);
    a.scale = heads_slice(own.scale, s.heads);
    a.threshold = heads_slice(own.threshold, s.heads);
    if (shape_.document_mask) a.document_start = plan_[p.document_start].slice(0, B * tokens_).view({B, tokens_});
    if (shape_.positions) a.positions = plan_[positions_slot_];
    a.z = own.z.slice(first * tokens_, count * tokens_).view({B, s.heads.count, tokens_});
    a.active_tiles =
        own.active_tiles.slice(first * p.query_tiles * p.words, count * p.query_tiles * p.words).view({B, s.heads.count, p.query_tiles, p.words});
    a.counters = counters_slice(own.counters, s.heads);
    return a;
  }

  /// Sums of a turn's dk (part 0) or dv (1): [B, heads of the turn, T, D] f32.
  HeadsView sums(std::int64_t part, const Stage& s, std::int64_t B) const {
    const std::int64_t head = tokens_ * D_, batch = s.heads.count * head;
    return {element(plan_[sums_], part * B * batch), DType::f32, batch, head, D_};
  }

  /// This rank's share of the gradients of its own keys and values stays; that of the others' goes back to them.
  Ticket give_back(const Stage& s, const AttentionBackward& own, const LayerPlan& p) const {
    const std::int64_t B = own.forward.shape.batch;
    const RowsView dk = rows_of(compact(d_keys_, 0, s, p, B), D_), dv = rows_of(compact(d_keys_, 1, s, p, B), D_);
    ops_->zero(plan_[sums_].slice(0, 2 * B * s.heads.count * tokens_ * D_));  // of keys that no query here may see
    move(p.kept, s.own, B, rows_of(sums(0, s, B), D_), dk, true);
    move(p.kept, s.own, B, rows_of(sums(1, s, B), D_), dv, true);
    const Tensor send = packed(return_, s.receive_total, B), receive = packed(returned_, s.send_total, B);
    move(p.receive, s.receive, B, packed_rows(send, 0, 2, B, D_), dk, true);
    move(p.receive, s.receive, B, packed_rows(send, 1, 2, B, D_), dv, true);
    return group_.comm->begin_exchange(send, parts_of(group_, s.receive_rows, 2 * B * D_), receive, parts_of(group_, s.send_rows, 2 * B * D_));
  }

  /// Adds what the other ranks found, in the order of the ranks.
  void take_returns(const Stage& s, const AttentionBackward& own, const LayerPlan& p, Ticket returned) const {
    group_.comm->wait(returned);
    const std::int64_t B = own.forward.shape.batch;
    const Tensor from = packed(returned_, s.send_total, B);
    const RowsView dk = rows_of(sums(0, s, B), D_), dv = rows_of(sums(1, s, B), D_);
    for (const Stretch pieces : s.send_to) {
      move(p.returned, pieces, B, dk, packed_rows(from, 0, 2, B, D_), true, true);
      move(p.returned, pieces, B, dv, packed_rows(from, 1, 2, B, D_), true, true);
    }
    move(p.sums, s.sums, B, rows_of(own.dk, D_), dk, true);
    move(p.sums, s.sums, B, rows_of(own.dv, D_), dv, true);
  }

  const SequencePart part_;
  const Shape shape_;
  MemoryPlan& plan_;
  const std::int64_t H_, D_, tokens_;  // tokens of this rank
  HeadLists lists_;
  std::vector<LayerPlan> plans_;     // one for all layers with the same map
  std::vector<std::size_t> layers_;  // the plan of each layer
  std::vector<std::int32_t> positions_;
  MemoryPlan::Slot positions_slot_ = -1, keys_ = -1, send_ = -1, receive_ = -1, d_keys_ = -1, return_ = -1, returned_ = -1, sums_ = -1;
  Ops* ops_ = nullptr;
  SequenceGroup group_;
};

}  // namespace

std::unique_ptr<SharedAttention> make_needed_attention(const SequencePart& part, const SequenceSplit& split,
                                                       const std::vector<std::shared_ptr<const TileMap>>& layers, const SharedAttention::Shape& shape,
                                                       MemoryPlan& plan) {
  return std::make_unique<NeededAttention>(part, split, layers, shape, plan);
}

}  // namespace tessera
