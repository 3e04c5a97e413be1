#pragma once
// Draws the validation split (see prepare.h).

#include <array>
#include <cstdint>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <vector>

#include "data/prepare_pipeline.h"
#include "data/shard_writer.h"

namespace tessera {

constexpr std::uint64_t kFewDocuments = 20;  // fewer in the whole input, and pieces are held out

/// Puts each piece on its side. What it sees first it keeps, until it knows whether documents or pieces are to be held out, and in a small
/// corpus which hashes are the smallest.
class Holdout {
 public:
  /// few_documents: whether the whole input holds fewer than kFewDocuments. Asked at most once, and not where what was seen has as many.
  Holdout(double fraction, SplitWriter& train, SplitWriter& validation, std::function<bool()> few_documents);

  void add(TokenizedBatch batch);
  void finish();
  bool by_pieces() const { return by_pieces_; }

  /// Nothing is kept back, so that the state is all there is.
  bool decided() const { return decided_; }
  nlohmann::ordered_json state() const;
  void restore(const nlohmann::ordered_json& state);

 private:
  void decide(bool complete);
  void place(const TokenizedBatch& batch);

  const double fraction_;
  const std::array<SplitWriter*, 2> writers_;
  const std::function<bool()> few_documents_;
  std::vector<TokenizedBatch> kept_;
  std::uint64_t kept_bytes_ = 0, documents_ = 0, threshold_ = 0;
  std::uint64_t within_ = 0;                                 // bytes of the last document so far
  bool decided_ = false, by_pieces_ = false, side_ = false;  // side_: where the last piece went; true: validation
};

}  // namespace tessera
