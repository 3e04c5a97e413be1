// Exchange `heads`: an all-to-all takes q, k, v from some tokens of all heads to all tokens of some heads, where the attention is that of one rank,
// and another takes the results back. For the backward pass q, k, v come again, with o and its gradient (DeepSpeed Ulysses: Jacobs et al., arXiv
// 2309.14509). Rank r of S computes heads [r H/S, (r+1) H/S).

#include <fmt/format.h>

#include <algorithm>
#include <initializer_list>
#include <stdexcept>

#include "model/sequence_bytes.h"
#include "model/shared_attention_parts.h"

namespace tessera {
namespace {

using Ticket = Communicator::Ticket;

class HeadsAttention final : public SharedAttention {
 public:
  HeadsAttention(const SequencePart& part, const SequenceSplit& split, const std::vector<std::shared_ptr<const TileMap>>& layers, const Shape& shape,
                 MemoryPlan& plan)
      : part_(part), shape_(shape), plan_(plan), H_(shape.heads), D_(shape.head_size), T_(split.tokens), own_tokens_(split.tokens_of(part.rank)) {
    bytes_of_heads(split, {1, H_, D_, 1, shape_.added_edges});  // whether it can be done
    for (int r = 0; r < part_.ranks; ++r) tokens_of_.push_back(split.tokens_of(r));
    const std::int64_t own = H_ / part_.ranks;
    for (const Stretch heads : head_stages(own, part_.stages)) stages_.push_back(make_stage(heads, split));
    for (const auto& map : layers) {
      layers_.push_back({map, {}});
      for (const Stage& s : stages_) layers_.back().lists.push_back(lists_.of(map, of_all_heads(s.heads)));
    }
    reserve(split);
  }

  Sizes sizes() const override {
    Sizes s;
    const std::int64_t B = shape_.sequences, own = H_ / part_.ranks;
    s.z = B * own * T_;
    for (const Layer& layer : layers_) {
      s.active_tiles = std::max(s.active_tiles, B * own * bitmap_of_head(layer));
      s.workspace = std::max(s.workspace, attention_backward_workspace({B, stages_[0].heads.count, T_, D_}, layer.map->tile_query));
    }
    return s;
  }

  std::vector<Stretch> z_heads() const override { throw std::logic_error("shared attention: z of exchange heads is of other ranks' tokens"); }

  void bind(Ops& ops, const SequenceGroup& group) override {
    check_group(part_, group);
    ops_ = &ops;
    group_ = group;
    lists_.upload(ops);
    for (const PieceTable* table : {&projection_, &output_, &whole_}) table->upload(ops, plan_);
    if (shape_.document_mask) ops.upload(plan_[order_slot_], order_.data());
  }

  void begin(const Tensor& document_start) override {
    if (!shape_.document_mask) return;
    std::vector<Communicator::Part> send;
    for (const int r : group_.members) send.push_back({r, 0, own_tokens_});
    const std::int64_t B = document_start.numel() / own_tokens_;
    for (std::int64_t b = 0; b < B; ++b) {
      const Tensor gathered = plan_[gathered_start_];
      group_.comm->exchange(document_start.slice(b * own_tokens_, own_tokens_), send, gathered, parts_of(group_, tokens_of_, 1));
      ops_->look_up(plan_[document_start_].slice(b * T_, T_), gathered, plan_[order_slot_]);
    }
  }

  void forward(int layer, const AttentionForward& own) override {
    const Layer& l = layer_of(layer, own);
    const Views inputs{{own.q, &projection_}, {own.k, &projection_}, {own.v, &projection_}}, outputs{{own.o, &output_}};
    in_turns(own.shape.batch, inputs, outputs, [&](std::size_t s) { ops_->attention_forward(call(l, s, own)); });
  }

  void backward(int layer, const AttentionBackward& own) override {
    const Layer& l = layer_of(layer, own.forward);
    const AttentionForward& f = own.forward;
    const Views inputs{{f.q, &projection_}, {f.k, &projection_}, {f.v, &projection_}, {f.o, &output_}, {own.d_o, &output_}};
    const Views outputs{{own.dq, &projection_}, {own.dk, &projection_}, {own.dv, &projection_}};
    in_turns(f.shape.batch, inputs, outputs, [&](std::size_t s) {
      const std::int64_t B = f.shape.batch;
      AttentionBackward a = own;
      a.forward = call(l, s, f);
      a.forward.o = whole(inputs_, 3, stages_[s], B);
      a.d_o = whole(inputs_, 4, stages_[s], B);
      a.dq = whole(results_, 0, stages_[s], B);
      a.dk = whole(results_, 1, stages_[s], B);
      a.dv = whole(results_, 2, stages_[s], B);
      a.dscale = heads_slice(own.dscale, of_all_heads(stages_[s].heads));
      a.dthreshold = heads_slice(own.dthreshold, of_all_heads(stages_[s].heads));
      a.balance = heads_slice(own.balance, of_all_heads(stages_[s].heads));
      ops_->attention_backward(a);
    });
  }

