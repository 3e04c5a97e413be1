#include "data/holdout.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <span>

namespace tessera {
namespace {

constexpr std::uint64_t kDecideBytes = 16 << 20;  // of text seen before the way of holding out is chosen

}  // namespace

Holdout::Holdout(double fraction, SplitWriter& train, SplitWriter& validation)
    : fraction_(fraction), writers_{&train, &validation}, decided_(fraction == 0) {}

void Holdout::add(TokenizedBatch batch) {
  if (decided_) return place(batch);
  for (const TokenizedPiece& piece : batch.pieces) {
    kept_bytes_ += piece.text_bytes;
    documents_ += piece.first;
  }
  kept_.push_back(std::move(batch));
  if (kept_bytes_ > kDecideBytes) decide(false);
}

void Holdout::finish() {
  if (!decided_) decide(true);
}

void Holdout::decide(bool complete) {
  decided_ = true;
  by_pieces_ = documents_ < kFewDocuments;
  if (complete) {
    std::vector<std::uint64_t> hashes;
    for (const TokenizedBatch& batch : kept_)
      for (const TokenizedPiece& piece : batch.pieces)
        if (piece.first || by_pieces_) hashes.push_back(piece.hash);
    std::sort(hashes.begin(), hashes.end());
    if (hashes.size() > 1) {
      const auto wanted = static_cast<std::size_t>(std::llround(fraction_ * static_cast<double>(hashes.size())));
      threshold_ = hashes[std::clamp<std::size_t>(wanted, 1, hashes.size() - 1)];
    }
  } else {
    threshold_ = static_cast<std::uint64_t>(std::ldexp(fraction_, 64));
  }
  for (const TokenizedBatch& batch : kept_) place(batch);
  kept_.clear();
}

void Holdout::place(const TokenizedBatch& batch) {
  std::span<const std::uint32_t> tokens = batch.tokens;
  for (const TokenizedPiece& piece : batch.pieces) {
    bool side = side_;
    if (piece.first || by_pieces_) side = piece.hash < threshold_;
    writers_[side]->add(tokens.first(piece.tokens), piece.first || side != side_, piece.text_bytes, piece.at.file, piece.at.documents);
    side_ = side;
    tokens = tokens.subspan(piece.tokens);
  }
}

nlohmann::ordered_json Holdout::state() const { return {{"threshold", threshold_}, {"by_pieces", by_pieces_}, {"side", side_}}; }

void Holdout::restore(const nlohmann::ordered_json& state) {
  threshold_ = state.at("threshold");
  by_pieces_ = state.at("by_pieces");
  side_ = state.at("side");
  decided_ = true;
}

}  // namespace tessera