 private:
  /// A turn: the heads of every rank, counted from its first. Of the tables: left are rows of the packed buffer; right, in units of D, is the place
  /// in a packed projection (`projection_`), in [B, T, H, D] (`output_`) or in [B, heads of the turn, all tokens, D] (`whole_`).
  struct Stage {
    Stretch heads, own_rows, whole_rows;
    std::vector<std::int64_t> to_ranks, from_ranks;  // rows
    std::int64_t sent = 0, received = 0;
  };
  struct Layer {
    std::shared_ptr<const TileMap> map;
    std::vector<std::shared_ptr<const TileMap>> lists;  // [stages]
  };
  struct View {
    HeadsView rows;
    const PieceTable* table;
  };
  using Views = std::initializer_list<View>;

  Stretch of_all_heads(Stretch heads) const { return {part_.rank * (H_ / part_.ranks) + heads.first, heads.count}; }
  static std::int64_t bitmap_of_head(const Layer& layer) { return layer.map->query_tiles * bitmap_words(layer.map->key_tiles); }

  Stage make_stage(Stretch heads, const SequenceSplit& split) {
    Stage s;
    s.heads = heads;
    s.own_rows.first = projection_.count();
    s.whole_rows.first = whole_.count();
    for (int r = 0; r < part_.ranks; ++r) {
      const auto& theirs = split.blocks[static_cast<std::size_t>(r)];
      for (std::int64_t h = 0; h < heads.count; ++h) {
        const std::int64_t head = r * (H_ / part_.ranks) + heads.first + h;
        for (std::int64_t t = 0; t < own_tokens_; t += split.block) {
          const std::int64_t rows = std::min(split.block, own_tokens_ - t);
          projection_.add(s.sent, t * 3 * H_ + head, rows);
          output_.add(s.sent, t * H_ + head, rows);
          s.sent += rows;
        }
        for (const std::int64_t b : theirs) {
          const std::int64_t rows = std::min(split.block, T_ - b * split.block);
          whole_.add(s.received, h * T_ + b * split.block, rows);
          s.received += rows;
        }
      }
      s.to_ranks.push_back(heads.count * own_tokens_);
      s.from_ranks.push_back(heads.count * tokens_of_[static_cast<std::size_t>(r)]);
    }
    s.own_rows.count = projection_.count() - s.own_rows.first;
    s.whole_rows.count = whole_.count() - s.whole_rows.first;
    return s;
  }

  void reserve(const SequenceSplit& split) {
    constexpr auto kind = MemoryCategory::communication;
    const DType type = compute_type(shape_.device);
    const std::int64_t B = shape_.sequences, in = shape_.training ? 5 : 3, out = shape_.training ? 3 : 1;
    projection_.reserve(plan_, "rows of tokens: table");
    output_.reserve(plan_, "rows of outputs: table");
    whole_.reserve(plan_, "rows of heads: table");
    const Stage& most = stages_[0];
    const auto rows = [&](const char* name, std::int64_t parts, std::int64_t count) {
      return plan_.reserve(kind, name, type, {parts, B, count, D_});
    };
    send_ = rows("rows of tokens to send", in, most.sent);
    receive_ = rows("rows of heads received", in, most.received);
    return_ = rows("rows of heads to return", out, most.received);
    returned_ = rows("rows of tokens returned", out, most.sent);
    inputs_ = rows("whole sequences of some heads", in, most.heads.count * T_);
    results_ = rows("results of some heads", out, most.heads.count * T_);
    if (shape_.document_mask) {
      // Where each token of the sequence lies among the ranks' tokens one after another.
      order_.resize(static_cast<std::size_t>(T_));
      std::int32_t next = 0;
      for (int r = 0; r < part_.ranks; ++r)
        for (const std::int32_t t : split.positions(r)) order_[static_cast<std::size_t>(t)] = next++;
      order_slot_ = plan_.reserve(kind, "order of tokens", DType::i32, {T_});
      gathered_start_ = plan_.reserve(kind, "document_start of all ranks", DType::i32, {T_});
      document_start_ = plan_.reserve(kind, "document_start of whole sequences", DType::i32, {B, T_});
    }
    lists_.account(shape_.device, plan_);
  }

  const Layer& layer_of(int layer, const AttentionForward& own) const {
    const bool packed = own.q.token == 3 * H_ * D_ && own.q.head == D_ && own.o.token == H_ * D_ && own.o.head == D_;
    if (!ops_ || own.shape.heads != H_ || own.shape.tokens != own_tokens_ || own.shape.batch > shape_.sequences || !packed)
      throw std::logic_error("shared attention: not bound, or a call of another shape than planned");
    return layers_.at(static_cast<std::size_t>(layer));
  }

  HeadsView whole(MemoryPlan::Slot slot, std::int64_t part, const Stage& s, std::int64_t B) const {
    const std::int64_t head = T_ * D_, batch = s.heads.count * head;
    const Tensor t = plan_[slot];
    return {element(t, part * B * batch), t.dtype, batch, head, D_};
  }

  Ticket begin(MemoryPlan::Slot from, const std::vector<std::int64_t>& send, MemoryPlan::Slot to, const std::vector<std::int64_t>& receive,
               std::int64_t width) const {
    return group_.comm->begin_exchange(plan_[from].view({plan_[from].numel()}), parts_of(group_, send, width), plan_[to].view({plan_[to].numel()}),
                                       parts_of(group_, receive, width));
  }

  /// Takes the inputs to whole sequences of some heads, calls compute(stage), and takes the results back: turn by turn.
  template <class Compute>
  void in_turns(std::int64_t B, Views inputs, Views outputs, Compute&& compute) const {
    const auto parts_in = static_cast<std::int64_t>(inputs.size()), parts_out = static_cast<std::int64_t>(outputs.size());
    const auto fetch = [&](const Stage& s) {
      for (std::int64_t n = 0; n < parts_in; ++n) {
        const View& v = inputs.begin()[n];
        ops_->move_rows({packed_rows(plan_[send_], n, parts_in, B, D_), rows_of(v.rows, D_), (*v.table)(plan_, s.own_rows), false, false, B, D_});
      }
      return begin(send_, s.to_ranks, receive_, s.from_ranks, parts_in * B * D_);
    };
    const auto take = [&](const Stage& s, Ticket fetched) {
      group_.comm->wait(fetched);
      for (std::int64_t n = 0; n < parts_in; ++n)
        ops_->move_rows({rows_of(whole(inputs_, n, s, B), D_), packed_rows(plan_[receive_], n, parts_in, B, D_), whole_(plan_, s.whole_rows), true,
                         false, B, D_});
    };
    const auto give_back = [&](const Stage& s) {
      for (std::int64_t n = 0; n < parts_out; ++n)
        ops_->move_rows({packed_rows(plan_[return_], n, parts_out, B, D_), rows_of(whole(results_, n, s, B), D_), whole_(plan_, s.whole_rows), false,
                         false, B, D_});
      return begin(return_, s.from_ranks, returned_, s.to_ranks, parts_out * B * D_);
    };
    const auto take_results = [&](const Stage& s, Ticket returned) {
      group_.comm->wait(returned);
      for (std::int64_t n = 0; n < parts_out; ++n) {
        const View& v = outputs.begin()[n];
        ops_->move_rows({rows_of(v.rows, D_), packed_rows(plan_[returned_], n, parts_out, B, D_), (*v.table)(plan_, s.own_rows), true, false, B, D_});
      }
    };
    Ticket fetched = fetch(stages_[0]), returned = 0;
    for (std::size_t s = 0; s < stages_.size(); ++s) {
      take(stages_[s], fetched);
      if (s + 1 < stages_.size()) fetched = fetch(stages_[s + 1]);
      compute(s);
      if (s > 0) take_results(stages_[s - 1], returned);
      returned = give_back(stages_[s]);
    }
    take_results(stages_.back(), returned);
  }

  AttentionForward call(const Layer& layer, std::size_t stage, const AttentionForward& own) const {
    const Stage& s = stages_[stage];
    const Stretch heads = of_all_heads(s.heads);
    const std::int64_t B = own.shape.batch, bitmap = bitmap_of_head(layer);
    AttentionForward a = own;
    a.shape = {B, heads.count, T_, D_};
    a.tiles = lists_.on_device(layer.lists[stage].get());
    a.q = whole(inputs_, 0, s, B);
    a.k = whole(inputs_, 1, s, B);
    a.v = whole(inputs_, 2, s, B);
    a.o = whole(results_, 0, s, B);
    a.scale = heads_slice(own.scale, heads);
    a.threshold = heads_slice(own.threshold, heads);
    if (shape_.document_mask) a.document_start = plan_[document_start_].slice(0, B * T_).view({B, T_});
    a.z = own.z.slice(B * s.heads.first * T_, B * s.heads.count * T_).view({B, s.heads.count, T_});
    a.active_tiles = own.active_tiles.slice(B * s.heads.first * bitmap, B * s.heads.count * bitmap);
    a.counters = counters_slice(own.counters, heads);
    return a;
  }

  const SequencePart part_;
  const Shape shape_;
  MemoryPlan& plan_;
  const std::int64_t H_, D_, T_, own_tokens_;
  std::vector<std::int64_t> tokens_of_;  // each rank
  std::vector<Stage> stages_;            // the first is of the most heads
  std::vector<Layer> layers_;
  PieceTable projection_, output_, whole_;
  HeadLists lists_;
  std::vector<std::int32_t> order_;
  MemoryPlan::Slot order_slot_ = -1, gathered_start_ = -1, document_start_ = -1;
  MemoryPlan::Slot send_ = -1, receive_ = -1, return_ = -1, returned_ = -1, inputs_ = -1, results_ = -1;
  Ops* ops_ = nullptr;
  SequenceGroup group_;
};

}  // namespace

std::unique_ptr<SharedAttention> make_heads_attention(const SequencePart& part, const SequenceSplit& split,
                                                      const std::vector<std::shared_ptr<const TileMap>>& layers, const SharedAttention::Shape& shape,
                                                      MemoryPlan& plan) {
  return std::make_unique<HeadsAttention>(part, split, layers, shape, plan);
}

}  // namespace tessera
